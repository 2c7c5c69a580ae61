"""Assignment: uniform, sticky, replica-independent, and moving only who must move."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from policies.experiments.assignment import ArmDraw, Assigner, Uniform, Visit
from policies.experiments.experiment import Arm, Audience, Experiment

NUM_UNITS = 20_000


def experiment(weights: tuple[float, ...] = (0.5, 0.3, 0.2), **changes: Any) -> Experiment:
    """Three arms named arm0 to arm2 with policies of the same number."""
    arms = tuple(
        Arm(name=f"arm{i}", policy=f"policy{i}", weight=weight) for i, weight in enumerate(weights)
    )
    return Experiment(**{"name": "e", "arms": arms, **changes})


def visits(num: int = NUM_UNITS) -> list[Visit]:
    """One request from each of `num` users."""
    return [Visit(request_id=f"r{i}", model="auto", user=f"user{i}") for i in range(num)]


def arms_of(assigner: Assigner) -> list[str | None]:
    """The arm of each of those users."""
    found = [assigner.assign(visit, now_s=0.0) for visit in visits()]
    return [None if enrolment is None else enrolment.arm for enrolment in found]


def test_arms_get_their_weights() -> None:
    """Shares over 20,000 fixed units fit the weights; χ² p > 0.001 (deterministic, no seed)."""
    counts = Counter(arms_of(Assigner([experiment()])))
    observed = [counts[f"arm{i}"] for i in range(3)]
    assert chisquare(observed, [NUM_UNITS * w for w in (0.5, 0.3, 0.2)]).pvalue > 0.001


def test_the_hash_is_uniform_and_independent_between_salts() -> None:
    """Places are uniform (Kolmogorov-Smirnov) and two salts' places do not correlate."""
    units = [f"user{i}".encode() for i in range(NUM_UNITS)]
    a, b = ([Uniform("layer", salt)(unit) for unit in units] for salt in ("a", "b"))
    assert kstest(a, "uniform").pvalue > 0.001
    # Four standard deviations of a correlation of independent values.
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(NUM_UNITS)


def test_arms_of_two_experiments_are_independent() -> None:
    """Knowing the arm of one experiment says nothing about the arm of another."""
    units = [f"user{i}".encode() for i in range(NUM_UNITS)]
    draws = [ArmDraw(salt, {"a": 0.5, "b": 0.5}) for salt in ("one", "two")]
    same = sum(draws[0](unit) == draws[1](unit) for unit in units)
    assert abs(same - NUM_UNITS / 2) < 4 * np.sqrt(NUM_UNITS / 4)


def test_assignment_is_the_same_in_every_process() -> None:
    """A new interpreter, with another hash seed, gives every unit the same arm."""
    code = (
        "from policies.experiments.assignment import ArmDraw\n"
        "draw = ArmDraw('e', {'a': 0.5, 'b': 0.3, 'c': 0.2})\n"
        "print(''.join(draw(f'user{i}'.encode()) for i in range(500)))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    draw = ArmDraw("e", {"a": 0.5, "b": 0.3, "c": 0.2})
    assert found == {"".join(draw(f"user{i}".encode()) for i in range(500))}


def test_assignment_is_what_it_was_when_it_was_released() -> None:
    """These units' arms are pinned: changing the hash would move running experiments' users."""
    draw = ArmDraw("e", {"a": 0.5, "b": 0.5})
    assert "".join(draw(f"user{i}".encode()) for i in range(24)) == "bbaaabaaabbabaaaabaaaabb"


@pytest.mark.parametrize(
    ("before", "after"), [((0.5, 0.5), (0.6, 0.4)), ((0.2, 0.5, 0.3), (0.36, 0.4, 0.24))]
)
def test_a_heavier_arm_only_gains_and_only_what_it_must(
    before: tuple[float, ...], after: tuple[float, ...]
) -> None:
    """When one arm grows at the others' expense, every moved unit moves to it, and no more."""
    old = arms_of(Assigner([experiment(before)]))
    new = arms_of(Assigner([experiment(after)]))
    moved = [b for a, b in zip(old, new, strict=True) if a != b]
    assert set(moved) == {"arm0"}
    gain = after[0] - before[0]
    # Four standard deviations of a binomial share.
    assert abs(len(moved) / NUM_UNITS - gain) < 4 * np.sqrt(gain * (1 - gain) / NUM_UNITS)


def test_more_traffic_moves_nobody_between_arms() -> None:
    """Ramping up from 20% to all keeps everyone who took part in their arm."""
    some = arms_of(Assigner([experiment(traffic=0.2)]))
    everyone = arms_of(Assigner([experiment(traffic=1.0)]))
    stayed = [(a, b) for a, b in zip(some, everyone, strict=True) if a is not None]
    assert abs(len(stayed) / NUM_UNITS - 0.2) < 4 * np.sqrt(0.16 / NUM_UNITS)
    assert all(a == b for a, b in stayed)


def test_experiments_of_one_layer_exclude_each_other() -> None:
    """Every unit is in at most one experiment; shares are as configured."""
    assigner = Assigner(
        [experiment(name="first", traffic=0.3), experiment(name="second", traffic=0.6)]
    )
    found = Counter(
        enrolment.experiment if (enrolment := assigner.assign(visit, now_s=0)) else None
        for visit in visits()
    )
    expected = {"first": 0.3, "second": 0.6, None: 0.1}
    assert (
        chisquare(
            [found[name] for name in expected], [NUM_UNITS * s for s in expected.values()]
        ).pvalue
        > 0.001
    )


def test_conversations_stay_on_their_arm() -> None:
    """All turns of a session, whoever asks and whenever, get the same arm."""
    assigner = Assigner([experiment(unit="session")])
    turns = [
        assigner.assign(
            Visit(request_id=f"r{turn}", model="auto", session="s7", user=f"u{turn % 3}"),
            now_s=turn * 3600.0,
        )
        for turn in range(50)
    ]
    assert len({enrolment.arm for enrolment in turns if enrolment}) == 1


def test_a_request_without_the_unit_takes_no_part() -> None:
    """No user, no user-split experiment; the request unit always exists."""
    anonymous = Visit(request_id="r", model="auto")
    assert Assigner([experiment()]).assign(anonymous, now_s=0) is None
    assert Assigner([experiment(unit="request")]).assign(anonymous, now_s=0) is not None


def test_users_of_different_keys_are_different_units() -> None:
    """Two applications' user 1 are not one person."""
    assigner = Assigner([experiment()])
    units = {
        enrolment.unit
        for key in ("k1", "k2")
        if (
            enrolment := assigner.assign(
                Visit(request_id="r", model="auto", user="1", key_id=key), now_s=0
            )
        )
    }
    assert len(units) == 2


@pytest.mark.parametrize(
    ("visit", "now_s", "taken"),
    [
        ({}, 150, True),
        ({}, 99, False),
        ({}, 200, False),
        ({"model": "policy/base"}, 150, False),
        ({"key_id": "other"}, 150, False),
        ({"domain": "text"}, 150, False),
    ],
)
def test_only_the_target_is_taken(visit: dict[str, Any], now_s: float, taken: bool) -> None:
    """Model, key, domain and time must all match."""
    from datetime import UTC, datetime

    assigner = Assigner(
        [
            experiment(
                target=Audience(models=("auto",), keys=("k",), domains=("code",)),
                start=datetime.fromtimestamp(100, UTC),
                stop=datetime.fromtimestamp(200, UTC),
            )
        ]
    )
    asked = Visit(
        **{"request_id": "r", "model": "auto", "user": "u", "key_id": "k", "domain": "code"} | visit
    )
    assert (assigner.assign(asked, now_s=now_s) is not None) == taken


def test_the_holdout_keeps_the_controls_policy_whatever_the_weights() -> None:
    """The same units are held out before and after weights change; all others are in arms."""
    old = Assigner([experiment(holdout=0.1)])
    new = Assigner(
        [experiment(holdout=0.1)], weights={"e": {"arm0": 0.1, "arm1": 0.8, "arm2": 0.1}}
    )
    held = [
        [(found := a.assign(v, now_s=0)) is not None and found.arm == "holdout" for v in visits()]
        for a in (old, new)
    ]
    assert held[0] == held[1]
    assert abs(np.mean(held[0]) - 0.1) < 4 * np.sqrt(0.09 / NUM_UNITS)
    policies = {
        found.policy
        for v in visits()
        if (found := old.assign(v, now_s=0)) and found.arm == "holdout"
    }
    assert policies == {"policy0"}


def test_a_stopped_arm_goes_back_to_the_controls_policy() -> None:
    """Units of a stopped arm get the control's policy and count for no arm; others stay."""
    before = Assigner([experiment()])
    after = Assigner([experiment()], stopped={"e": ["arm2"]})
    for visit in visits(2000):
        was, now = before.assign(visit, now_s=0), after.assign(visit, now_s=0)
        assert was is not None
        assert now is not None
        if was.arm == "arm2":
            assert (now.arm, now.policy) == (None, "policy0")
        else:
            assert now == was


def test_propensities_are_the_arms_shares() -> None:
    """What is logged is the probability of the arm, holdout and adapted weights included."""
    assigner = Assigner(
        [experiment(holdout=0.2)], weights={"e": {"arm0": 0.25, "arm1": 0.25, "arm2": 0.5}}
    )
    logged = {
        found.arm: found.propensity for v in visits(500) if (found := assigner.assign(v, now_s=0))
    }
    assert logged == {
        "holdout": 0.2,
        "arm0": pytest.approx(0.2),
        "arm1": pytest.approx(0.2),
        "arm2": pytest.approx(0.4),
    }
