"""Who gets which arm: salted hashes, so every replica and every restart gives the same answer.

Arms are drawn by weighted rendezvous hashing (Thaler & Ravishankar 1998): each arm draws an
exponential waiting time from hash(salt, arm, unit) with its weight as the rate, and the first
one wins. An arm's win probability is its weight, and when one arm's weight grows, units only
ever move to that arm. With two arms a change from w to w' moves exactly the share |w' - w|.

Thompson sampling moves the weights: each arm gets the probability that it is the best one
(Thompson 1933). It earns more while it learns, and pays for it: weights that follow the data bias
plain means, and the confidence sequence's coverage and the sample-ratio test no longer hold as
proven. Use it to choose among many arms; then confirm the winner with fixed weights. Propensities
are logged, so inverse-propensity estimates (`replay`) stay unbiased.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b, shake_128

import numpy as np

from policies.experiments.effects import ArmMean
from policies.experiments.experiment import HOLDOUT, Experiment
from policies.experiments.read import place

_LN_2_64 = 64 * math.log(2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """What assignment looks at. `model` is the name the client asked for.

    Two keys' users of the same name are different units.
    """

    request_id: str
    model: str
    user: str | None = None
    session: str | None = None
    key_id: str | None = None
    domain: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Enrolment:
    """One unit's place: `unit` is its hash, `propensity` the probability of this arm.

    `policy` is what answers it. `arm` is None where a guardrail stopped the arm, and at a block's
    begin: such a request counts for no arm.
    """

    experiment: str
    arm: str | None
    policy: str
    unit: str
    propensity: float


def _prefix(*salt: str) -> bytes:
    """Return 16 bytes that stand for `salt`; lengths keep ("ab", "c") and ("a", "bc") apart."""
    parts = b"".join(b"%d:%s" % (len(part.encode()), part.encode()) for part in salt)
    return blake2b(parts, digest_size=16).digest()


class Uniform:
    """A salted hash of strings into [0, 1), uniform and independent from salt to salt."""

    def __init__(self, *salt: str) -> None:
        self._prefix = _prefix(*salt)

    def __call__(self, unit: bytes) -> float:
        """Return the place of `unit`."""
        digest = blake2b(self._prefix + unit, digest_size=8).digest()
        return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


class ArmDraw:
    """Draws one arm for each unit, by weighted rendezvous hashing.

    An arm is known by its place among the arms, which must not change while units are assigned.
    """

    def __init__(self, salt: str, weights: Mapping[str, float]) -> None:
        total = math.fsum(weights.values())
        self.propensities = {name: weight / total for name, weight in weights.items()}
        self._prefix = _prefix("arm", salt)
        self._unpack = struct.Struct(f">{len(weights)}Q").unpack
        self._arms = [
            (name, 1 / share if share else math.inf) for name, share in self.propensities.items()
        ]

    def __call__(self, unit: bytes) -> str:
        """Return the arm of `unit`."""
        best, shortest = "", math.inf
        draws = self._unpack(shake_128(self._prefix + unit).digest(8 * len(self._arms)))
        for (name, mean_wait), draw in zip(self._arms, draws, strict=True):
            # -ln of the uniform (draw + 1) / 2^64.
            wait = (_LN_2_64 - math.log(draw + 1)) * mean_wait
            if wait < shortest:
                best, shortest = name, wait
        return best


class _Entry:
    """One experiment, prepared for fast assignment."""

    def __init__(
        self,
        experiment: Experiment,
        stretch: tuple[float, float],
        weights: Mapping[str, float] | None,
        stopped: frozenset[str],
    ) -> None:
        salt = experiment.salt or experiment.name
        self.experiment = experiment
        self._start, self._end = stretch
        self._place = Uniform("layer", experiment.layer)
        self.holdout = Uniform("holdout", salt)
        self.offset = Uniform("switchback", salt)(b"")
        self.draw = ArmDraw(
            salt,
            {arm.name: (weights or {}).get(arm.name, arm.weight) for arm in experiment.arms},
        )
        self.policies = {arm.name: arm.policy for arm in experiment.arms}
        self.stopped = stopped
        self.start_s, self.stop_s = experiment.start_s, experiment.stop_s
        self.models = frozenset(experiment.target.models)
        self.keys = frozenset(experiment.target.keys)
        self.domains = frozenset(experiment.target.domains)

    def holds(self, unit: bytes) -> bool:
        whole = self._end - self._start >= 1
        return whole or self._start <= self._place(unit) < self._end

    def wants(self, visit: Visit, now_s: float) -> bool:
        return (
            self.start_s <= now_s < self.stop_s
            and (not self.models or visit.model in self.models)
            and (not self.keys or visit.key_id in self.keys)
            and (not self.domains or visit.domain in self.domains)
        )


class Assigner:
    """Assigns requests to experiments' arms. Immutable; make a new one when something changes.

    `weights` overrides configured weights by experiment (adaptive allocation). `stopped` names,
    by experiment, the arms that a guardrail stopped: their units get the control's policy and
    count for no arm.
    Raises `ExperimentError` where experiments do not go together (see `layers.place`).
    """

    def __init__(
        self,
        experiments: Sequence[Experiment],
        *,
        weights: Mapping[str, Mapping[str, float]] | None = None,
        stopped: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        stretches = place(experiments)
        self._entries = [
            _Entry(
                experiment,
                stretches[experiment.name],
                (weights or {}).get(experiment.name),
                frozenset((stopped or {}).get(experiment.name, ())),
            )
            for experiment in experiments
        ]

    def assign(self, visit: Visit, *, now_s: float) -> Enrolment | None:
        """Return the arm of `visit`, or None if no experiment takes it.

        A request that lacks the unit (no user, no session) takes part in nothing that is split
        by it. `now_s` is Unix time.
        """
        for entry in self._entries:
            if not entry.wants(visit, now_s):
                continue
            if entry.experiment.unit == "block":
                number, washing = entry.experiment.blocks.block(now_s, entry.offset)
                unit: bytes | None = str(number).encode()
            else:
                unit, washing = unit_of(entry.experiment, visit), False
            if unit is not None and entry.holds(unit):
                enrolment = _enrol(entry, unit)
                return replace(enrolment, arm=None) if washing else enrolment
        return None


def _enrol(entry: _Entry, unit: bytes) -> Enrolment:
    experiment = entry.experiment
    held = experiment.holdout
    arm: str | None
    if held and entry.holdout(unit) < held:
        arm, policy, propensity = HOLDOUT, experiment.control_arm.policy, held
    else:
        arm = entry.draw(unit)
        policy, propensity = entry.policies[arm], (1 - held) * entry.draw.propensities[arm]
        if arm in entry.stopped:
            arm, policy = None, experiment.control_arm.policy
    return Enrolment(
        experiment=experiment.name,
        arm=arm,
        policy=policy,
        unit=blake2b(unit, digest_size=8).hexdigest(),
        propensity=propensity,
    )


def unit_of(experiment: Experiment, visit: Visit) -> bytes | None:
    """Return what is randomised for `visit`, or None if the request does not say."""
    if experiment.unit == "request":
        return visit.request_id.encode()
    name = visit.user if experiment.unit == "user" else visit.session
    if name is None:
        return None
    return f"{visit.key_id or ''}\x1f{name}".encode()


_DRAWS = 4096
_PRIOR_UNITS = 30
_LEADERS_SHARE = 0.5


def adaptive_weights(
    experiment: Experiment, means: Mapping[str, ArmMean], *, rng: np.random.Generator
) -> dict[str, float]:
    """Return each arm's new weight, at least the floor, under normal posteriors.

    Thompson sampling's is P(best). Top-two sampling (Russo 2016, "Simple Bayesian algorithms for
    best arm identification") gives half of the units to an arm by P(best), and half to the one that
    is best once that one is left out. `means` are the arms' means of the primary metric. Until
    every arm has 30 units, the configured weights stay.
    """
    names = [arm.name for arm in experiment.arms]
    if any(
        name not in means or means[name].num_units < _PRIOR_UNITS or not means[name].se > 0
        for name in names
    ):
        return {arm.name: arm.weight for arm in experiment.arms}
    sign = 1 if experiment.direction == "increase" else -1
    centre = np.array([sign * means[name].mean for name in names])
    spread = np.array([means[name].se for name in names])
    draws = rng.normal(centre, spread, size=(_DRAWS, len(names)))
    best = draws.argmax(1)
    share = np.bincount(best, minlength=len(names)) / _DRAWS
    if experiment.allocation.kind == "best_arm":
        # The second best of the same draw stands for the best once the first is left out.
        draws[np.arange(_DRAWS), best] = -np.inf
        rivals = np.bincount(draws.argmax(1), minlength=len(names)) / _DRAWS
        share = _LEADERS_SHARE * share + (1 - _LEADERS_SHARE) * rivals
    floor = experiment.allocation.floor
    weights = floor + (1 - floor * len(names)) * share
    return dict(zip(names, (weights / weights.sum()).tolist(), strict=True))
