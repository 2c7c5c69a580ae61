"""The shipped pool's cascade, fusion and best-of, and nested plans, through the openai client."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from models.pool import DEFAULT_POOL, load_pool
from policies.base import members_of
from policies.cascade.learned import load_cascade
from policies.frugal import Frugal
from policies.outcomes import read_outcomes
from tests.router.conftest import Running, running

OUTCOMES = read_outcomes(DEFAULT_POOL / "outcomes.jsonl", split="test")
QUESTIONS = [outcome.query for outcome in OUTCOMES[:: len(OUTCOMES) // 4]][:4]
MODELS = load_pool(DEFAULT_POOL).models
BASE = "base"
CHUNKS = [model.name for model in MODELS if len(model.spec.domains) == 1]
NESTED = {
    "cascade": {
        "stages": [
            CHUNKS[0],
            {"best": {"candidates": CHUNKS[:3], "select": "scorer", "scorer": "cascade"}},
            {"answer": {"members": CHUNKS, "weights": "evidence", "temperature": 4}},
        ],
        "thresholds": [0.9, 0.8],
        "scorer": "cascade",
    }
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The default pool, served in this process."""
    content = yaml.safe_load((DEFAULT_POOL / "pool.yaml").read_text())
    for model in content["models"]:
        if not model["checkpoint"].startswith("package:"):
            model["checkpoint"] = str(DEFAULT_POOL / model["checkpoint"])
        if model["name"] == CHUNKS[0]:
            model["sampling"] = {"temperature": 0}
        if model["name"] == CHUNKS[1]:
            copy = tmp_path_factory.mktemp("checkpoint") / "greedy"
            model["checkpoint"] = str(shutil.copytree(model["checkpoint"], copy))
            facts = json.loads((copy / "generation_config.json").read_text())
            (copy / "generation_config.json").write_text(json.dumps(facts | {"temperature": 0}))
    policies = {name: _absolute(spec) for name, spec in content.pop("policies").items()}
    with running(tmp_path_factory.mktemp("pool"), policies=policies, **content) as server:
        yield server


def _absolute(spec: Any) -> Any:
    if isinstance(spec, dict):
        return {
            key: str(DEFAULT_POOL / value) if key == "path" else _absolute(value)
            for key, value in spec.items()
        }
    return spec


@pytest.mark.parametrize("name", CHUNKS[:2])
def test_a_model_draws_as_it_says_unless_the_request_does(served: Running, name: str) -> None:
    """Without a temperature, by its pool's settings or its checkpoint's, the answer is the
    likeliest, again and again; with one it varies."""

    def answers(**fields: Any) -> set[str]:
        asked = [served.chat("Tell me a tale.", name, max_tokens=24, **fields) for _ in "1234"]
        return {answer.choices[0].message.content for answer in asked}

    assert len(answers()) == 1
    assert len(answers(temperature=2)) > 1


def both(served: Running, question: str, model: str, **shoal: Any) -> tuple[str, dict[str, Any]]:
    """Ask whole and streaming; return the text, the same both ways, and the shoal object."""
    fields = {"temperature": 0, "max_tokens": 32, "extra_body": {"shoal": shoal}}
    whole = served.chat(question, model, **fields)
    *chunks, last = served.chat(
        question, model, stream=True, stream_options={"include_usage": True}, **fields
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    stable = ["policy", "plan", "members"]
    if not any(stage["outcome"] == "hopeless" for stage in whole.shoal.get("stages", ())):
        # How many tokens a stopped stage had written by then is a matter of time.
        stable.append("tokens")
        assert last.usage == whole.usage
    assert [last.shoal[key] for key in stable] == [whole.shoal[key] for key in stable]
    return text, whole.shoal


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_cascade_answers(served: Running, question: str) -> None:
    """What ran, with its scores, is told; every stage that ran is paid for."""
    _, shoal = both(served, question, "policy/cascade", explain=True)
    assert shoal["policy"] == "cascade"
    ran = [stage for stage in shoal["stages"] if stage.get("output_tokens")]
    assert ran[-1]["outcome"] == "ok"
    assert shoal["members"] == ran[-1]["members"]
    assert all(stage["outcome"] in ("rejected", "hopeless") for stage in ran[:-1])
    assert sum(stage["output_tokens"] * len(stage["members"]) for stage in ran) == sum(
        tokens["output"] for tokens in shoal["tokens"].values()
    )
    assert set(shoal["scores"]) == {BASE, *CHUNKS}


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_fusion_answers(served: Running, question: str) -> None:
    """Prior times evidence gives weights that sum to one; they are in the response."""
    _, shoal = both(served, question, "policy/fused", explain=True)
    assert shoal["plan"]["answer"]["weighting"] == "evidence"
    prior = shoal["plan"]["answer"]["weights"]
    assert sum(prior) == pytest.approx(1)
    assert sum(shoal["weights"]) == pytest.approx(1)
    assert shoal["weights"] != pytest.approx(prior, abs=1e-6)


@pytest.mark.parametrize("question", QUESTIONS[:2])
def test_the_best_of_answers(served: Running, question: str) -> None:
    """All candidates run side by side; the one likeliest to be right answers."""
    _, shoal = both(served, question, "policy/best-of", explain=True)
    candidates = [stage for stage in shoal["stages"] if "members" in stage]
    assert [stage["members"] for stage in candidates] == [[name] for name in CHUNKS]
    winner = max(candidates, key=lambda stage: stage["score"])
    assert winner["members"] == shoal["members"]


def test_the_ranker_compares_in_pairs(served: Running) -> None:
    """With the ranker, every candidate's score is the share of its pairs that it wins."""
    plan = {"best": {"candidates": CHUNKS, "select": "ranker", "scorer": "cascade"}}
    _, shoal = both(served, QUESTIONS[0], "auto", plan=plan, explain=True)
    scores = [stage["score"] for stage in shoal["stages"] if "members" in stage]
    assert sum(scores) == pytest.approx(len(CHUNKS) / 2, abs=1e-4)


@pytest.mark.parametrize("question", QUESTIONS[:2])
def test_an_explicit_nested_plan_answers(served: Running, question: str) -> None:
    """A cascade over a best-of and a fusion, with the pool's scorer, as the client wrote it."""
    _, shoal = both(served, question, "auto", plan=NESTED, explain=True)
    assert shoal["policy"] is None
    stages = shoal["plan"]["cascade"]["stages"]
    assert stages[1]["best"]["scorer"] == "cascade"
    # The open weights got the default policy's predictions or stayed uniform.
    assert stages[2]["answer"]["weighting"] == "evidence"
    assert shoal["stages"][0]["outcome"] == "ok"


@pytest.mark.parametrize(
    ("shoal", "param", "said"),
    [
        ({"policy": "nobody"}, "shoal.policy", "'nobody' is unknown"),
        ({"plan": {"answer": {"members": ["eve"]}}}, "shoal.plan", "'eve'"),
        ({"plan": {"answer": {"members": [BASE], "weights": "luck"}}}, "shoal.plan", "luck"),
        (
            {"plan": {"best": {"candidates": [BASE], "select": "ranker"}}},
            "shoal.plan",
            "'confidence' cannot rank answers in pairs; allowed are cascade",
        ),
        (
            {"plan": {"cascade": {"stages": [BASE], "thresholds": [], "scorer": "oracle"}}},
            "shoal.plan",
            "'oracle' is unknown; allowed are cascade, confidence",
        ),
        ({"quality_floor": 2}, "shoal.quality_floor", "less than or equal to 1"),
        ({"max_usd": -1}, "shoal.max_usd", "greater than or equal to 0"),
        ({"max_gco2e": "little"}, "shoal.max_gco2e", "valid number"),
    ],
)
def test_invalid_extensions_name_their_field(
    served: Running, shoal: dict[str, Any], param: str, said: str
) -> None:
    """A bad policy, plan, floor or ceiling is a 400 that names the field."""
    with pytest.raises(openai.BadRequestError) as caught:
        served.chat("1 + 1 = ?", "auto", extra_body={"shoal": shoal})
    assert caught.value.param == param
    assert said in str(caught.value)


def test_the_shipped_cascade_fits_the_shipped_pool() -> None:
    """The file names only models of the pool, and its chain pays within 40% of always-base."""
    file = Path(DEFAULT_POOL) / "cascade.npz"
    cascade = load_cascade(file)
    assert set(members_of(Frugal(cascade))) <= {*CHUNKS, BASE}
    rates = load_pool(DEFAULT_POOL).facts()[BASE].rates
    always_base_usd = [
        rates.footprint(outcome.prompt_tokens or 0, outcome.output_tokens[BASE]).usd
        for outcome in read_outcomes(DEFAULT_POOL / "outcomes.jsonl", split="router")
    ]
    assert Frugal(cascade).point.cost <= 0.4 * sum(always_base_usd) / len(always_base_usd)
    assert file.stat().st_size < 2**20


def test_auto_explains_itself(served: Running) -> None:
    """Asked to, the response tells every member's predicted quality and the nearest cluster."""
    question = QUESTIONS[0]
    _, shoal = both(served, question, "auto", explain=True)
    assert {member["model"] for member in shoal["details"]["members"]} >= set(CHUNKS)
    assert shoal["details"]["nearest_cluster"]["num_training_queries"] > 0
    assert shoal["details"]["strongest_ngrams"]
    _, plain = both(served, question, "auto")
    assert plain["plan"] == shoal["plan"]
    assert "details" not in plain
