"""Pools made of folders of text alone: judged by loss, in nats per byte."""

import json
import math
import random
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from models.downscale.policies import fused_nll
from models.downscale.questions import questions
from models.downscale.recipe import Recipe
from models.downscale.stage import Run
from models.errors import OutputError
from models.pool import load_pool
from policies.base import Query
from policies.outcomes import read_outcomes
from policies.plan import Answer
from policies.registry import build_policy
from tests.models.downscale.tiny_models import run, tiny_recipe

# The pool takes minutes where the machine is busy.
pytestmark = pytest.mark.timeout(1200)

_WORDS = {
    "fish": "salmon trout herring swim river deep cold scales gills net boat catch shoal tide",
    "bread": "flour water yeast oven crust dough knead warm butter loaf slice rye salt bake",
}


def recipe_of_texts(tmp_path):
    """The same recipe on two folders of texts of different words, in all formats, no question."""
    rng = random.Random(5)
    for name, words in _WORDS.items():
        (tmp_path / name).mkdir()
        for number in range(60):
            text = " ".join(rng.choices(words.split(), k=60))
            kind = ("txt", "md", "html")[number % 3]
            page = f"<html><body><nav>Menu</nav><p>{text}</p></body></html>"
            file = tmp_path / name / f"{number}.{kind}"
            file.write_text(page if kind == "html" else text)
        lines = (
            json.dumps({"text": " ".join(rng.choices(words.split(), k=60))}) for _ in range(60)
        )
        (tmp_path / name / "more.jsonl").write_text("\n".join(lines))
    content = tiny_recipe(tmp_path).model_dump()
    content["domains"] = {name: {"corpus": str(tmp_path / name)} for name in _WORDS}
    content["adapt"] |= {"tokens": 20_000, "row_tokens": 64, "general_share": 0.1}
    content["measure"] |= {"router_questions": 24, "test_questions": 16, "max_new_tokens": 4}
    return Recipe.model_validate(content)


@pytest.fixture(scope="module")
def text_pool(tmp_path_factory):
    """The recipe, the pool that was made of it, and what the run said."""
    folder = tmp_path_factory.mktemp("texts")
    made_of = recipe_of_texts(folder)
    return made_of, folder / "out", run(made_of, folder / "out")


@pytest.mark.slow
def test_folders_of_text_are_enough_for_a_whole_pool(text_pool):
    """Members are judged by their loss on held-out texts, per byte; the router and the policies
    learn from it, and the report and the cards say it."""
    _, out, lines = text_pool
    told = re.compile(r"measure/fish: \d\.\d+ nats per byte on 32 test texts")
    assert any(told.fullmatch(line) for line in lines)
    pool = load_pool(out)
    assert set(pool.policies) == {"auto", "cascade", "fused", "best-of"}
    rows = read_outcomes(out / "outcomes.jsonl")
    assert {row.split for row in rows} == {"router", "test"}
    for row in rows:
        assert set(row.scores) == {"fish", "bread", "base"}
        for name, score in row.scores.items():
            assert score == pytest.approx(math.exp(row.grades["loss"][name]))
    results = json.loads((out / "results.json").read_text())
    systems = {system["name"]: system for system in results["systems"]}
    own = {name: systems[name]["loss_by_domain"][name] for name in _WORDS}
    assert all(own[name] < systems["base"]["loss_by_domain"][name] - 0.3 for name in _WORDS)
    routed = systems["routed (by domain)"]
    assert routed["loss"]["value"] == pytest.approx(sum(own.values()) / 2, abs=1e-3)
    # Each domain has its own words: a router that learnt from the losses finds its chunk.
    assert systems["auto"]["loss"]["value"] == pytest.approx(routed["loss"]["value"], abs=0.02)
    fused = systems["fused"]["loss"]["value"]
    assert fused < min(systems[name]["loss"]["value"] for name in _WORDS)
    curve = results["fits"]["curves"]["loss/evidence/all"]
    assert curve["losses"][1] < curve["losses"][0]
    assert not any(key.startswith("error/") for key in results["fits"]["curves"])
    assert "Held-out loss" in (out / "report.html").read_text()
    assert "nats per byte" in (out / "fish/README.md").read_text()
    for spec in pool.policies.values():
        policy = build_policy(spec, folder=pool.folder, models=pool.facts())
        assert policy.decide(Query(text="salmon trout river", prompt_tokens=10)).plan


@pytest.mark.slow
def test_what_a_text_measures_is_what_transformers_computes(text_pool):
    """The loss of an opening's continuation under a chunk, in nats per byte; and that of the fused
    chunks is the weighted mixture's, the weights being the openings' evidence."""
    made_of, out, _ = text_pool
    asked = questions(Run(made_of, out / ".work", report=lambda _: None))
    rows = read_outcomes(out / "outcomes.jsonl")
    logs = {}
    for name in _WORDS:
        model = AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.float32)
        tokens = torch.tensor([asked[3].conversation.tokens])
        with torch.no_grad():
            every = model(tokens).logits[0, :-1].log_softmax(-1)
        told = every.gather(1, tokens[0, 1:, None])[:, 0].double().numpy()
        at = asked[3].conversation.is_answer.index(True) - 1
        logs[name] = told[:at].sum(), told[at:]
        per_byte = told[at:].sum() / len(asked[3].answer.encode())
        assert rows[3].grades["loss"][name] == pytest.approx(per_byte, abs=2e-4)
    plan = Answer(members=tuple(_WORDS), weighting="evidence", temperature=5.0)
    prompts = np.array([[prompt for prompt, _ in logs.values()]])
    answers = np.stack([answer for _, answer in logs.values()], axis=-1)[None]
    weights = np.exp((prompts[0] - prompts.max()) / 5.0)
    mixture = np.log(np.exp(answers[0]) @ (weights / weights.sum()))
    found = fused_nll([plan], tuple(_WORDS), answers, prompts)
    assert found == pytest.approx([-mixture.sum()])


def test_a_pool_within_its_own_corpus_is_refused(tmp_path):
    """The next run would read the report of this one."""
    with pytest.raises(OutputError, match=r"is within .*fish, which the run reads"):
        run(recipe_of_texts(tmp_path), tmp_path / "fish" / "out")
