"""Fits recover the constants that made the data, and say how sure they are."""

import numpy as np
import pytest

from policies.errors import LawError
from policies.laws.downscaling import MixtureLaw, PostPruningLaw, largest_domain_share
from policies.laws.scaling import EnsembleLaw

MIXTURE = MixtureLaw(
    A=20.0, B=15.0, C=0.2, E=1.5, alpha=0.2, beta=0.2, gamma=0.6, eta=0.5, epsilon=0.1
)


def noisy(values, seed, relative=0.001):
    """Return `values` with relative normal noise."""
    return values * (1 + relative * np.random.default_rng(seed).normal(size=len(values)))


def test_ensemble_fit_recovers_its_constants():
    """With small noise (seed 3) L0, a and b come back and their intervals hold the truth."""
    truth = EnsembleLaw(L0=2.4, a=0.8, b=0.3)
    n = np.tile(np.arange(1.0, 9.0), 3)
    losses = noisy(truth.predict(n), seed=3, relative=0.002)
    fitted = EnsembleLaw.fit(num_members=n, losses=losses)
    assert pytest.approx(truth.L0, rel=0.01) == fitted.law.L0
    assert fitted.law.b == pytest.approx(truth.b, rel=0.15)
    for name in ("L0", "a", "b"):
        interval = fitted.intervals[name]
        assert interval.low < getattr(truth, name) < interval.high


def test_intervals_widen_with_noise():
    """Ten times the noise gives a wider interval (seed 4)."""
    truth = EnsembleLaw(L0=2.4, a=0.8, b=0.3)
    n = np.tile(np.arange(1.0, 9.0), 2)
    widths = []
    for relative in (0.0005, 0.005):
        losses = noisy(truth.predict(n), seed=4, relative=relative)
        interval = EnsembleLaw.fit(num_members=n, losses=losses, num_resamples=80).intervals["b"]
        widths.append(interval.high - interval.low)
    assert widths[1] > 3 * widths[0]


def test_fits_are_reproducible_under_a_seed():
    """The same data and seed give the same intervals."""
    truth = EnsembleLaw(L0=2.4, a=0.8, b=0.3)
    n = np.arange(1.0, 9.0)
    losses = noisy(truth.predict(n), seed=5)
    first, second = (
        EnsembleLaw.fit(num_members=n, losses=losses, seed=7, num_resamples=20) for _ in range(2)
    )
    assert first == second


def test_post_pruning_fit_finds_the_sign_of_gamma():
    """Data made with a positive or a negative γ (seed 8) give a fit with that sign."""
    rng = np.random.default_rng(8)
    rho = rng.uniform(0.4, 0.95, size=60)
    N0 = rng.choice([1.0, 3.0, 8.0], size=60)
    D = rng.uniform(0.1, 5.0, size=60)
    L0 = rng.uniform(2.0, 2.6, size=60)
    for gamma in (1.08, -0.7):
        truth = PostPruningLaw(Nc=0.4, Dc=0.5, E=0.2, alpha=0.3, beta=0.5, gamma=gamma, delta=0.29)
        losses = truth.predict(
            base_loss=L0, kept_share=rho, base_billion_parameters=N0, billion_tokens=D
        )
        fitted = PostPruningLaw.fit(
            base_losses=L0,
            kept_shares=rho,
            base_billion_parameters=N0,
            billion_tokens=D,
            losses=losses,
            num_resamples=0,
        )
        assert fitted.law.gamma == pytest.approx(gamma, abs=0.1)
        assert fitted.rmse < 1e-3


def test_mixture_fit_predicts_held_out_shares():
    """Fitted to a grid with 0.1% noise (seed 9), an unseen mixture comes back within 0.5%."""
    shares = np.tile([0.05, 0.2, 0.4, 0.7, 0.95], 10)
    sizes = np.repeat([1e7, 1e8], 25)
    tokens = np.tile(np.repeat([1e8, 3e8, 1e9, 3e9, 1e10], 5), 2)
    losses = noisy(MIXTURE.predict(sizes, tokens, shares), seed=9)
    fitted = MixtureLaw.fit(
        parameters=sizes, tokens=tokens, shares=shares, losses=losses, num_resamples=0
    )
    assert fitted.law.predict(5e7, 2e9, 0.55) == pytest.approx(
        MIXTURE.predict(5e7, 2e9, 0.55), rel=0.005
    )


def test_largest_domain_share_just_meets_the_general_limit():
    """At the share returned the general loss is the limit, and any more would exceed it."""
    limit = MIXTURE.predict(1e8, 1e9, 0.3)
    share = largest_domain_share(
        MIXTURE, parameters=1e8, tokens=1e9, general_loss_limit=float(limit)
    )
    assert MIXTURE.predict(1e8, 1e9, 1 - share) == pytest.approx(limit)
    assert MIXTURE.predict(1e8, 1e9, 1 - share - 0.02) > limit


def test_a_limit_met_everywhere_gives_the_whole_mixture_to_the_domain():
    """A loose limit allows a share of one."""
    assert largest_domain_share(MIXTURE, parameters=1e8, tokens=1e9, general_loss_limit=9.0) == 1.0


def test_an_unreachable_limit_is_refused_with_the_best_loss():
    """The message names the lowest general loss that any mixture reaches."""
    with pytest.raises(LawError, match="the lowest general loss is"):
        largest_domain_share(MIXTURE, parameters=1e8, tokens=1e9, general_loss_limit=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_members": [1, 2, 4], "losses": [3, 2, 1]}, "at least 4 are needed"),
        ({"num_members": [1, 1, 2, 2], "losses": [3, 3, 2, 2]}, "three different sizes"),
        ({"num_members": [1, 2, 3], "losses": [3, 2, 1, 0]}, "one value per measurement is 4"),
        ({"num_members": [1, 2, 3, 4], "losses": [3, 2, float("nan"), 0]}, "finite"),
    ],
)
def test_measurements_that_cannot_be_fitted_are_refused(arguments, message):
    """Too few points, sizes or values that are not numbers: the error says which."""
    with pytest.raises(LawError, match=message):
        EnsembleLaw.fit(**arguments)
