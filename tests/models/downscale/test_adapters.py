"""Adapters in place of cuts: one per domain, measured like chunks, served on their base."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from models.adapter import read_adapter
from models.downscale.pipeline import downscale
from models.downscale.recipe import Recipe
from models.pool import load_pool
from models.training.lora import add_adapter, merge_adapter, save_adapter
from tests.models.downscale.tiny_models import tiny_base


@pytest.fixture(name="base")
def saved_base(tmp_path):
    """An untrained checkpoint."""
    return tiny_base(tmp_path / "checkpoint")


def load(folder):
    """A checkpoint in transformers, float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_what_is_written_is_what_peft_reads(base, tmp_path):
    """The model with the adapter in training, PEFT's of the folder, and the base with it merged
    compute the same; the base alone does not, and nothing of it was to be trained."""
    training = load(base)
    before = {name: p.clone() for name, p in training.named_parameters()}
    add_adapter(training, rank=3, alpha=5, seed=1)
    learning = {name for name, p in training.named_parameters() if p.requires_grad}
    assert learning and all(name.rpartition(".")[2] in ("shrink", "expand") for name in learning)
    for name, parameter in training.named_parameters():
        if name in learning:
            torch.nn.init.normal_(parameter, std=0.2)
    save_adapter(training, tmp_path / "adapter", base="x")
    merged = load(base)
    merge_adapter(merged, read_adapter(tmp_path / "adapter", base))
    tokens = torch.tensor([[5, 9, 33, 7, 2]])
    with torch.inference_mode():
        plain, ours, theirs, whole = (
            model(tokens).logits
            for model in (
                load(base),
                training,
                PeftModel.from_pretrained(load(base), tmp_path / "adapter"),
                merged,
            )
        )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole, theirs, atol=1e-4, rtol=1e-4)
    assert (ours - plain).abs().max() > 0.1
    for name, parameter in load(base).named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("way", "draws", "taught"),
    [
        ({}, [], {}),
        ({}, [], {"weight": 0.5, "teacher": "domain", "teacher_tokens": 4_000}),
        ({"unmask": {"share": 0.5}}, [], {}),
        ({"monte_carlo": {"members": 2}}, ["sums-1", "sums-2", "words-1", "words-2"], {}),
    ],
    ids=["plain", "taught", "unmask", "monte_carlo"],
)
def test_a_pool_of_adapters(base, tmp_path, way, draws, taught, monkeypatch):
    """A recipe with `members: {adapters: …}` leaves one engine of the base and an adapter per
    domain, which learned its domain, and draws of its posterior if it has one; a run that goes on
    does nothing anew. Cards say who taught. The folder is named as people do, from where they
    are."""
    for name in ("sums", "words"):
        lines = [{"question": f"{name} {i} + 1?", "answer": str(i + 1)} for i in range(120)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = Recipe.model_validate(
        {
            "name": "adapters",
            "base": {"checkpoint": str(base)},
            "domains": {n: {"corpus": str(tmp_path / f"{n}.jsonl")} for n in ("sums", "words")},
            "members": {"adapters": {"rank": 4, "learning_rate": 0.01, **way}},
            "adapt": {
                "tokens": 8_000, "rows_per_step": 4, "row_tokens": 32, "general_share": 0.2,
                "compiled": False, "precision": "float32", "distill": taught,
            },
        }
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    out = Path("out")
    downscale(recipe, out, report=lambda _: None)
    pool = load_pool(out)
    assert [model.name for model in pool.models] == ["base", "sums", "words", *draws]
    assert [engine.name for engine in pool.engines] == ["base"]
    assert [m.name for m in pool.models if m.adapter is None] == ["base"]
    assert pool.model("sums").spec.domains == ("sums",)
    assert set(pool.policies) == {"auto", "cascade", "fused", "best-of"}
    results = json.loads((out / "results.json").read_text())
    for domain in ("sums", "words"):
        assert results["losses"][domain][domain] < results["losses"]["base"][domain]
        assert results["models"][domain]["parameters"] > results["models"]["base"]["parameters"]
        assert "adapter of rank 4" in results["models"][domain]["lineage"]
        card = (out / domain / "README.md").read_text()
        assert ("| the base, trained on its domain |" in card) == bool(taught)
        assert ("energy of its teacher's training" in card) == bool(taught)
        PeftModel.from_pretrained(load(out / "base"), out / domain)
    for name in draws:
        domain = name.partition("-")[0]
        assert pool.model(name).spec.domains == (domain,)
        assert pool.model(name).adapter != pool.model(domain).adapter
        PeftModel.from_pretrained(load(out / "base"), out / name)
    lines: list[str] = []
    downscale(recipe, out, resume=True, report=lines.append)
    assert [line for line in lines if "done" in line] == []


def test_a_recipe_has_cuts_or_adapters():
    """Sizes of cuts beside adapters, and examples judged by chunks, are refused by name."""
    content = {
        "name": "x",
        "base": {"checkpoint": "./base"},
        "domains": {"a": {"corpus": "a.txt"}, "b": {"corpus": "b.txt"}},
        "members": {"adapters": {"rank": 4}},
    }
    assert Recipe.model_validate(content).members.adapters.rank == 4
    with pytest.raises(ValueError, match="leave out parameters and shape"):
        Recipe.model_validate({**content, "members": {"adapters": {}, "parameters": "1/8"}})
    with pytest.raises(ValueError, match="give either unmask or monte_carlo"):
        ways = {"unmask": {"share": 0.1}, "monte_carlo": {}}
        Recipe.model_validate({**content, "members": {"adapters": ways}})
    with pytest.raises(ValueError, match="'a-1' is taken by a draw"):
        domains = {"a": {"corpus": "a.txt"}, "a-1": {"corpus": "b.txt"}}
        adapters = {"adapters": {"monte_carlo": {}}}
        Recipe.model_validate({**content, "domains": domains, "members": adapters})
    with pytest.raises(ValueError, match=r"select.by: 'bald' .* allowed is 'random'"):
        Recipe.model_validate({**content, "select": {"by": "bald"}})
