"""The response's `shoal` object: what decided, what ran, what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from models.engines.base import Chunk
from policies.footprint import Footprint
from policies.plan import Answer, to_json
from router.catalog.catalog import Catalog
from router.exchange import Exchange
from router.executor.judging import logprobs


def shoal_field(
    exchange: Exchange, catalog: Catalog, answers: Sequence[Chunk] = ()
) -> dict[str, Any]:
    """Return the `shoal` object of an answered request.

    Where it is to explain itself and has whole `answers`, it says what scorers see of the first.

    `plan`, `reason`, `members` and `weights` are the first choice's; the members are those whose
    text it is. Tokens and cost are of everything that ran, stages that were not accepted included.
    """
    parts = exchange.member_footprints(catalog.prices.rates)
    cost = exchange.total(parts)
    [decision, *_] = exchange.decisions
    run = exchange.choices[0].trace.accepted_run()
    accepted = run.plan if run is not None and isinstance(run.plan, Answer) else None
    data: dict[str, Any] = {
        "policy": exchange.record.policy,
        "plan": to_json(decision.plan),
        "reason": decision.reason,
        "members": list(accepted.members) if accepted else [],
        "weights": _weights(accepted, run.weights) if run and accepted else [],
        "tokens": {
            name: {"prompt": tokens.prompt_tokens, "output": tokens.output_tokens}
            for name, tokens in exchange.member_tokens().items()
        },
        "cost": {"usd": cost.usd, "wh": cost.wh, "gco2e": cost.gco2e},
        "footprint": _footprint(catalog, cost, parts),
    }
    if exchange.record.arm is not None:
        data["experiment"] = exchange.record.experiment
        data["arm"] = exchange.record.arm
    if exchange.ask is not None and exchange.ask.extension.explain:
        data["scores"] = dict(decision.scores)
        data["details"] = dict(decision.details)
        data["stages"] = exchange.stages()
        seen = logprobs(answers[0].tokens) if answers else None
        data["logprobs"] = None if seen is None else asdict(seen)
    return data


def _footprint(catalog: Catalog, cost: Footprint, parts: Mapping[str, Footprint]) -> dict[str, Any]:
    """Return energy and carbon with the method behind them, in total and by member."""
    grid = catalog.prices.grid_reading()
    return {
        **cost.to_json(),
        "grid": {"gco2e_per_kwh": grid.gco2e_per_kwh, "source": grid.source},
        "members": {
            name: {"engine": catalog.members.engine_of(name), **part.to_json()}
            for name, part in parts.items()
        },
    }


def _weights(answer: Answer, used: tuple[float, ...] | None) -> list[float]:
    """Return the members' weights, summing to one: those that were used, else the plan's."""
    weights = used or answer.weights or (1.0,) * len(answer.members)
    return [weight / sum(weights) for weight in weights]
