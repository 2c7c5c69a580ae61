"""The pool that ships: its size, its shapes and what it claims to get right."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from models.tasks import DOMAINS, Split, check
from models.training.default_pool import MEMBERS, main
from models.training.export import load_model
from models.training.generate import complete

_POOL = Path(__file__).parents[3] / "models" / "pools" / "default"


def _results() -> dict[str, dict[str, Any]]:
    results = json.loads((_POOL / "results.json").read_text())["exact_match"]
    assert isinstance(results, dict)
    return results


def test_the_weights_are_small() -> None:
    """All weights in the repository stay under 40 MB."""
    sizes = [path.stat().st_size for path in _POOL.rglob("*.safetensors")]
    assert len(sizes) == len(MEMBERS)
    assert sum(sizes) < 40e6


def test_a_chunk_has_a_quarter_of_the_base() -> None:
    """Chunks share one shape, shallower and wider for its size, of at most a quarter."""
    facts = {m.name: json.loads((_POOL / m.name / "training.json").read_text()) for m in MEMBERS}
    largest = facts["base"]["num_parameters"]
    assert all(facts[name]["num_parameters"] <= largest / 4 for name in DOMAINS)
    assert len({(_POOL / name / "config.json").read_bytes() for name in DOMAINS}) == 1


def test_all_models_share_one_tokenizer() -> None:
    """The tokenizer files are the same bytes in every folder."""
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert len({(_POOL / member.name / file).read_bytes() for member in MEMBERS}) == 1


def test_each_chunk_is_best_on_its_own_domain() -> None:
    """Stored results: 80% or more on the own domain, clearly above the other chunks there."""
    results = _results()
    for domain in DOMAINS:
        own = results[domain][domain]
        assert own["exact_match"] >= 0.8
        for other in DOMAINS:
            if other != domain:
                assert results[other][domain]["interval_95"][1] < own["interval_95"][0]


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_stored_results_hold_on_fresh_questions(domain: str) -> None:
    """On 40 new held-out questions a chunk comes within sampling error of its stored result."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(_POOL / domain)
    tasks = DOMAINS[domain].distinct(Split.TEST, 40, seed=777)
    answers = complete(load_model(_POOL / domain), tokenizer, [t.question for t in tasks])
    right = sum(check(t.answer, a.text) for t, a in zip(tasks, answers, strict=True))
    assert right / 40 >= _results()[domain][domain]["exact_match"] - 0.2
    assert all(answer.finished for answer in answers)


def test_the_first_question() -> None:
    """The question that the README asks is answered rightly by the chunk for it."""
    folder = _POOL / "arithmetic"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    [answer] = complete(load_model(folder), tokenizer, ["What is 37 + 58?"])
    assert answer.text == "95"


def test_an_unknown_member_is_refused(tmp_path: Path) -> None:
    """The command names the members there are."""
    with pytest.raises(SystemExit, match=r"poetry.*arithmetic"):
        main(["--members", "poetry", "--work", str(tmp_path)])
