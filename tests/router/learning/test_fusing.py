"""A fusion is learned of models that one engine can fuse, and serves."""

from pathlib import Path

import yaml
from typer.testing import CliRunner

from models.pool import DEFAULT_POOL, load_pool
from policies.base import Query
from policies.outcomes import read_outcomes, write_outcomes
from policies.plan import Answer
from router.catalog.catalog import load_catalog
from router.cli.main import app
from router.learning.fusing import fusible
from tests.router.conftest import write_pool

CHUNKS = ("arithmetic", "text")


def pool_at(folder: Path) -> Path:
    """Write a pool of two of the default pool's chunks on one engine, and a fake one beside."""
    engines = [
        {"name": "chunks", "kind": "stacked", "device": "cpu", "dtype": "float32"},
        {"name": "fake", "kind": "fake"},
    ]
    models = [
        {
            "name": name,
            "engine": "chunks",
            "checkpoint": str(DEFAULT_POOL / name),
            "usd_per_million_output_tokens": 1,
        }
        for name in CHUNKS
    ]
    models.append({"name": "other", "engine": "fake", "usd_per_million_output_tokens": 10})
    policies = {"auto": {"kind": "fixed", "plan": "arithmetic"}}
    return write_pool(folder, engines=engines, models=models, policies=policies)


def test_a_fusion_is_calibrated_and_installed(tmp_path: Path) -> None:
    """Both chunks, weighted by evidence at a temperature that was fitted, with auto's prior."""
    file = pool_at(tmp_path)
    pool = load_pool(file)
    assert fusible(pool, ("arithmetic", "text", "other")) == CHUNKS
    assert fusible(pool, ("text", "other")) == ()
    known = [
        row
        for row in read_outcomes(DEFAULT_POOL / "outcomes.jsonl", split="router")
        if row.tags[0] in CHUNKS
    ]
    write_outcomes(tmp_path / "outcomes.jsonl", known[:: len(known) // 160])
    words = ["learn", "--pool", file, "--outcomes", tmp_path / "outcomes.jsonl", "--budget", "100%"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    spec = yaml.safe_load(file.read_text())["policies"]["fused-v1"]
    assert spec["answer"]["members"] == list(CHUNKS)
    assert spec["answer"]["temperature"] > 0
    assert spec["router"]["path"] == "learned/v1/router.npz"
    # What it would have answered nobody knows, and the report says so.
    assert "Note: fused-v1 cannot be compared" in result.stdout
    policy = load_catalog(load_pool(file)).policies["fused-v1"]
    for query, knows in (("What is 12 + 31?", 0), ("How many letters are in 'wajwo'?", 1)):
        plan = policy.decide(Query(text=query)).plan
        assert isinstance(plan, Answer) and plan.members == CHUNKS
        assert plan.weights is not None
        assert plan.weights[knows] == max(plan.weights)
