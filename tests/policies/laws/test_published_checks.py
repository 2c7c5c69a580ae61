"""Every value the papers print, reproduced."""

import math

import pytest

from policies.errors import LawError
from policies.laws.downscaling import PostPruningLaw, RecoveryLaw, RuntimeLaw
from policies.laws.scaling import (
    PAPER_LOOSE_B,
    EnsembleLaw,
    InferenceEfficient,
    Shape,
    SharedExponent,
    ensemble_margin,
    rank_shapes,
    shapes_of_size,
    smallest_winning_ensemble,
)


@pytest.mark.parametrize(
    ("d_model", "num_layers", "loss"),
    [(2048, 24, 2.9923), (2560, 16, 3.0151), (3072, 12, 3.0388)],
)
def test_inference_efficient_law_gives_the_papers_losses(d_model, num_layers, loss):
    """At N = 1e9 and D = 30e9 the three published shapes have the published losses."""
    shape = Shape(d_model=d_model, num_layers=num_layers)
    predicted = InferenceEfficient.PUBLISHED.predict(1e9, 30e9, shape.aspect_ratio)
    assert predicted == pytest.approx(loss, abs=5e-5)


def test_shared_exponent_fit_ignores_the_shape():
    """The paper's Chinchilla fit predicts one loss for a size, whatever its shape."""
    assert SharedExponent.PUBLISHED.predict(1e9, 30e9) == pytest.approx(
        2.13 + 7720.62 * 1e9**-0.49 + 68572.73 * 30e9**-0.49
    )


def test_shapes_are_ranked_by_loss_and_priced_by_depth():
    """The deepest shape has the lowest loss and the highest relative latency."""
    shapes = [Shape(d_model=3072, num_layers=12), Shape(d_model=2048, num_layers=24)]
    deep, wide = rank_shapes(shapes, parameters=1e9, tokens=30e9, law=InferenceEfficient.PUBLISHED)
    assert (deep.shape.num_layers, wide.shape.num_layers) == (24, 12)
    assert (deep.relative_latency, wide.relative_latency) == (1.0, 0.5)


def test_candidate_shapes_have_the_size_asked_for():
    """Each depth's shape has layers within 10% of the parameters asked for."""
    for shape in shapes_of_size(1e9):
        layers = shape.num_layers * shape.d_model**2 * (4 + 3 * 2.7)
        assert layers == pytest.approx(1e9, rel=0.1)


@pytest.mark.parametrize(("n", "left"), [(6, 0.6356), (7, 0.6783), (8, 0.7116)])
def test_proposition_4_1_gives_the_papers_sides(n, left):
    """Both sides of eq. 13 for Llama-3-8B, N0 in billions, as printed."""
    right = 1 / (PAPER_LOOSE_B * 8**0.29)
    assert right == pytest.approx(0.6592, abs=5e-5)
    assert ensemble_margin(n, 8e9) + right == pytest.approx(left, abs=5e-5)


def test_proposition_4_1_depends_on_the_unit_of_parameters():
    """N0 = 8 (billions) holds from n = 7; the same base counted in parameters from n = 2."""
    assert smallest_winning_ensemble(8e9) == 7
    assert smallest_winning_ensemble(8e9, parameter_unit=1.0) == 2


def test_no_ensemble_wins_where_members_hardly_help():
    """With a tiny b no size satisfies eq. 13, and the answer says so."""
    assert smallest_winning_ensemble(8e9, b=1e-3, max_members=64) is None


def test_post_pruning_loss_falls_as_rho_rises_when_gamma_is_positive():
    """As printed, ρ behaves as the share kept; a negative γ turns it into the share removed."""
    constants = {"Nc": 0.5, "Dc": 0.5, "E": 0.1, "alpha": 0.3, "beta": 0.4, "delta": 0.29}
    positive = PostPruningLaw(gamma=1.08, **constants)
    negative = PostPruningLaw(gamma=-1.08, **constants)
    at = {"base_loss": 2.0, "base_billion_parameters": 8.0, "billion_tokens": 1.0}
    assert positive.predict(kept_share=0.9, **at) < positive.predict(kept_share=0.5, **at)
    assert negative.predict(kept_share=0.9, **at) > negative.predict(kept_share=0.5, **at)


@pytest.mark.parametrize(("ratio", "times"), [(0.3, 1.19), (0.6, 1.37)])
def test_compressed_models_answer_faster_by_the_published_factor(ratio, times):
    """T0 (1 + r)^-0.67: 1.19 times faster at 30%, 1.37 at 60%."""
    assert RuntimeLaw.PUBLISHED.speedup(ratio) == pytest.approx(times, abs=0.005)
    assert RuntimeLaw.PUBLISHED.predict(1.0, ratio) == pytest.approx(1 / times, abs=0.005)


def test_critical_ratio_is_where_unlimited_recovery_data_just_keeps_the_share():
    """At r_critical(σ) the factor (1 + r)^β is σ, so more data cannot give more than σ."""
    law = RecoveryLaw(alpha=1.0, beta=-1.03, gamma=-0.14)
    critical = law.critical_ratio(0.9)
    assert critical == pytest.approx(0.9 ** (1 / -1.03) - 1)
    assert law.predict(0.7, critical, 1e12) == pytest.approx(0.9 * 0.7)
    assert law.predict(0.7, critical + 0.05, 1e12) < 0.9 * 0.7


def test_recovery_training_raises_performance():
    """With the published exponents more recovery data never lowers the performance."""
    law = RecoveryLaw.PUBLISHED
    assert law.predict(0.6, 0.3, 0.0) < law.predict(0.6, 0.3, 1.0) < law.predict(0.6, 0.3, 10.0)


def test_kept_share_outside_its_range_is_refused():
    """σ must lie in (0, 1]."""
    with pytest.raises(LawError, match=r"1\.5 is not in \(0, 1\]"):
        RecoveryLaw.PUBLISHED.critical_ratio(1.5)


def test_ensemble_law_has_the_papers_ends():
    """L(1) = L0 and the limit is L0 - b."""
    law = EnsembleLaw(L0=3.0, a=0.83, b=0.83)
    assert law.predict(1.0) == pytest.approx(3.0)
    assert law.predict(1e12) == pytest.approx(3.0 - 0.83)
    assert law.gain(4) == pytest.approx(law.predict(1.0) - law.predict(4.0))


def test_optimal_members_is_where_gain_meets_price():
    """At n* the derivative of the gain equals price times cost, and neighbours are no better."""
    law = EnsembleLaw(L0=1.0, a=0.7, b=0.4)
    best = law.optimal_members(price=0.01, cost_per_member=2.0)
    assert law.a * law.b / best ** (law.a + 1) == pytest.approx(0.02)

    def value(n: float) -> float:
        return -law.predict(n) - 0.02 * n

    assert value(best) > max(value(best - 0.5), value(best + 0.5))


def test_optimal_members_at_the_edges():
    """Free members are worth any number; dear or useless ones leave one."""
    law = EnsembleLaw(L0=1.0, a=0.7, b=0.4)
    assert law.optimal_members(0.0, 1.0) == math.inf
    assert law.optimal_members(1e6, 1.0) == 1.0
    assert EnsembleLaw(L0=1.0, a=0.7, b=0.0).optimal_members(0.1, 1.0) == 1.0
