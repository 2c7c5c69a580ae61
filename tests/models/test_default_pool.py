"""The pool that ships: its size, its shapes and what it claims to get right."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.downscale.answers import ask
from models.pool import load_pool
from models.tasks import DOMAINS
from models.tasks.base import Split, check
from policies.plan import Answer

_POOL = Path(__file__).parents[2] / "models" / "pools" / "default"
_MEMBERS = (*DOMAINS, "base")


def _outcomes() -> list[dict[str, Any]]:
    lines = (_POOL / "outcomes.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["split"] == "test"]


def _share_right(rows: list[dict[str, Any]], model: str, domain: str) -> float:
    scores = [row["scores"][model] for row in rows if domain in row["tags"]]
    return sum(scores) / len(scores)


def test_the_weights_are_small() -> None:
    """All weights in the repository stay under 60 MB."""
    sizes = [path.stat().st_size for path in _POOL.rglob("*.safetensors")]
    assert len(sizes) == len(_MEMBERS)
    assert sum(sizes) < 60e6


def test_a_chunk_is_an_eighth_of_the_base() -> None:
    """Chunks share one shape and have the base's parameters, divided by their number, within 2%."""
    models = {model.name: model for model in load_pool(_POOL).models}
    chunks = [models[name].card for name in DOMAINS]
    assert len({chunk.shape for chunk in chunks}) == 1
    target = models["base"].card.parameters / len(DOMAINS)
    assert all(abs(chunk.parameters / target - 1) < 0.02 for chunk in chunks)


def test_all_models_share_one_tokenizer() -> None:
    """The tokenizer files are the same bytes in every folder."""
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert len({(_POOL / name / file).read_bytes() for name in _MEMBERS}) == 1


def test_a_chunk_generates_in_plain_transformers() -> None:
    """The Auto classes load a chunk, and `generate` answers the README's first question."""
    model = AutoModelForCausalLM.from_pretrained(_POOL / "arithmetic")
    tokenizer = AutoTokenizer.from_pretrained(_POOL / "arithmetic")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 37 + 58?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=8)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "95"


def test_each_chunk_is_best_on_its_own_domain() -> None:
    """On the stored test questions no other chunk comes near the one of the domain."""
    rows = _outcomes()
    for domain in DOMAINS:
        others = [_share_right(rows, other, domain) for other in DOMAINS if other != domain]
        assert _share_right(rows, domain, domain) > max(others) + 0.1


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_stored_results_hold_on_fresh_questions(domain: str) -> None:
    """On 40 new held-out questions a chunk comes within sampling error of its stored result."""
    tasks = DOMAINS[domain].distinct(Split.TEST, 40, seed=777)
    asked = [(task.question, Answer(members=(domain,))) for task in tasks]
    answers = ask({domain: _POOL / domain}, asked, max_new_tokens=32)
    right = sum(check(t.answer, a.text) for t, a in zip(tasks, answers, strict=True))
    assert right / 40 >= _share_right(_outcomes(), domain, domain) - 0.25
