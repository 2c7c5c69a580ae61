"""How likely a pool's models find a text: the grader `loss` and fusions ask, and no API tells."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from models.card import ModelCard
from models.pool import Pool
from models.tokenizer import CheckpointTokenizer
from policies.grading.base import Ungradable

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
