"""`shoal learn --read`: a policy that looks before it answers is learned, installed and served."""

import asyncio
import random
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from models.pool import DEFAULT_POOL, load_pool
from policies.base import Query
from policies.cascade.base import Reading
from policies.outcome_sets import TEST, divide
from policies.outcomes import Outcome, read_outcomes, write_outcomes
from policies.plan import Cascade
from router.catalog.catalog import load_catalog
from router.cli.main import app
from router.learning.asking import Reply, ask_pool, read_prompts
from router.learning.learn import LearnSettings
from router.learning.learn import learn as learn_from
from tests.router.conftest import write_pool

MODELS = {"numerals": 1, "base": 8}
DOMAINS = ("numerals", "conversion", "text")


def pool_at(folder: Path) -> Path:
    """Write a pool of a cheap chunk and the dear base."""
    engines = [
        {"name": name, "kind": "stacked", "device": "cpu", "dtype": "float32"} for name in MODELS
    ]
    models = [
        {
            "name": name,
            "engine": name,
            "checkpoint": str(DEFAULT_POOL / name),
            "usd_per_million_input_tokens": usd,
            "usd_per_million_output_tokens": 3 * usd,
        }
        for name, usd in MODELS.items()
    ]
    policies = {"auto": {"kind": "fixed", "plan": "base"}}
    return write_pool(folder, engines=engines, models=models, policies=policies)


def rows() -> list[Outcome]:
    """Return 300 outcomes of three domains, of which the chunk knows one."""
    every = read_outcomes(DEFAULT_POOL / "outcomes.jsonl", split="router")
    return [row for name in DOMAINS for row in every if row.tags == (name,)][::8]


def told_by_readings(pool: Path) -> list[Outcome]:
    """Return outcomes of which the text leaves open what the chunk's reading tells.

    It is right where it finds the question likelier than it finds most of its domain, and the base
    in half of all.
    """
    found = rows()
    told = asyncio.run(read_prompts(pool, [row.query for row in found], models={"numerals"}))
    likely = {query: one.logprob_mean for query, one in told["numerals"].items()}
    outcomes = []
    for row in found:
        peers = [likely[other.query] for other in found if other.tags == row.tags]
        right = float(likely[row.query] > statistics.median(peers))
        outcomes.append(replace(row, scores={"numerals": right, "base": 0.5}))
    return outcomes


def learn(pool: Path, outcomes: list[Outcome]) -> str:
    """Run the command on them, with readings taken now; return what it printed."""
    file = pool.parent / "outcomes.jsonl"
    write_outcomes(file, outcomes)
    words = ["learn", "--pool", pool, "--outcomes", file, "--read", "--budget", "100%"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_look_is_learned_installed_and_served(tmp_path: Path) -> None:
    """From outcomes that are there; the answer comes from one of both."""
    pool = pool_at(tmp_path)
    found = rows()
    output = learn(pool, told_by_readings(pool))
    spec = yaml.safe_load(pool.read_text())["policies"]["probing-v1"]
    assert (spec["kind"], spec["scorer"]) == ("probing", "probing-v1")
    assert re.search(r"probing-v1 +policy +0\.\d", output)
    policy = load_catalog(load_pool(pool)).policies["probing-v1"]
    asked = [Query(text=row.query, prompt_tokens=30, max_tokens=12) for row in found]
    looking = [query for query in asked if isinstance(policy.decide(query).plan, Cascade)]
    assert looking

    async def served() -> list[Reply]:
        async with ask_pool(pool) as asker:
            return [
                await asker.ask(
                    "policy/probing-v1", [{"role": "user", "content": query.text}], max_tokens=12
                )
                for query in looking[:5]
            ]

    assert all(reply.text for reply in asyncio.run(served()))


@pytest.mark.parametrize("misleads", [True, False])
def test_a_look_that_answers_worse_is_left_out(tmp_path: Path, misleads: bool) -> None:
    """What told right from wrong in training may tell the opposite of the test's questions."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrst", k=6)) for _ in range(400)]
    asked = [
        Outcome(
            query=" ".join(rng.sample(words, 8)),
            scores={"base": 0.5},
            prompt_tokens=20,
            output_tokens=dict.fromkeys(MODELS, 8),
        )
        for _ in range(300)
    ]
    readings, outcomes = {}, []
    for row in divide(asked):
        likely = rng.random() < 0.5
        told = not likely if misleads and row.split == TEST else likely
        outcomes.append(replace(row, scores={"numerals": float(likely), "base": 0.5}))
        readings[row.query] = Reading(logprob_mean=float(told) - 2.0, logprob_min=-3.0)
    pool = load_pool(pool_at(tmp_path))
    lesson = learn_from(outcomes, pool, LearnSettings(budget_share=1.0), {"numerals": readings})
    assert ("probing-v1" in lesson.specs) is not misleads
    assert any("no probing-v1: a look at" in note for note in lesson.notes) is misleads
    looked, blind = lesson.row("probing-v1").quality, lesson.row("auto-v1").quality
    assert (looked < blind) is misleads


def test_readings_are_of_the_prompts_that_are_served(tmp_path: Path) -> None:
    """Each with figures and a hidden state; the likelier prompt is told apart from noise."""
    known, noise = rows()[0].query, "qzx jjk 77 ?! vvw"
    told = asyncio.run(
        read_prompts(pool_at(tmp_path), [known, noise, known], models={"numerals", "nobody"})
    )
    assert set(told) == {"numerals"} and set(told["numerals"]) == {known, noise}
    readings: list[Reading] = list(told["numerals"].values())
    for reading in readings:
        assert reading.state_D is not None and reading.state_D.shape == (128,)
        assert reading.entropy is not None and reading.logprob_min <= reading.logprob_mean < 0
    assert readings[0].logprob_mean > readings[1].logprob_mean
