"""Ways of answering compared: paired intervals and what is concluded from them."""

import numpy as np
import pytest

from models.downscale.systems import Comparison, System, claims

_DOMAINS = ["a"] * 300 + ["b"] * 100


def _system(name: str, kind: str, share_a: float, share_b: float, *, seed: int) -> System:
    rng = np.random.default_rng(seed)
    right = np.concatenate([rng.random(300) < share_a, rng.random(100) < share_b])
    return System(name=name, kind=kind, right_Q=right.astype(float), parameters=1.0)


def test_accuracy_is_a_mean_over_domains() -> None:
    """A domain with fewer questions counts as much as one with many."""
    comparison = Comparison(_DOMAINS, seed=0)
    right = np.array([1.0] * 300 + [0.0] * 100)
    assert comparison.accuracy(right) == {"value": 0.5, "interval_95": [0.5, 0.5]}


def test_intervals_cover_and_pairing_narrows_them() -> None:
    """The interval is that of a stratified mean; a difference of near twins has a narrow one."""
    comparison = Comparison(_DOMAINS, seed=0)
    one = _system("one", "base", 0.7, 0.5, seed=1).right_Q
    low, high = comparison.accuracy(one)["interval_95"]
    spread = np.sqrt(0.25 * (0.7 * 0.3 / 300 + 0.25 / 100))
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.12)
    twin = one.copy()
    twin[:3] = 1 - twin[:3]
    low, high = comparison.difference(one, twin)["interval_95"]
    assert high - low < 0.02


def test_claims_are_answered_with_their_certainty() -> None:
    """Clearly kept, clearly lost and undecided come out as such."""
    base = _system("base", "base", 0.8, 0.8, seed=1)
    good = System(name="good", kind="routed", right_Q=np.ones(400), parameters=1.0)
    bad = _system("bad", "fused", 0.3, 0.3, seed=2)
    same = System(name="same", kind="fused", right_Q=base.right_Q, parameters=1.0)
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
