"""All subsets at once: the same figures as one subset at a time."""

import numpy as np
import pytest
import torch

from models.downscale.ensemble import (
    explained,
    fit_curve,
    subset_errors,
    subset_losses,
    subsets,
)


def _odds(num_questions: int = 5, num_tokens: int = 3, num_members: int = 4) -> np.ndarray:
    rng = np.random.default_rng(0)
    odds = -rng.exponential(1.0, (num_questions, num_tokens, num_members))
    odds[0, 2:] = np.nan
    odds[1, 1:] = np.nan
    return odds


def test_every_subset_is_there_once() -> None:
    """2^M - 1 subsets, of every size; of many members only nested ones, M of each size."""
    found = subsets(4)
    assert len({tuple(row) for row in found.tolist()}) == len(found) == 15
    many = subsets(20)
    assert sorted(set(many.sum(1).tolist())) == list(range(1, 21))
    assert len(many) == 400


def test_losses_are_those_of_each_mixture() -> None:
    """Mean nats per token of Σ w p over the subset, its weights renormalised."""
    odds, chosen = _odds(), subsets(4)
    weights = np.random.default_rng(1).dirichlet(np.ones(4), 5)
    losses = subset_losses(odds, weights, chosen)
    for q in range(5):
        for s, subset in enumerate(chosen):
            w = weights[q, subset] / weights[q, subset].sum()
            tokens = odds[q][np.isfinite(odds[q]).all(1)]
            wanted = -np.mean(np.log(np.exp(tokens[:, subset]) @ w))
            assert losses[q, s] == pytest.approx(wanted)


def test_an_impossible_token_stays_finite() -> None:
    """A member that gives the right token no chance at all costs much, not infinitely much."""
    odds = np.array([[[-np.inf, -1.0]]])
    odds = np.where(np.isinf(odds), -1e9, odds)
    losses = subset_losses(odds, np.full((1, 2), 0.5), subsets(2))
    assert np.isfinite(losses).all()
    assert losses[0, 2] == pytest.approx(1 + np.log(2))


def test_an_answer_is_wrong_if_any_token_is_not_the_likeliest() -> None:
    """Two questions of two and one tokens, members that are right about one each."""
    right, wrong = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.2, 0.8]).log()
    members = [torch.stack([right, right, wrong]), torch.stack([right, wrong, right])]
    targets, question = torch.tensor([0, 0, 0]), torch.tensor([0, 0, 1])
    errors = subset_errors(members, targets, question, np.full((2, 2), 0.5), subsets(2))
    assert errors.tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


def test_a_curve_that_follows_the_law_is_fitted() -> None:
    """Losses of subsets made by L0 - b + b/n^a give back its constants and an R² of 1."""
    chosen = subsets(8)
    losses = 2.0 - 1.2 + 1.2 / chosen.sum(1) ** 0.7
    curve = fit_curve(losses, chosen, seed=0, num_resamples=5)
    assert curve.num_members == tuple(range(1, 9))
    assert curve.law is not None
    assert curve.law.law.a == pytest.approx(0.7, abs=0.01)
    assert curve.law.law.b == pytest.approx(1.2, abs=0.02)
    assert curve.r2 == pytest.approx(1.0, abs=1e-6)


def test_two_members_have_a_curve_without_a_law() -> None:
    """Three constants cannot be fitted to two sizes."""
    curve = fit_curve(np.array([1.0, 2.0, 0.5]), subsets(2), seed=0, num_resamples=2)
    assert curve.law is None
    assert curve.losses == (1.5, 0.5)


def test_explained_variance() -> None:
    """1 for a perfect prediction, 0 for the mean, nothing where there is no variance."""
    assert explained([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1
    assert explained([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]) == 0
    assert explained([2.0, 2.0], [2.0, 2.0]) is None
