"""The share of general data: what follows from laws of known constants."""

import numpy as np
import pytest

from models.downscale.data import Point, best_share, fit_mixture
from policies.laws.downscaling import MixtureLaw

# Rises fast as a corpus's own share goes to nothing.
_LAW = MixtureLaw(
    A=0.0, B=3.0, C=0.05, E=0.4, alpha=0.3, beta=0.2, gamma=1.0, eta=0.2, epsilon=0.05
)


@pytest.mark.parametrize("weight", [0.05, 0.2, 1.0])
def test_the_best_share_minimises_the_weighted_losses(weight: float) -> None:
    """It is the minimum on a fine grid; general data that counts more gets more."""
    share = best_share(_LAW, _LAW, parameters=1e6, tokens=1e6, general_weight=weight)
    grid = np.linspace(0, 0.9, 2001)
    costs = [
        _LAW.predict(1e6, 1e6, float(1 - s)) + weight * _LAW.predict(1e6, 1e6, float(s))
        for s in grid
    ]
    assert share == pytest.approx(grid[int(np.argmin(costs))], abs=0.005)


def test_general_data_that_counts_more_gets_more() -> None:
    """The share grows with its weight."""
    shares = [
        best_share(_LAW, _LAW, parameters=1e6, tokens=1e6, general_weight=weight)
        for weight in (0.05, 0.2, 1.0)
    ]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


@pytest.mark.slow
def test_losses_of_several_domains_are_pooled() -> None:
    """Points that follow a law, one domain's twice the other's, are fitted to within 2%."""
    points = [
        Point(
            domain=domain,
            general_share=share,
            parameters=1_000_000,
            tokens=tokens,
            domain_loss=scale * _LAW.predict(1e6, tokens, 1 - share),
            general_loss=_LAW.predict(1e6, tokens, share),
        )
        for domain, scale in (("one", 1.0), ("two", 2.0))
        for share in (0.05, 0.15, 0.3, 0.6)
        for tokens in (50_000, 200_000)
    ]
    domain, general = fit_mixture(points, seed=0, num_resamples=0)
    for point in points:
        fitted = general.law.predict(1e6, point["tokens"], point["general_share"])
        assert fitted == pytest.approx(point["general_loss"], rel=0.02)
    assert domain.rmse < 0.02
