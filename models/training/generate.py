"""Greedy answers of one model, or of several fused, to many questions, batched without padding.

Questions of equal prompt length share a batch, so every answer is the one that the question gets
alone, up to floating-point noise. Shapes: `B` questions of a batch, `M` models, `V` vocabulary.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A greedy answer: its text, and the natural-log probability of each token, end included.

    `log_probabilities` covers the end token when the model wrote it within the limit.
    `mean_entropy` is that of the distributions that the tokens were taken from, in nats.
    """

    text: str
    log_probabilities: tuple[float, ...]
    mean_entropy: float
    num_prompt_tokens: int
    finished: bool


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 256,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Completion]:
    """Greedy answers in the order of `questions`, each asked alone in the chat template.

    `progress` is told how many questions each batch held.
    """
    return complete_fused(
        (model,),
        tokenizer,
        questions,
        weights_QM=np.ones((len(questions), 1)),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )


@torch.inference_mode()
def complete_fused(
    models: Sequence[PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    *,
    weights_QM: NDArray[np.float64],
    max_new_tokens: int = 32,
    batch_size: int = 256,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Completion]:
    """The same for the mixture log Σ_m w_m p_m of several models, fused at every token.

    The rows of `weights_QM`, one per question, sum to one.
    """
    prompts = [_prompt(tokenizer, question) for question in questions]
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    found: dict[int, Completion] = {}
    for indices in by_length.values():
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            answers = _complete_batch(
                models,
                tokenizer,
                [prompts[i] for i in batch],
                log_weights_BM=torch.from_numpy(weights_QM[batch]).float().log(),
                max_new_tokens=max_new_tokens,
            )
            found |= dict(zip(batch, answers, strict=True))
            progress(len(batch))
    return [found[i] for i in range(len(questions))]


def _prompt(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


class _Fused:
    """The next-token distribution of one or more models, each with its own cache."""

    def __init__(self, models: Sequence[PreTrainedModel], log_weights_BM: Tensor) -> None:
        self._models = models
        self._caches = [DynamicCache(config=model.config) for model in models]
        self._log_weights_BM = log_weights_BM

    def next_tokens(self, tokens: Tensor) -> Tensor:
        """After these tokens, the first ones or one more each."""
        parts = []
        for m, (model, cache) in enumerate(zip(self._models, self._caches, strict=True)):
            logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1]
            parts.append(logits.float().log_softmax(-1) + self._log_weights_BM[:, m, None])
        return torch.stack(parts).logsumexp(0) if len(parts) > 1 else parts[0]


def _complete_batch(
    models: Sequence[PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[list[int]],
    *,
    log_weights_BM: Tensor,
    max_new_tokens: int,
) -> list[Completion]:
    end = tokenizer.eos_token_id
    fused = _Fused(models, log_weights_BM)
    tokens = torch.tensor(prompts)
    written: list[Tensor] = []
    log_probabilities: list[Tensor] = []
    entropies: list[Tensor] = []
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(max_new_tokens):
        logs_BV = fused.next_tokens(tokens)
        best, token = logs_BV.max(-1)
        written.append(token)
        log_probabilities.append(best)
        entropies.append(-torch.xlogy(logs_BV.exp(), logs_BV.exp()).sum(-1))
        ended |= token == end
        if bool(ended.all()):
            break
        tokens = token[:, None]
    ids = torch.stack(written, 1).tolist()
    scores = torch.stack(log_probabilities, 1).tolist()
    unsure = torch.stack(entropies, 1).tolist()
    completions = []
    for row, row_scores, row_unsure in zip(ids, scores, unsure, strict=True):
        finished = end in row
        num_words = row.index(end) if finished else len(row)
        num_tokens = num_words + finished
        completions.append(
            Completion(
                text=str(tokenizer.decode(row[:num_words], skip_special_tokens=True)),
                log_probabilities=tuple(row_scores[:num_tokens]),
                mean_entropy=sum(row_unsure[:num_tokens]) / num_tokens,
                num_prompt_tokens=len(prompts[0]),
                finished=finished,
            )
        )
    return completions


def log_probability_facts(completion: Completion) -> dict[str, float]:
    """What scorers look at: mean and least log-probability, mean entropy, number of tokens."""
    values = completion.log_probabilities
    return {
        "mean": round(sum(values) / len(values), 3),
        "min": round(min(values), 3),
        "entropy": round(max(completion.mean_entropy, 0.0), 3),
        "num_tokens": len(values),
    }
