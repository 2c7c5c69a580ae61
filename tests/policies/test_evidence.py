"""Evidence weights: their special cases, their likelihoods, and what calibration finds."""

import numpy as np
import pytest

from policies.errors import PolicyError
from policies.evidence import (
    HeldOutAnswers,
    calibrate,
    evidence_weights,
    mixture_nll,
)


def test_special_cases() -> None:
    """No temperature to speak of is the prior; no prior power is the softmax of the likelihoods."""
    prior, prompt = np.array([[0.6, 0.3, 0.1]]), np.array([[-20.0, -22.0, -30.0]])
    assert evidence_weights(prior, prompt, temperature=np.inf) == pytest.approx(prior)
    alone = evidence_weights(prior, prompt, temperature=2.0, prior_power=0)
    assert alone == pytest.approx(np.exp([[0, -1, -5]]) / np.exp([0, -1, -5]).sum())
    both = evidence_weights(prior, prompt, temperature=2.0)
    assert both == pytest.approx(prior * alone / (prior * alone).sum())


def test_likelihood_of_a_mixture() -> None:
    """The NLL is that of Σ w p token by token; padding adds nothing; updates follow Bayes."""
    p = np.array([[[0.5, 0.1], [0.2, 0.8]], [[0.3, 0.4], [np.nan, np.nan]]])
    weights = np.array([[0.25, 0.75], [0.5, 0.5]])
    nll = mixture_nll(weights, np.log(p))
    assert nll[0] == pytest.approx(-np.log(0.2) - np.log(0.65))
    assert nll[1] == pytest.approx(-np.log(0.35))
    # With T = 1 the updated mixture is exactly the mixture of whole answers.
    updated = mixture_nll(weights, np.log(p), update_temperature=1.0)
    assert updated[0] == pytest.approx(-np.log(0.25 * 0.5 * 0.2 + 0.75 * 0.1 * 0.8))
    assert updated[1] == pytest.approx(nll[1])


def made_up(seed: int, temperature: float) -> HeldOutAnswers:
    """Draw answers whose best member follows the evidence at a known temperature."""
    rng = np.random.default_rng(seed)
    num_queries, num_members = 1500, 3
    prior = rng.dirichlet(np.ones(num_members), num_queries) + 1e-3
    prompt = rng.normal(-50, 5, (num_queries, num_members))
    weights = evidence_weights(prior, prompt, temperature=temperature)
    best = np.array([rng.choice(num_members, p=row) for row in weights])
    answer = np.full((num_queries, 2, num_members), np.log(0.01))
    answer[np.arange(num_queries), :1, best] = np.log(0.9)
    answer[:, 1] = np.nan
    return HeldOutAnswers(answer_QTM=answer, prompt_QM=prompt, prior_QM=prior)


@pytest.mark.parametrize("temperature", [2.0, 8.0])
def test_calibration_finds_the_temperature(temperature: float) -> None:
    """Where answers follow prior and evidence, their temperature and power come out (seed 0)."""
    found = calibrate(made_up(0, temperature))
    assert found.temperature == pytest.approx(temperature, rel=0.3)
    assert found.prior_power == pytest.approx(1.0, rel=0.3)


def test_calibration_beats_every_special_case() -> None:
    """The calibrated weights make held-out answers likelier than prior or likelihood alone."""
    answers = made_up(1, 4.0)
    found = calibrate(answers)
    for temperature, power in ((np.inf, 1.0), (1.0, 0.0), (1.0, 1.0), (np.inf, 0.0)):
        weights = evidence_weights(
            answers.prior_QM, answers.prompt_QM, temperature=temperature, prior_power=power
        )
        assert found.nll < mixture_nll(weights, answers.answer_QTM).mean()


def test_useless_data_is_refused() -> None:
    """No answers, shapes that don't fit and priors of zero are named."""
    empty, one = np.zeros((0, 1, 2)), np.zeros((1, 1, 2))
    with pytest.raises(PolicyError, match="at least one"):
        HeldOutAnswers(answer_QTM=empty, prompt_QM=np.zeros((0, 2)), prior_QM=np.ones((0, 2)))
    with pytest.raises(PolicyError, match="prompt_QM does not fit"):
        HeldOutAnswers(answer_QTM=one, prompt_QM=np.zeros((1, 3)), prior_QM=np.ones((1, 2)))
    with pytest.raises(PolicyError, match="priors must be > 0"):
        HeldOutAnswers(answer_QTM=one, prompt_QM=np.zeros((1, 2)), prior_QM=np.zeros((1, 2)))
