"""Which member is worth its price."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from policies.base import ModelFacts, Query
from policies.errors import PolicyError

Floats = NDArray[np.float32]

BYTES_PER_TOKEN = 4
"""Where nobody has counted a prompt's tokens, its length in characters over this."""

DEFAULT_OUTPUT_TOKENS = 256
"""An answer's length where neither the outcomes nor the query say."""


@dataclass(frozen=True, kw_only=True)
class Trade:
    """Maximises `answer_value_usd` · quality - cost.

    `answer_value_usd` is what one right answer is worth; None means that quality alone counts,
    and the cheaper member wins among equals. `members` are the router's models to choose from
    (None: all of them).
    """

    answer_value_usd: float | None = None
    members: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        value = self.answer_value_usd
        if value is not None and not 0 < value < float("inf"):
            raise PolicyError(f"answer_value_usd: {value} is not a positive number")


@dataclass(frozen=True, kw_only=True)
class Chooser:
    """A trade applied to the models of one router and their rates."""

    trade: Trade
    allowed: NDArray[np.int64]
    input_usd: Floats
    output_usd: Floats
    output_tokens: Floats
    order: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        typical = self.costs_usd(Query(text="", prompt_tokens=100))
        object.__setattr__(self, "order", self.allowed[np.argsort(typical[self.allowed])])

    def costs_usd(self, query: Query) -> Floats:
        """Return what each model's answer to `query` is expected to cost."""
        prompt_tokens = query.prompt_tokens or len(query.text) / BYTES_PER_TOKEN
        tokens = self.output_tokens
        if query.max_tokens:
            tokens = np.minimum(tokens, np.float32(query.max_tokens))
        return self.input_usd * np.float32(prompt_tokens) + self.output_usd * tokens

    def choose(self, query: Query, quality_M: Floats) -> int:
        """Return the index of the member with the best trade, the cheapest among equals."""
        value = self.trade.answer_value_usd
        utility = quality_M
        if value is not None:
            utility = quality_M - self.costs_usd(query) / np.float32(value)
        return int(self.order[utility[self.order].argmax()])


def make_chooser(
    trade: Trade,
    models: Sequence[str],
    output_tokens_M: Floats,
    facts: Mapping[str, ModelFacts],
) -> Chooser:
    """Return a chooser among `models`, a router's; models that `facts` lacks cost nothing.

    Raises `PolicyError` if the trade's members include one that the router does not know.
    """
    names = trade.members or tuple(models)
    for name in names:
        if name not in models:
            raise PolicyError(
                f"members: the router knows nothing of {name!r}; it knows {', '.join(models)}"
            )
    rates = [facts[name].rates if name in facts else None for name in models]
    return Chooser(
        trade=trade,
        allowed=np.array([models.index(name) for name in names]),
        input_usd=np.array([r.usd_per_input_token if r else 0.0 for r in rates], np.float32),
        output_usd=np.array([r.usd_per_output_token if r else 0.0 for r in rates], np.float32),
        output_tokens=np.nan_to_num(output_tokens_M, nan=DEFAULT_OUTPUT_TOKENS).astype(np.float32),
    )
