"""A policy's `fallback`: who takes over where its plan fails before the first token."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from models.pool import load_pool
from policies.errors import PolicyError
from router.catalog.catalog import load_catalog
from tests.router.conftest import Running, running, write_pool

ENGINES: list[dict[str, Any]] = [
    {
        "name": "near",
        "kind": "fake",
        "options": {
            "models": {
                "broken": {"fail_after_tokens": 0},
                "full": {"refuse": True},
                "torn": {"answers": ["begun"], "fail_after_tokens": 3},
                "good": {"answers": ["good"]},
                "spare": {"answers": ["spare"]},
            }
        },
    }
]
MODELS: list[dict[str, Any]] = [
    {"name": name, "engine": "near"} for name in ("good", "broken", "full", "torn", "spare")
]
CASCADE = {"cascade": {"stages": ["broken", "full"], "thresholds": [0.5]}}
POLICIES: dict[str, Any] = {
    "auto": {"kind": "fixed", "plan": "broken", "fallback": ["full", "good", "spare"]},
    "deep": {
        "kind": "fixed",
        "plan": CASCADE,
        "fallback": [{"best": {"candidates": ["good", "spare"]}}],
    },
    "torn": {"kind": "fixed", "plan": "torn", "fallback": ["good"]},
    "lost": {"kind": "fixed", "plan": "full", "fallback": ["broken"]},
    "fine": {"kind": "fixed", "plan": "spare", "fallback": ["good"]},
}


@pytest.fixture(scope="module", name="front")
def failing_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A pool of models that fail in different ways, and two that do not."""
    with running(
        tmp_path_factory.mktemp("pool"), engines=ENGINES, models=MODELS, policies=POLICIES
    ) as server:
        yield server


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "text", "paths"),
    [
        ("auto", "good", ["", "+1", "+2"]),
        ("policy/deep", "good", ["", "0", "1", "+1", "+1.0", "+1.1"]),
        ("policy/fine", "spare", [""]),
    ],
)
def test_the_next_takes_over(
    front: Running, model: str, text: str, paths: list[str], stream: bool
) -> None:
    """In their order, whatever the policy's plan; the answer and the record say who it was."""
    front.forget()
    told = front.chat(model=model, stream=stream, extra_body={"shoal": {"explain": True}})
    if stream:
        chunks = list(told)
        said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        shoal = next(c.shoal for c in chunks if getattr(c, "shoal", None))
    else:
        said, shoal = told.choices[0].message.content, told.shoal
    assert said == text
    assert shoal["members"] == [text]
    assert [stage["path"] for stage in shoal["stages"]] == paths
    record = front.last_record()
    assert record.status == 200
    assert text in str(record.answered_by).split("+")


def test_nobody_takes_over_a_begun_answer(front: Running) -> None:
    """Tokens that a client has cannot be taken back."""
    with pytest.raises(openai.APIError):
        list(front.chat(model="policy/torn", stream=True))


def test_the_first_failure_is_told(front: Running) -> None:
    """Where all fail, the client hears of the plan that was to answer: it is overloaded."""
    with pytest.raises(openai.RateLimitError):
        front.chat(model="policy/lost")


def test_fallbacks_are_counted(front: Running) -> None:
    """By policy, each plan that took over."""
    front.chat(model="policy/deep")
    front.settle()

    def counted() -> bool:
        lines = front.http.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith('shoal_fallbacks_total{policy="deep"')]
        return bool(found) and float(found[0].split()[-1]) >= 1

    front.wait(counted)


@pytest.mark.parametrize(
    ("fallback", "message"),
    [
        ("good", "policies.auto: fallback: 'good' is not a list"),
        (["nobody"], "policies.auto: the plan names the model 'nobody'"),
        ([{"answer": {}}], "policies.auto: .*members"),
    ],
)
def test_fallbacks_are_checked_at_load(tmp_path: Path, fallback: Any, message: str) -> None:
    """A mistake is named before anything is served."""
    policies = {"auto": {"kind": "fixed", "plan": "good", "fallback": fallback}}
    pool = write_pool(tmp_path, engines=ENGINES, models=MODELS, policies=policies)
    with pytest.raises(PolicyError, match=message):
        load_catalog(load_pool(pool))
