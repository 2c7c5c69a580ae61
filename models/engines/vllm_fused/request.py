"""What one request asks of the ensemble, read from vLLM's `SamplingParams.extra_args`.

Over HTTP these are the `vllm_xargs` of a request, which are flat: numbers, strings and lists.

| key | value | default |
|---|---|---|
| `shoal_members` | names, each once | all, in the folder's order |
| `shoal_weights` | one number >= 0 for each of these, not all zero; relative | all alike |
| `shoal_rule` | "mixture" or "product" | "mixture" |
| `shoal_evidence` | "sum" or "mean": w_m ∝ weight_m · exp(l_m / temperature), l_m the sum or mean of member m's log-probabilities of the prompt's tokens | weights stay as they are |
| `shoal_evidence_temperature` | a number > 0 | 1 |
"""  # noqa: E501 - a table

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.engines.base import Evidence

_PREFIX = "shoal_"
_KEYS = ("members", "weights", "rule", "evidence", "evidence_temperature")
_RULES = ("mixture", "product")
_LIKELIHOODS = ("sum", "mean")


@dataclass(frozen=True, kw_only=True)
class FusionRequest:
    """How to fuse: `weights` sum to one and are in the order of the folder's members."""

    weights: tuple[float, ...]
    product: bool = False
    evidence: Evidence | None = None


def read_request(
    extra_args: Mapping[str, Any] | None, members: Sequence[str]
) -> FusionRequest | None:
    """Return what `extra_args` ask for, None if nothing; `ValueError` names a bad value."""
    asked = {
        key.removeprefix(_PREFIX): value
        for key, value in (extra_args or {}).items()
        if key.startswith(_PREFIX)
    }
    if not asked:
        return None
    for key in asked:
        if key not in _KEYS:
            allowed = ", ".join(_PREFIX + known for known in _KEYS)
            raise ValueError(f"{_PREFIX}{key} is unknown; allowed are {allowed}")
    return FusionRequest(
        weights=_weights(asked, members),
        product=_one_of(asked, "rule", _RULES) == "product",
        evidence=_evidence(asked),
    )


def _weights(asked: Mapping[str, Any], members: Sequence[str]) -> tuple[float, ...]:
    names = asked.get("members", list(members))
    allowed = ", ".join(members)
    if not isinstance(names, list) or not names:
        raise ValueError(f"shoal_members: {names!r} is not a list of names; allowed are {allowed}")
    for name in names:
        if name not in members or names.count(name) > 1:
            raise ValueError(
                f"shoal_members: {name!r} is unknown or named twice; allowed are {allowed}"
            )
    weights = asked.get("weights", [1.0] * len(names))
    if (
        not isinstance(weights, list)
        or len(weights) != len(names)
        or not all(_is_number(weight) and weight >= 0 for weight in weights)
        or not 0 < sum(weights) < math.inf
    ):
        raise ValueError(
            f"shoal_weights: {weights!r} is not one finite number >= 0 for each of the "
            f"{len(names)} members {', '.join(names)}, not all zero"
        )
    of = dict(zip(names, weights, strict=True))
    return tuple(of.get(member, 0.0) / sum(weights) for member in members)


def _evidence(asked: Mapping[str, Any]) -> Evidence | None:
    temperature = asked.get("evidence_temperature", 1.0)
    if not _is_number(temperature) or temperature <= 0:
        raise ValueError(f"shoal_evidence_temperature: {temperature!r} is not a finite number > 0")
    kind = _one_of(asked, "evidence", _LIKELIHOODS)
    if kind is None:
        if "evidence_temperature" in asked:
            raise ValueError("shoal_evidence_temperature needs shoal_evidence")
        return None
    return Evidence(temperature=float(temperature), per_token=kind == "mean")


def _one_of(asked: Mapping[str, Any], key: str, allowed: Sequence[str]) -> str | None:
    value = asked.get(key)
    if key in asked and value not in allowed:
        raise ValueError(f"shoal_{key}: {value!r} is unknown; allowed are {', '.join(allowed)}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
