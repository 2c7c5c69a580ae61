"""Drawing tokens: filters against transformers' processors, frequencies, seeds, penalties."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from models.engines.base import SamplingOptions
from models.engines.stacked.sampler import SamplerState, draw


class Uniform(random.Random):
    """A generator that returns the numbers it is given."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self._values = list(values)

    def random(self) -> float:
        """Return the next."""
        return self._values.pop(0)


def state(rng: random.Random | None = None, **options: Any) -> SamplerState:
    """Sampling state with a seeded generator."""
    return SamplerState(SamplingOptions(**options), None, rng or random.Random(0))


def reference(logp: Tensor, options: SamplingOptions) -> Tensor:
    """Return the probabilities after transformers' filters, in its order."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(options.temperature)])
    if options.top_k is not None:
        processors.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        processors.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        processors.append(MinPLogitsWarper(options.min_p))
    return processors(torch.zeros(1, 1, dtype=torch.long), logp[None].clone())[0].softmax(-1)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    vocab_size=st.sampled_from([7, 300, 1000]),
    temperature=st.floats(0.2, 2),
    top_k=st.one_of(st.none(), st.integers(1, 600)),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
    min_p=st.one_of(st.none(), st.floats(0.001, 0.5)),
)
def test_filters_are_those_of_transformers(
    seed: int, vocab_size: int, **given_options: Any
) -> None:
    """The set of tokens that can be drawn, and each one's share, are transformers' (a token at
    the very edge of top_p or min_p may fall on either side of rounding)."""
    logp = (torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * 2).log_softmax(
        -1
    )
    options = SamplingOptions(**given_options)
    expected = reference(logp, options)
    points = [(i + 0.5) / 250 for i in range(250)]
    batch = logp.expand(len(points), -1)
    drawn = draw(batch, [SamplerState(options, None, Uniform(u)) for u in points]).token_ids
    shares = torch.bincount(torch.tensor(drawn), minlength=vocab_size) / len(points)
    # Every draw is a quantile, so shares are within one step; at most one token is on the edge.
    off = (shares - expected).abs() > 2 / 250 + 0.02 * expected
    assert off.sum() <= 1
    assert (expected[shares > 0] == 0).sum() <= 1


def test_frequencies() -> None:
    """Seed 1: 20,000 draws follow the distribution (chi-square, p > 0.001), with and without
    filters that keep everything."""
    logp = torch.tensor([0.4, 0.3, 0.2, 0.05, 0.05], dtype=torch.float64).log()
    rng = random.Random(1)
    for options in ({}, {"top_k": 5}, {"min_p": 1e-6}):
        states = [state(rng, **options) for _ in range(20_000)]
        counts = torch.bincount(torch.tensor(draw(logp.expand(20_000, -1), states).token_ids))
        assert chisquare(counts.numpy(), (logp.exp() * 20_000).numpy()).pvalue > 0.001


def test_rows_do_not_depend_on_each_other() -> None:
    """A seeded row's draws are the same alone and among rows of every other kind."""
    logp = torch.randn(6, 500, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"seed": 1},
        {"seed": 2, "top_p": 0.5},
        {"seed": 3, "top_k": 400, "temperature": 0.3},
        {"seed": 4, "frequency_penalty": 1.0},
        {"seed": 5, "min_p": 0.1, "logit_bias": {3: 20.0}},
    ]

    def states() -> list[SamplerState]:
        return [state(random.Random(kind.get("seed")), **kind) for kind in kinds]

    together = draw(logp, states())
    for row, alone in enumerate(states()):
        one = draw(logp[row : row + 1], [alone])
        assert one.token_ids[0] == together.token_ids[row]
        assert one.logprobs[0] == pytest.approx(together.logprobs[row])


def test_penalties_and_bias() -> None:
    """Presence counts once, frequency per occurrence, bias always; logprobs are those before."""
    logp = torch.tensor([[2.0, 1.9, 0.0, -1.0]]).log_softmax(-1)
    penalised = state(temperature=0.0, presence_penalty=0.05, frequency_penalty=0.04)
    tokens = []
    for _ in range(4):
        drawn = draw(logp, [penalised])
        assert drawn.logprobs[0] == pytest.approx(float(logp[0, drawn.token_ids[0]]))
        tokens += drawn.token_ids
        penalised.accept(drawn.token_ids[0])
    # 0 falls to 1.91, then 1.87; 1 falls to 1.81 after one draw.
    assert tokens == [0, 0, 1, 0]
    biased = state(temperature=0.0, logit_bias={3: 100.0, 0: -100.0})
    assert draw(logp, [biased]).token_ids == [3]


def test_alternatives() -> None:
    """`top_logprobs` returns that many, best first, and none where not asked for."""
    logp = torch.tensor([[0.1, 0.7, 0.2]] * 3).log()
    drawn = draw(logp, [state(top_logprobs=2), state(), state(top_logprobs=20)])
    assert [[token for token, _ in top] for top in drawn.top] == [[1, 2], [], [1, 2, 0]]


def test_entropy_is_the_distributions_own() -> None:
    """Each row's entropy in nats is before temperature and bias, and 0 for a sure row."""
    logp = torch.tensor([[0.5, 0.5, 1e-12], [1.0, 1e-12, 1e-12]]).log()
    drawn = draw(logp, [state(temperature=0.1), state(logit_bias={1: 100.0})])
    assert drawn.entropies == pytest.approx([0.6931, 0.0], abs=1e-4)


def test_tiny_temperatures_are_greedy() -> None:
    """A temperature that would overflow a division takes the likeliest token."""
    logp = torch.tensor([[0.3, 0.4, 0.3]]).log()
    assert draw(logp, [state(temperature=1e-30)]).token_ids == [1]
