"""What is concluded from ways of answering that are compared on the same questions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.downscale.figures import Comparison, System
from models.errors import RecipeError
from tests.bench.downscale.claims import claims, other_runs

_DOMAINS = ["a"] * 300 + ["b"] * 100


def _system(name: str, kind: str, share_a: float, share_b: float, *, seed: int) -> System:
    rng = np.random.default_rng(seed)
    right = np.concatenate([rng.random(300) < share_a, rng.random(100) < share_b])
    return System(
        name=name, kind=kind, score_Q=right.astype(float), usd_Q=0 * right, parameters=1.0
    )


def test_claims_are_answered_with_their_certainty() -> None:
    """Clearly kept, clearly lost and undecided come out as such."""
    base = _system("base", "base", 0.8, 0.8, seed=1)
    good = System(
        name="good", kind="routed", score_Q=np.ones(400), usd_Q=np.zeros(400), parameters=1.0
    )
    bad = _system("bad", "fused", 0.3, 0.3, seed=2)
    same = System(name="same", kind="fused", score_Q=base.score_Q, usd_Q=base.usd_Q, parameters=1.0)
    found = claims(
        {s.name: s for s in (base, good, bad, same)},
        Comparison(_DOMAINS, seed=0),
        routed=["good"],
        fused=["bad", "same"],
        references=["base"],
        curve={"r2": 0.97, "losses": [3.0, 2.0, 1.5]},
    )
    verdicts = {(c["claim"], c["system"]): (c["holds"], c["surely"]) for c in found}
    assert verdicts[("a", "good")] == (True, True)
    assert verdicts[("b", "bad")] == (False, False)
    assert verdicts[("b", "same")] == (False, False)
    assert verdicts[("c", "fused loss")] == (True, True)


def test_a_loss_that_rises_with_n_fails_the_third_claim() -> None:
    """A good fit is not enough, the loss must fall."""
    base = _system("base", "base", 0.8, 0.8, seed=1)
    [claim] = claims(
        {"base": base},
        Comparison(_DOMAINS, seed=0),
        routed=[],
        fused=[],
        references=["base"],
        curve={"r2": 0.99, "losses": [1.0, 1.5, 1.7]},
    )
    assert not claim["holds"]


_QUESTIONS = ["a", "a", "b"]


def _results(path: Path, **changes: Any) -> str:
    systems = [
        {"name": name, "kind": kind, "parameters": 5.0, "right": "101"}
        for name, kind in (("base", "base"), ("finetuned", "base"), ("a", "chunk"))
    ]
    content = {"question_domains": {"a": 2, "b": 1}, "systems": systems, **changes}
    path.write_text(json.dumps(content))
    return str(path)


def test_another_runs_systems_come_with_its_label(tmp_path: Path) -> None:
    """All but the shared base and the single chunks, question by question."""
    found = other_runs({"strict": _results(tmp_path / "results.json")}, _QUESTIONS)
    assert list(found) == ["strict: finetuned"]
    assert found["strict: finetuned"].score_Q.tolist() == [1.0, 0.0, 1.0]


def test_results_on_other_questions_are_refused(tmp_path: Path) -> None:
    """They could not be compared in pairs."""
    file = _results(tmp_path / "results.json", question_domains={"a": 3})
    with pytest.raises(RecipeError, match=r"--compare strict: .*measured on other questions"):
        other_runs({"strict": file}, _QUESTIONS)
    with pytest.raises(RecipeError, match=r"--compare strict: .*holds no results"):
        other_runs({"strict": str(tmp_path / "missing.json")}, _QUESTIONS)
