"""What the frontier bench measures: fused answers, and likelihoods from transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from models.downscale.answers import Written, ask
from models.pool import Pool
from models.tasks.base import check
from models.tokenizer import Tokenizer, load_tokenizer
from policies.evidence import Floats
from policies.footprint import Rates
from policies.outcomes import Outcome
from policies.plan import Answer

MAX_TOKENS = 32
BATCH = 64


def fused_outcomes(
    pool: Pool,
    outcomes: Sequence[Outcome],
    plans: Mapping[str, Sequence[Answer]],
    rates: Mapping[str, Rates],
) -> list[Outcome]:
    """Return `outcomes` with the greedy answers of `plans`, one per name and query, added."""
    members = dict.fromkeys(name for its in plans.values() for plan in its for name in plan.members)
    checkpoints = {name: card.path for name in members if (card := pool.model(name).card)}
    result = list(outcomes)
    for name, its in plans.items():
        asked = [(one.query, plan) for one, plan in zip(outcomes, its, strict=True)]
        for i, answer in enumerate(ask(checkpoints, asked, max_new_tokens=MAX_TOKENS)):
            read, plan = outcomes[i].prompt_tokens or 0, its[i]
            written = answer.logprobs.num_tokens
            usd = sum(rates[one].footprint(read, written).usd for one in plan.members)
            result[i] = _with(result[i], name, answer, usd)
    return result


def likelihoods(
    pool: Pool, members: Sequence[str], outcomes: Sequence[Outcome]
) -> tuple[Floats, Floats]:
    """Return answer_QTM and prompt_QM of the reference answers; see `policies.evidence`."""
    tokenizer = load_tokenizer(pool.model(members[0]))
    answers, prompts = [], []
    for name in members:
        card = pool.model(name).card
        assert card is not None
        model = AutoModelForCausalLM.from_pretrained(card.path, dtype=torch.float32).eval()
        end = model.config.eos_token_id
        end = end[0] if isinstance(end, list) else end
        answer, prompt = _score(model, tokenizer, outcomes, end)
        answers.append(answer)
        prompts.append(prompt)
    return np.stack(answers, axis=-1), np.stack(prompts, axis=-1)


def prompt_tokens(tokenizer: Tokenizer, outcome: Outcome) -> tuple[int, ...]:
    """Return the query through the chat template."""
    return tokenizer.encode_chat([{"role": "user", "content": outcome.query}])


def _with(outcome: Outcome, name: str, answer: Written, usd: float) -> Outcome:
    assert outcome.answer is not None
    return replace(
        outcome,
        scores={**outcome.scores, name: float(check(outcome.answer, answer.text))},
        outputs={**outcome.outputs, name: answer.text},
        logprobs={**outcome.logprobs, name: answer.logprobs},
        output_tokens={**outcome.output_tokens, name: answer.logprobs.num_tokens},
        costs={**outcome.costs, name: usd},
    )


def _score(
    model: torch.nn.Module, tokenizer: Tokenizer, outcomes: Sequence[Outcome], end: int
) -> tuple[Floats, Floats]:
    """Teacher-force prompt and reference answer: answer [Q, T] (NaN beyond the end), prompt [Q]."""
    rows = []
    for outcome in outcomes:
        assert outcome.answer is not None
        prompt = prompt_tokens(tokenizer, outcome)
        rows.append((prompt, (*tokenizer.encode(outcome.answer), end)))
    width = max(len(answer) for _, answer in rows)
    answers, prompts = np.full((len(rows), width), np.nan), np.zeros(len(rows))
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        longest = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids = torch.tensor([[*p, *a, *[0] * (longest - len(p) - len(a))] for p, a in batch])
        with torch.inference_mode():
            # Padding stands at the end, where causal attention doesn't let it matter.
            logp = model(ids).logits[:, :-1].log_softmax(-1)
        picked = logp.gather(2, ids[:, 1:, None])[..., 0].double().numpy()
        for row, (prompt, answer) in enumerate(batch):
            cut = len(prompt) - 1
            prompts[start + row] = picked[row, :cut].sum()
            answers[start + row, : len(answer)] = picked[row, cut : cut + len(answer)]
    return answers, prompts
