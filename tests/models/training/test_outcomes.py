"""Greedy answers, their measurement and the files that a pool is made of."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from models.tasks import DOMAINS, Split
from models.training.card import write_card
from models.training.checkpoint import Progress
from models.training.export import export_model
from models.training.generate import complete
from models.training.outcomes import measure_pool
from models.training.pool_file import write_pool_file
from models.training.shapes import Shape, build_model, num_parameters
from models.training.statistics import wilson_interval

_TINY = Shape(
    hidden_size=32,
    num_layers=1,
    feed_forward_size=64,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
)


def test_answers_do_not_depend_on_the_batch(tokenizer: PreTrainedTokenizerFast) -> None:
    """Each completion is transformers' greedy one for the question alone."""
    model = build_model(_TINY, tokenizer, seed=1)
    questions = [t.question for t in DOMAINS["text"].distinct(Split.TEST, 12, seed=0)]
    completions = complete(model, tokenizer, questions, max_new_tokens=5, batch_size=4)
    for question, completion in zip(questions, completions, strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        assert isinstance(prompt, str)
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
        output = model.generate(  # type: ignore[misc]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False
        )
        written = output[0, ids.shape[1] :]
        assert completion.text == tokenizer.decode(written, skip_special_tokens=True)
        assert completion.num_prompt_tokens == ids.shape[1]
        assert all(value <= 0 for value in completion.log_probabilities)


def test_a_pool_is_written_whole(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Checkpoints load with the Auto classes; outcomes, results, card and pool file agree."""
    models = {}
    for seed, name in enumerate(("text", "base")):
        facts = Progress(step=3, num_tokens=100, wall_clock_s=60.0, recipe={"seed": seed})
        model = build_model(_TINY, tokenizer, seed=seed)
        models[name] = export_model(model, tokenizer, facts, tmp_path / name)
        assert AutoTokenizer.from_pretrained(tmp_path / name).eos_token == "<|end|>"
        stored = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert stored.dtype == torch.bfloat16
        assert stored.generation_config.eos_token_id == tokenizer.eos_token_id
    lines: list[str] = []
    sizes = {Split.ROUTER: 3, Split.TEST: 2}
    measure_pool(models, tokenizer, out=tmp_path, report=lines.append, sizes=sizes)
    outcomes = [json.loads(s) for s in (tmp_path / "outcomes.jsonl").read_text().splitlines()]
    assert len(outcomes) == 5 * len(DOMAINS)
    assert len({outcome["id"] for outcome in outcomes}) == len(outcomes)
    for outcome in outcomes:
        assert set(outcome["scores"]) == set(outcome["outputs"]) == set(models)
        assert outcome["output_tokens"]["base"] == outcome["logprobs"]["base"]["num_tokens"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["exact_match"]["text"]["code"]["asked"] == 2
    write_card(list(models), tmp_path)
    write_pool_file({name: num_parameters(m) for name, m in models.items()}, tmp_path)
    assert "| base |" in (tmp_path / "README.md").read_text()
    pool = yaml.safe_load((tmp_path / "pool.yaml").read_text())
    assert [m["engine"] for m in pool["models"]] == ["chunks", "base"]


def test_wilson_interval() -> None:
    """The interval of 8 in 10 is the published one, and it stays within [0, 1]."""
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 5)[0] == 0
    assert wilson_interval(5, 5)[1] == 1
    with pytest.raises(ValueError, match="positive"):
        wilson_interval(0, 0)
