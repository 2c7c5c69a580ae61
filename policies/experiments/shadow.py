"""Shadow traffic: ask another policy the same question, or a judge what the answer is worth.

This module decides who is mirrored and keeps the spend under its cap; running it, after the client
has its answer, is the server's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, with_config

from policies.errors import ExperimentError
from policies.experiments.assignment import Uniform
from policies.experiments.read import read_as


@with_config(extra="forbid")
@dataclass(frozen=True, kw_only=True)
class Shadow:
    """Mirror `share` of the requests for `models`, for at most `usd_per_day`.

    A `policy` answers them again; or a `judge`, a model of the pool, grades the answer from 1 to 10
    by the `rubric` (None: correctness first). Give one of the two. At most `concurrency` mirrored
    requests run at once; what comes while they run is skipped, so that shadows never queue in front
    of clients.
    """

    name: str
    policy: str | None = None
    judge: str | None = None
    rubric: str | None = None
    share: Annotated[float, Field(gt=0, le=1)]
    usd_per_day: Annotated[float, Field(ge=0)]
    models: tuple[str, ...] = ("auto",)
    concurrency: Annotated[int, Field(ge=1)] = 1

    def __post_init__(self) -> None:
        if (self.policy is None) == (self.judge is None):
            raise ExperimentError(
                f"shadows.{self.name}: give a policy that answers, or a judge that grades"
            )


_DAY_S = 86_400


def read_shadows(
    data: object, *, policies: Collection[str], models: Collection[str] = ()
) -> tuple[Shadow, ...]:
    """Read `{name: shadow}`; `policies` and `models` are the names there are.

    Raises `ExperimentError` that names the key and what is allowed.
    """
    if not isinstance(data, Mapping):
        raise ExperimentError(f"shadows: {data!r} is not a mapping from names to shadows")
    shadows = []
    for name, body in data.items():
        where = f"shadows.{name}"
        if not isinstance(body, Mapping):
            raise ExperimentError(f"{where}: {body!r} is not a mapping")
        shadow = read_as(Shadow, {**body, "name": str(name)}, where=where)
        for key, known in (("policy", policies), ("judge", models)):
            if getattr(shadow, key) not in (None, *known):
                raise ExperimentError(
                    f"{where}.{key}: {getattr(shadow, key)!r} is unknown; "
                    f"allowed are {', '.join(sorted(known))}"
                )
        shadows.append(shadow)
    return tuple(shadows)


class ShadowMeter:
    """Admits mirrored requests and counts what they cost, apart from what clients cost.

    The estimate is reserved before a mirrored request runs and settled after, so the cap holds
    while several run. Days are UTC days. Each of `num_processes` gets an equal part of the cap, so
    it holds for all together; `spent_usd` is what all of them spent on the day of `now_s` before
    this one started.
    """

    def __init__(
        self, shadow: Shadow, *, num_processes: int = 1, spent_usd: float = 0.0, now_s: float = 0.0
    ) -> None:
        self.shadow = shadow
        self._cap_usd = shadow.usd_per_day / num_processes
        self._mirrors = Uniform("shadow", shadow.name)
        self._day = int(now_s // _DAY_S)
        self._reserved_usd = 0.0
        self._running = 0
        self.spent_today_usd = spent_usd / num_processes

    def wants(self, request_id: str, *, model: str) -> bool:
        """Return whether this request belongs to the mirrored share; always the same answer."""
        shadow = self.shadow
        return model in shadow.models and self._mirrors(request_id.encode()) < shadow.share

    def admit(self, *, estimate_usd: float, now_s: float) -> bool:
        """Return whether there is room for one more mirrored request; if so, `settle` follows."""
        day = int(now_s // _DAY_S)
        if day != self._day:
            self._day, self.spent_today_usd = day, 0.0
        committed_usd = self.spent_today_usd + self._reserved_usd + estimate_usd
        full = self._running >= self.shadow.concurrency
        if full or committed_usd > self._cap_usd:
            return False
        self._running += 1
        self._reserved_usd += estimate_usd
        return True

    def settle(self, *, estimate_usd: float, usd: float) -> None:
        """Replace what `admit` reserved by what the mirrored request cost."""
        self._running -= 1
        self._reserved_usd = max(0.0, self._reserved_usd - estimate_usd)
        self.spent_today_usd += usd
