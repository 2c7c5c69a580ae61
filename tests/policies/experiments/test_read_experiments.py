"""Configuration of experiments: what is read, and what is refused with which words."""

from __future__ import annotations

from typing import Any

import pytest

from policies.errors import ExperimentError
from policies.experiments.experiment import Arm, Experiment
from policies.experiments.read import place, read_experiments

POLICIES = ("learned", "cascade", "base")


def spec(**changes: Any) -> dict[str, Any]:
    """A sound experiment's configuration, with `changes`."""
    return {
        "arms": {
            "cascade": {"policy": "cascade", "weight": 0.5},
            "learned": {"policy": "learned", "weight": 0.5},
        },
        **changes,
    }


def test_a_whole_experiment_is_read() -> None:
    """Every key of the configuration arrives, and the first arm is the control."""
    [read] = read_experiments(
        {
            "new-router": spec(
                unit="session",
                primary={"metric": "quality", "minimum_effect": 0.03},
                secondary=["usd", "latency_s"],
                guardrails=[{"metric": "error_rate", "limit": 0.02}],
                traffic=0.5,
                holdout=0.1,
                target={"models": ["auto"], "keys": ["k1"], "domains": ["code"]},
                start="2026-11-01",
                stop="2026-12-01T12:00:00+01:00",
                covariates=["prompt_tokens"],
            )
        },
        policies=POLICIES,
    )
    assert read.name == "new-router"
    assert read.control_arm == Arm(name="cascade", policy="cascade", weight=0.5)
    assert [arm.name for arm in read.treatments] == ["learned"]
    assert read.direction == "increase"
    assert read.stop_s - read.start_s == 30 * 86_400 + 11 * 3600


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": {"a": {"policy": "base", "weight": 1}}}, "at least two arms"),
        (
            {
                "arms": {
                    "a": {"policy": "base", "weight": 0.5},
                    "b": {"policy": "cascade", "weight": 0.4},
                }
            },
            "sum to 0.9, not to 1",
        ),
        (
            {
                "arms": {
                    "a": {"policy": "base", "weight": 0.5},
                    "b": {"policy": "oracle", "weight": 0.5},
                }
            },
            "arms.b.policy: 'oracle' is unknown; allowed are base, cascade, learned",
        ),
        (
            {
                "arms": {
                    "a": {"policy": "base", "weight": -0.5},
                    "b": {"policy": "cascade", "weight": 1.5},
                }
            },
            "arms.a.weight: -0.5 is refused: it should be greater than or equal to 0",
        ),
        (
            {
                "arms": {
                    "a": {"policy": "base", "weight": 0.5, "colour": "red"},
                    "b": {"policy": "cascade", "weight": 0.5},
                }
            },
            "arms.a: the key 'colour' is unknown; allowed are policy, weight",
        ),
        (
            {"arms": {"a": {"policy": "base"}, "b": {"policy": "base"}}},
            "arms.a: the key 'weight' is missing",
        ),
        ({"arms": ["a", "b"]}, "is not a mapping from names"),
        ({"trafic": 0.5}, "the key 'trafic' is unknown; allowed are arms, unit"),
        ({"unit": "cookie"}, "unit: 'cookie'"),
        ({"traffic": 0}, "traffic: 0 is refused: it should be greater than 0"),
        ({"control": "best"}, "control: 'best' is not an arm; allowed are cascade, learned"),
        ({"primary": {"metric": "clicks"}}, "primary.metric: 'clicks' is unknown"),
        ({"primary": {"minimum_effect": 0}}, "minimum_effect: 0.0 is not between 0 and 1"),
        ({"primary": {"minimum_effect": 5}}, "primary.minimum_effect: 5.0 is not between 0 and 1"),
        (
            {"primary": {"metric": "usd", "minimum_effect": float("inf"), "relative": True}},
            "minimum_effect: inf is not between 0 and inf",
        ),
        (
            {"metrics": {"refund": {"direction": "decrease", "minimum_effect": float("nan")}}},
            "metrics.refund.minimum_effect: nan",
        ),
        ({"metrics": {"my metric": {"direction": "increase"}}}, "'my metric' is no name that"),
        ({"metrics": {"": {"direction": "increase"}}}, "'' is no name that feedback can bring"),
        ({"metrics": {"USD": {"direction": "increase"}}}, "metrics: the name 'USD' is taken"),
        ({"metrics": {"unit": {"direction": "increase"}}}, "metrics: the name 'unit' is taken"),
        (
            {"metrics": {name: {"direction": "increase"} for name in ("tips", "Tips")}},
            "metrics: the name 'tips' is taken",
        ),
        (
            {"metrics": {"r": {"direction": "decrease", "ratio": ["usd", "usd"]}}},
            "metrics.r.ratio: a ratio is of two metrics",
        ),
        (
            {
                "metrics": {
                    "r": {"direction": "decrease", "kind": "binary", "ratio": ["usd", "tokens"]}
                }
            },
            "metrics.r.ratio: a ratio is of two metrics",
        ),
        ({"segments": ["key", "key"]}, "segments: 'key' is there twice"),
        ({"secondary": ["usd", "wh", "usd"]}, "secondary: 'usd' is there twice"),
        ({"covariates": ["prompt_tokens"] * 2}, "covariates: 'prompt_tokens' is there twice"),
        (
            {"guardrails": [{"metric": "usd", "limit": 1}, {"metric": "usd", "limit": 2}]},
            "guardrails: 'usd' is there twice",
        ),
        ({"switchback": {"block_minutes": 30}}, "the unit is 'user'; it goes with unit: \"block\""),
        (
            {
                "arms": {
                    "a/b": {"policy": "base", "weight": 0.5},
                    "c": {"policy": "cascade", "weight": 0.5},
                }
            },
            "arms: 'a/b' is no name for an arm",
        ),
        (
            {"unit": "block", "switchback": {"block_minutes": float("inf")}},
            "block_minutes: inf is refused: it should be less than or equal to 527040",
        ),
        ({"guardrails": [{"metric": "usd", "limit": -1}]}, "guardrails.0.limit: -1 is refused"),
        ({"start": "2026-02-02", "stop": "2026-02-01"}, "is not after"),
        (
            {"covariates": ["mood"]},
            "covariates.0: 'mood' is refused: it should be 'prompt_tokens' or 'expected_quality'",
        ),
        ({"holdout": 1}, "holdout: 1 is refused: it should be less than 1"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], words: str) -> None:
    """The message names the experiment, the key, the value and what is allowed."""
    with pytest.raises(ExperimentError) as refusal:
        read_experiments({"e": spec(**changes)}, policies=POLICIES)
    assert words in str(refusal.value)
    assert str(refusal.value).startswith("experiments.e")


def test_experiments_of_one_layer_stand_beside_each_other() -> None:
    """Shares are placed one after another, around explicit offsets."""
    experiments = read_experiments(
        {"a": spec(traffic=0.5, offset=0.25), "b": spec(traffic=0.2), "c": spec(traffic=0.2)},
        policies=POLICIES,
    )
    assert place(experiments) == {
        "a": (0.25, 0.75),
        "b": (0.0, 0.2),
        "c": pytest.approx((0.75, 0.95)),
    }


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ({"traffic": 0.5}, {"traffic": 0.6}, r"experiments\.b\.traffic: 0\.6 does not fit"),
        ({"offset": 0.2}, {"offset": 0.4}, "must not overlap"),
        ({}, {"layer": "second"}, "overlaps the layer 'default' of 'a'"),
        ({}, {"unit": "session"}, "a layer has one unit"),
    ],
)
def test_two_that_compete_for_requests_are_refused(
    one: dict[str, Any], other: dict[str, Any], words: str
) -> None:
    """A request follows one policy: shares, offsets, layers and units must leave it one."""
    both = {"a": spec(**{"traffic": 0.3, **one}), "b": spec(**{"traffic": 0.3, **other})}
    with pytest.raises(ExperimentError, match=words):
        read_experiments(both, policies=POLICIES)


@pytest.mark.parametrize(
    "apart",
    [
        {"target": {"keys": ["k2"]}},
        {"target": {"models": ["policy/cascade"], "keys": ["k1"]}},
        {"start": "2026-07-01", "target": {"keys": ["k1"]}},
    ],
)
def test_layers_with_traffic_of_their_own_may_each_take_all(apart: dict[str, Any]) -> None:
    """Different keys, models or times keep experiments apart, whatever their layers."""
    first = spec(target={"keys": ["k1"]}, stop="2026-07-01")
    experiments = read_experiments(
        {"a": first, "b": spec(layer="second", **apart)}, policies=POLICIES
    )
    assert set(place(experiments).values()) == {(0.0, 1.0)}


def test_the_fingerprint_follows_what_must_not_change() -> None:
    """Arms, their policies' contents and the metric change it; weights and traffic do not."""
    policies = {"a": "kind: fixed", "b": "kind: learned"}

    def fingerprint(contents: dict[str, str] = policies, **changes: Any) -> str:
        arms = (Arm(name="x", policy="a", weight=0.5), Arm(name="y", policy="b", weight=0.5))
        return Experiment(**{"name": "e", "arms": arms, **changes}).fingerprint(contents)

    heavier = (Arm(name="x", policy="a", weight=0.9), Arm(name="y", policy="b", weight=0.1))
    renamed = (Arm(name="x", policy="a", weight=0.5), Arm(name="z", policy="b", weight=0.5))
    assert fingerprint() == fingerprint(arms=heavier, traffic=0.5)
    assert fingerprint() != fingerprint(arms=renamed)
    assert fingerprint() != fingerprint({**policies, "b": "kind: learned, file: new"})
    assert fingerprint() != fingerprint(unit="request")
