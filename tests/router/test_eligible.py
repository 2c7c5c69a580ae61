"""Policies choose among the members that can take a request."""

import asyncio
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from models.answer_format import Tools
from models.engines.base import SamplingOptions
from models.pool import load_pool
from policies.base import Decision, Policy, Query
from policies.plan import Answer, Best, Cascade, Plan
from router.catalog.catalog import load_catalog
from router.eligible import among_able, without
from router.executor.task import Prompt
from router.openai_api.endpoint import Ask
from tests.models.engines.remote.bad_server import answer, in_thread
from tests.router.conftest import Running, running, write_pool

CHAT: Any = [{"role": "user", "content": "hello"}]
TOOL: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def plan_of(*names: str, **fields: Any) -> Answer:
    """Return an answer of `names`."""
    return Answer(members=names, **fields)


@pytest.mark.parametrize(
    ("plan", "left"),
    [
        (plan_of("a"), plan_of("a")),
        (plan_of("x"), None),
        (plan_of("a", "x", "b", weights=(1, 2, 3)), plan_of("a", "b", weights=(1, 3))),
        (plan_of("a", "x", weights=(0, 2)), plan_of("a")),
        (plan_of("a", "x", rule="gated"), None),
        (
            Best(candidates=(plan_of("a"), plan_of("x"), plan_of("b"))),
            Best(candidates=(plan_of("a"), plan_of("b"))),
        ),
        (Best(candidates=(plan_of("x"), plan_of("b"))), plan_of("b")),
        (
            Cascade(
                stages=(plan_of("x"), plan_of("a"), plan_of("x"), plan_of("b"), plan_of("x")),
                thresholds=(0.1, 0.2, 0.3, 0.4),
                timeouts_s=(1, 2, 3, 4),
            ),
            Cascade(stages=(plan_of("a"), plan_of("b")), thresholds=(0.2,), timeouts_s=(2,)),
        ),
        (Cascade(stages=(plan_of("x"), plan_of("a")), thresholds=(0.1,)), plan_of("a")),
        (Best(candidates=(plan_of("x"), Best(candidates=(plan_of("x"),)))), None),
    ],
)
def test_plans_are_cut_down(plan: Plan, left: Plan | None) -> None:
    """What is left keeps its weights, thresholds and times; nothing of nobody."""
    assert without(plan, {"x"}) == left


@pytest.fixture(scope="module", name="front")
def mixed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A pool of a model that calls nothing, one of a short context, and one on another server."""
    with (
        in_thread(answer("far")) as upstream,
        running(
            tmp_path_factory.mktemp("pool"),
            engines=[
                {"name": "near", "kind": "fake", "options": {}},
                {"name": "far", "kind": "remote", "options": {"base_url": upstream.url}},
            ],
            models=[
                {"name": "small", "engine": "near"},
                {"name": "big", "engine": "far", "remote": {"context_tokens": 1000}},
            ],
            policies={
                "auto": {"kind": "fixed", "plan": {"best": {"candidates": ["small", "big"]}}},
                "near": {"kind": "fixed", "plan": "small"},
                "climb": {
                    "kind": "fixed",
                    "plan": {"cascade": {"stages": ["small", "big"], "thresholds": [0.0]}},
                },
            },
        ) as server,
    ):
        yield server


@pytest.mark.parametrize("model", ["auto", "policy/climb"])
def test_tools_go_to_who_can_call_them(front: Running, model: str) -> None:
    """A member without tools is not even asked, and the explanation says why."""
    told = front.chat(model=model, messages=CHAT, extra_body={"shoal": {"explain": True}}).shoal
    assert {name for stage in told["stages"] for name in stage.get("members", ())} >= {"small"}
    told = front.chat(
        model=model, messages=CHAT, tools=[TOOL], extra_body={"shoal": {"explain": True}}
    ).shoal
    assert told["plan"]["answer"]["members"] == ["big"]
    assert [stage["members"] for stage in told["stages"]] == [["big"]]
    assert "cannot call any" in told["details"]["left_out"]["small"]
    assert "without small" in told["reason"]


def test_long_prompts_go_to_who_can_hold_them(front: Running) -> None:
    """A member whose context is too short gives way to the others."""
    told = front.chat(
        model="auto",
        messages=[{"role": "user", "content": "x" * 8000}],
        extra_body={"shoal": {"explain": True}},
    ).shoal
    assert told["members"] == ["small"]
    assert "context holds 1000" in told["details"]["left_out"]["big"]


def test_token_ids_go_to_who_reads_them_alike(front: Running) -> None:
    """Those of the pool's first model mean nothing to another server's; its own are its own."""
    told = front.client.completions.create(
        model="auto", prompt=[104, 105], extra_body={"shoal": {"explain": True}}
    )
    assert told.shoal["members"] == ["small"]  # type: ignore[attr-defined]
    assert "mean something else" in told.shoal["details"]["left_out"]["big"]  # type: ignore[attr-defined]


def test_what_nobody_can_take_is_refused(front: Running) -> None:
    """Where no member of the policy can, and where the client names one, the 400 says why."""
    for model in ("policy/near", "small"):
        with pytest.raises(openai.BadRequestError, match="cannot call any") as caught:
            front.chat(model=model, messages=CHAT, tools=[TOOL])
        assert caught.value.param == "tools"


class Choosy(Policy):
    """Would have `small`, and thinks better of `big` than of `other`."""

    def decide(self, query: Query) -> Decision:
        """Return the model that cannot call anything."""
        return Decision(plan=plan_of("small"), scores={"other": 0.2, "big": 0.7}, reason="so")

    def plans(self) -> Iterable[Plan]:
        """Return everything that it may choose."""
        return [plan_of("small"), plan_of("other"), plan_of("big")]


def test_who_stands_in_is_the_best_of_the_policy(tmp_path: Path) -> None:
    """Where nobody of the plan can, the able model takes it that the policy thinks best of."""
    pool = load_pool(
        write_pool(
            tmp_path,
            engines=[
                {"name": "near", "kind": "fake", "options": {}},
                {"name": "far", "kind": "remote", "options": {"base_url": "http://h/v1"}},
            ],
            models=[
                {"name": "small", "engine": "near"},
                {"name": "other", "engine": "far", "remote": {}},
                {"name": "big", "engine": "far", "remote": {}},
            ],
            policies={"auto": {"kind": "fixed", "plan": "small"}},
        )
    )
    prompt = Prompt(messages=CHAT, tools=Tools(functions=(TOOL,)))
    ask = Ask(model="auto", prompts=(prompt,), sampling=SamplingOptions())
    policy = Choosy()
    chosen = asyncio.run(
        among_able(
            policy.decide(Query(text="hello")),
            policy,
            pool=load_catalog(pool).members,
            ask=ask,
            prompt=prompt,
        )
    )
    assert chosen.plan == plan_of("big")
    assert list(chosen.details["left_out"]) == ["small"]


def test_a_fusion_calls_in_one_way(tmp_path: Path) -> None:
    """Members that write calls otherwise than the first leave a fusion that is offered tools."""
    engines = [{"name": "near", "kind": "fake"}]
    models = [
        {"name": name, "engine": "near", "tools": form}
        for name, form in (("a", "hermes"), ("b", "pythonic"), ("c", "hermes"))
    ]
    fused = {"answer": {"members": ["a", "b", "c"]}}
    policies = {"auto": {"kind": "fixed", "plan": fused}}
    with running(tmp_path, engines=engines, models=models, policies=policies) as front:
        explain: Any = {"shoal": {"explain": True}}
        answer = front.chat(model="auto", messages=CHAT, tools=[TOOL], extra_body=explain)
        assert answer.shoal["members"] == ["a", "c"]
        assert "different ways" in answer.shoal["details"]["left_out"]["b"]
        with pytest.raises(openai.BadRequestError, match="different ways"):
            front.chat(
                model="a", messages=CHAT, tools=[TOOL], extra_body={"shoal": {"plan": fused}}
            )
