"""A fusion of a pool's models token by token, its weights calibrated on right answers.

w_m ∝ prior_m^κ · exp(l_m / T), l_m being the prompt's log-likelihood and the prior what a router
expects (see `policies.evidence`). T and κ are those under which the references of questions are
likeliest, the prior coming from a router that was learned without them.

How likely a text is under each model, `Likelihoods` tells, which the grader `loss` asks, too.

Shape legend: Q questions, M members, T tokens of an answer.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from models.card import ModelCard
from models.engines.registry import engine_traits
from models.pool import Pool
from models.tokenizer import CheckpointTokenizer
from policies.errors import PolicyError
from policies.evidence import HeldOutAnswers, calibrate
from policies.grading.base import Ungradable
from policies.outcomes import Outcome
from policies.routing.router import Router

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Likelihood:
    """Log-likelihoods in nats: a prompt's, its first token given, and each token's of an answer."""

    prompt: float
    answer_T: NDArray[np.float32]


class Likelihoods:
    """Log-likelihoods under checkpoints that transformers reads, loaded at their first question.

    They are held in fp32 beside the engines' own weights; one question computes at a time.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._loaded: dict[str, tuple[PreTrainedModel, CheckpointTokenizer]] = {}
        self._lock = threading.Lock()

    def check(self, name: str) -> None:
        """Raise `Ungradable` for a model without a folder of weights."""
        self._card(name)

    async def __call__(self, name: str, query: str, text: str) -> float:
        """Return log P(text | query) under the model called `name`, in nats.

        Raises `Ungradable` for a model without a folder of weights.
        """
        return await asyncio.to_thread(self._compute, name, query, text)

    def _compute(self, name: str, query: str, text: str) -> float:
        return float(self.of(name, query, text).answer_T.sum())

    def of(self, name: str, query: str, text: str) -> Likelihood:
        """Return what `name` makes of the templated `query` and of `text` as its answer.

        Raises `Ungradable` for a model without a folder of weights.
        """
        import torch  # noqa: PLC0415 - only where it is asked for

        with self._lock, torch.inference_mode():
            model, tokenizer = self._load(name)
            prompt = (
                tokenizer.encode_chat([{"role": "user", "content": query}])
                if tokenizer.has_chat_template
                else tokenizer.encode(query)
            )
            answer = tokenizer.encode(text)[len(tokenizer.encode("")) :]
            ids_BT = torch.tensor([[*prompt, *answer]])
            logps_TV = model(input_ids=ids_BT).logits[0].float().log_softmax(-1)
            told_T = logps_TV[:-1].gather(1, ids_BT[0, 1:, None])[:, 0].numpy()
            return Likelihood(
                prompt=float(told_T[: len(prompt) - 1].sum()), answer_T=told_T[len(prompt) - 1 :]
            )

    def _load(self, name: str) -> tuple[PreTrainedModel, CheckpointTokenizer]:
        if name not in self._loaded:
            import torch  # noqa: PLC0415 - only where it is asked for
            from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow to import

            card = self._card(name)
            model = AutoModelForCausalLM.from_pretrained(
                card.path,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
            if card.adapter is not None:
                from models.training.lora import merge_adapter  # noqa: PLC0415 - loads torch

                merge_adapter(model, card.adapter)
            # As loaded, it is in evaluation mode already.
            self._loaded[name] = model, CheckpointTokenizer(card.path)
        return self._loaded[name]

    def _card(self, name: str) -> ModelCard:
        card = self._pool.model(name).card
        if card is None or not card.path.is_dir():
            raise Ungradable(f"loss: {name} has no folder of weights that can be read here")
        return card


# Two numbers are fitted; more answers would change neither and take their time.
_MOST_ANSWERS: Final = 100
_LEAST_ANSWERS: Final = 20


def fusible(pool: Pool, names: Sequence[str]) -> tuple[str, ...]:
    """Return the most of the models `names` that one engine can fuse; empty where it is not two.

    They share an engine, and conversations become the same tokens in all of them; and each has a
    folder of weights, by which its fusion can be calibrated.
    """
    fuses = {e.name: engine_traits(e, pool.loaded_by(e.name)).fuses for e in pool.engines}
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        engine, card = pool.engine_of(name), pool.model(name).card
        if fuses[engine.name] and card is not None and card.path.is_dir():
            groups[engine.name, card.prompt_sha256].append(name)
    most = max(groups.values(), key=len, default=[])
    return tuple(most) if len(most) > 1 else ()


def learn_fusion(
    pool: Pool,
    members: Sequence[str],
    train: Sequence[Outcome],
    fit: Callable[[Sequence[Outcome]], Router],
    *,
    router: dict[str, Any],
) -> dict[str, Any]:
    """Return the specification of a fusion of `members`, which takes its prior from `router`.

    Half of `train` teaches `fit` a router, the references of the other half calibrate. Raises
    `PolicyError` where these are too few.
    """
    taught, rest = train[::2], train[1::2]
    rows = [row for row in rest if row.answer][:_MOST_ANSWERS]
    if len(rows) < _LEAST_ANSWERS:
        raise PolicyError(
            f"{len(rows)} questions with a reference are too few to calibrate on; it takes "
            f"{_LEAST_ANSWERS} in half of the training questions"
        )
    prior = fit(taught)
    columns = [prior.models.index(name) for name in members]
    likelihoods = Likelihoods(pool)
    told = [[likelihoods.of(name, row.query, row.answer or "") for name in members] for row in rows]
    longest = max(len(one.answer_T) for row in told for one in row)
    answer_QTM = np.full((len(rows), longest, len(members)), np.nan)
    for q, row in enumerate(told):
        for m, one in enumerate(row):
            answer_QTM[q, : len(one.answer_T), m] = one.answer_T
    found = calibrate(
        HeldOutAnswers(
            answer_QTM=answer_QTM,
            prompt_QM=np.array([[one.prompt for one in row] for row in told]),
            prior_QM=np.maximum(prior.qualities([row.query for row in rows])[:, columns], 1e-6),
        )
    )
    return {
        "kind": "fused",
        "answer": {
            "members": list(members),
            "weights": "evidence",
            "temperature": round(found.temperature, 4),
        },
        "prior_power": round(found.prior_power, 4),
        "router": router,
    }
