"""What a row counts for."""

from __future__ import annotations

from typing import Any

import pytest

from policies.footprint import Cost
from router.ledger.writer import row_of
from router.metrics.counting import tally
from router.metrics.families import BY_NAME, SUM
from tests.router.ledger.records import record

COSTS = {
    "math": Cost(usd=0.1, wh=0.2, gco2e=0.3, method="measured:rapl"),
    "code": Cost(usd=1.0, wh=2.0, gco2e=3.0),
}


def counts(**fields: Any) -> dict[tuple[str, ...], float]:
    """Return what one row counts for, without the prefix of names."""
    found = tally([row_of(record(**fields))])
    for name, *labels in found:
        family = BY_NAME[name]
        assert len(labels) == len(family.labels) + bool(family.buckets), name
    return {(name.removeprefix("shoal_"), *rest): value for (name, *rest), value in found.items()}


def test_every_member_pays_for_itself() -> None:
    """Tokens, money, energy and carbon go to the members, under policy, arm and method."""
    found = counts(costs=COSTS, experiment="race", arm="new")
    who = ("learned", "race/new")
    assert found["requests_total", *who, "200"] == 1
    for model, cost in COSTS.items():
        assert found["model_requests_total", model, *who] == 1
        assert found["tokens_total", model, *who, "prompt"] == 10
        assert found["tokens_total", model, *who, "output"] == 20
        assert found["cost_usd_total", model, *who] == cost.usd
        method = cost.method or "none"
        assert found["energy_wh_total", model, *who, method] == cost.wh
        assert found["carbon_gco2e_total", model, *who, method] == cost.gco2e
    assert not any(name == "errors_total" for name, *_ in found)


def test_an_engines_joules_are_per_token_that_it_wrote() -> None:
    """Two fused members write one token together; what another engine did counts for that one."""
    stages = (
        {"path": "", "outcome": "ok"},
        {"path": "0", "outcome": "ok", "members": ["math"], "engine": "a", "output_tokens": 8},
        {"path": "1", "outcome": "ok", "members": ["code", "tall"], "engine": "b",
         "output_tokens": 4},
    )  # fmt: skip
    costs = {
        "math": Cost(wh=1.0, method="measured:rapl"),
        "code": Cost(wh=2.0, method="measured:nvml"),
        "tall": Cost(wh=3.0, method="measured:nvml"),
    }
    found = counts(stages=stages, costs=costs)
    name = "energy_joules_per_output_token"
    assert found[name, "a", "measured:rapl", SUM] == pytest.approx(3600 / 8)
    assert found[name, "b", "measured:nvml", SUM] == pytest.approx(5 * 3600 / 4)


def test_times_fall_into_their_buckets() -> None:
    """A stream has three times; tokens of several choices came side by side."""
    found = counts(latency_s=1.05, ttft_s=0.05, output_tokens=42, num_choices=2)
    assert found["request_duration_seconds", "learned", "1.28"] == 1
    assert found["request_duration_seconds", "learned", SUM] == 1.05
    assert found["time_to_first_token_seconds", "learned", "0.06"] == 1
    assert found["time_per_output_token_seconds", "learned", "0.05"] == 1
    assert found["time_per_output_token_seconds", "learned", SUM] == pytest.approx(0.05)


@pytest.mark.parametrize("fields", [{"stream": False}, {"ttft_s": None}])
def test_only_streams_have_a_first_token(fields: dict[str, Any]) -> None:
    """A whole answer's first text is its last: it has no time to first token."""
    names = {name for name, *_ in counts(**fields)}
    assert "request_duration_seconds" in names
    assert not names & {"time_to_first_token_seconds", "time_per_output_token_seconds"}


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"status": 503, "error": "engine_failed"}, "engine_failed"),
        ({"status": 499}, "client_left"),
        ({"status": 413, "error": None}, "http_413"),
        ({"status": 200, "error": "deadline_exceeded"}, "deadline_exceeded"),
    ],
)
def test_errors_have_a_type(fields: dict[str, Any], kind: str) -> None:
    """What has no code of its own gets one; a stream that broke off counts too."""
    assert counts(**fields)["errors_total", kind] == 1


def test_failed_requests_have_no_duration() -> None:
    """Quick refusals must not flatter the latency."""
    names = {name for name, *_ in counts(status=429, error="overloaded")}
    assert "requests_total" in names
    assert "request_duration_seconds" not in names


@pytest.mark.parametrize(
    ("plan", "shape"),
    [
        ({"answer": {"members": ["a"]}}, "answer"),
        ({"answer": {"members": ["a", "b"]}}, "fused"),
        ({"cascade": {"stages": []}}, "cascade"),
        ({"best": {"candidates": []}}, "best"),
    ],
)
def test_plans_have_a_shape(plan: dict[str, Any], shape: str) -> None:
    """The outermost combinator; an answer of several members is fused."""
    assert counts(plan=plan)["plans_total", "learned", shape] == 1


def run(path: str, outcome: str, *members: str) -> dict[str, Any]:
    """Return a stage as the ledger has it; without members it is a cascade."""
    kind = {"members": list(members)} if members else {"combinator": "cascade"}
    return {"path": path, "outcome": outcome, **kind}


def test_cascades_tell_how_far_they_went_and_why() -> None:
    """Three stages: one rejected, one failed, and the fused last one answered."""
    stages = (
        run("", "ok"), run("0", "rejected", "a"), run("1", "failed", "b"), run("2", "ok", "a", "b")
    )  # fmt: skip
    found = counts(stages=stages)
    assert found["cascade_stages_total", "learned", "3"] == 1
    assert found["cascade_escalations_total", "learned", "rejected"] == 1
    assert found["cascade_escalations_total", "learned", "failed"] == 1
    assert found["ensemble_members", "learned", "2.0"] == 1
    assert found["ensemble_members", "learned", SUM] == 2


def test_a_cascade_inside_a_rejected_branch_answers_nothing() -> None:
    """Nested: both cascades count, and only what stands under accepted nodes was the answer."""
    stages = (
        run("", "ok"), run("0", "rejected"), run("0.0", "ok", "a", "b", "c"), run("1", "ok", "d")
    )  # fmt: skip
    found = counts(stages=stages)
    assert found["cascade_stages_total", "learned", "2"] == 1
    assert found["cascade_stages_total", "learned", "1"] == 1
    assert found["ensemble_members", "learned", SUM] == 1


def test_every_choice_counts_for_itself() -> None:
    """Two choices of one request are two answers."""
    stages = tuple(
        {**run("", "ok", *members), "choice": i} for i, members in enumerate(["ab", "c"])
    )
    found = counts(stages=stages, num_choices=2)
    assert found["ensemble_members", "learned", SUM] == 3


def test_confidence_is_the_best_prediction() -> None:
    """0.9 of {0.9, 0.4} falls into the bucket up to 0.9; a policy without scores has none."""
    assert counts()["router_confidence_ratio", "learned", "0.9"] == 1
    assert not any(name == "router_confidence_ratio" for name, *_ in counts(scores={}))


def test_unfamiliar_queries_are_counted() -> None:
    """Those unlike the training's count one, others none; a policy that cannot tell has none."""
    series = ("unfamiliar_requests_total", "learned")
    assert counts(familiar=False)[series] == 1
    assert counts(familiar=True)[series] == 0
    assert series not in counts(familiar=None)


def test_cached_prompt_tokens_are_counted() -> None:
    """What an engine had kept of a prompt; an engine that cannot tell has none."""
    series = ("cached_prompt_tokens_total", "learned")
    assert counts(cached_tokens=7)[series] == 7
    assert series not in counts(cached_tokens=None)


def test_shadows_cost_but_are_no_requests() -> None:
    """What a shadow answered unseen counts for its models, under its name, and nowhere else."""
    found = counts(request_id="rival/req-1", endpoint="shadow", costs=COSTS)
    assert found["cost_usd_total", "math", "learned", "shadow/rival"] == 0.1
    assert {name for name, *_ in found} == {
        "model_requests_total", "tokens_total", "cost_usd_total", "energy_wh_total",
        "carbon_gco2e_total",
    }  # fmt: skip


def test_a_refused_request_counts_once() -> None:
    """Before anything is known of a request, it is one request and one error."""
    found = counts(
        status=401,
        error="invalid_api_key",
        policy=None,
        plan=None,
        members={},
        scores={},
        stages=(),
    )
    assert found == {
        ("requests_total", "none", "none", "401"): 1,
        ("errors_total", "invalid_api_key"): 1,
    }
