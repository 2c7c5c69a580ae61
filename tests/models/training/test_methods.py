"""Ways of training an adapter: few parameters learn (ID3), or a posterior does (MonteCLoRA)."""

import copy
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from peft.tuners.lora.monteclora import MontecloraSampler
from torch.distributions import Dirichlet, kl_divergence

from models.downscale.adapt import adapt
from models.downscale.recipe import AdaptSettings
from models.training.loop import Method
from models.training.lora import LowRank, add_adapter, low_rank_modules
from models.training.monte_carlo import MonteCarlo, Posterior, Unmasking, drawn, posteriors
from models.training.settings import DistillSettings, MonteCarloSettings, UnmaskSettings
from tests.models.downscale.tiny_models import random_conversations, tiny_model

PRIOR = MonteCarloSettings(deviation=0.05, components=3, concentration=0.7, weight=1e-3)
SETTINGS = AdaptSettings(
    rows_per_step=4, row_tokens=32, compiled=False, precision="float32", device="cpu",
    optimizer="adamw", learning_rate=0.01, weight_decay=0.0, clip_norm=1e9,
    distill=DistillSettings(weight=0.0), checkpoint_every_s=1e-6,
)  # fmt: skip
NUM_STEPS = 10


def adapted(kind=LowRank):
    """A tiny model with a fresh adapter of rank 4."""
    model = tiny_model("llama")
    add_adapter(model, rank=4, alpha=8, seed=1, kind=kind)
    return model


def train(model, method=lambda _: Method(), **options):
    """Train for ten steps."""
    tokens = NUM_STEPS * SETTINGS.rows_per_step * SETTINGS.row_tokens
    corpus = random_conversations(60)
    adapt(
        model, corpus, (), general_share=0.0, tokens=tokens, settings=SETTINGS, seed=3,
        method=method, **options,
    )  # fmt: skip
    return model


def learnable(model):
    """All that learns, one after the other."""
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


UNMASK = UnmaskSettings(share=0.2, exponent=0.5, epsilon=0.01)
METHODS = {
    "unmask": (
        LowRank, lambda n: Unmasking(UNMASK, num_steps=n),
    ),
    "monte_carlo": (partial(Posterior, prior=PRIOR), lambda _: MonteCarlo(PRIOR, seed=5)),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "method"), METHODS.values(), ids=METHODS)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(kind, method, tmp_path):
    """Stopped after four steps and resumed, a run ends with the same weights, bit by bit."""

    def stop(progress):
        if progress.step == 4:
            raise KeyboardInterrupt

    whole = train(adapted(kind), method, folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(adapted(kind), method, folder=tmp_path / "broken", watch=stop)
    resumed = train(adapted(kind), method, folder=tmp_path / "broken")
    assert torch.equal(learnable(whole), learnable(resumed))


def test_a_share_of_the_parameters_learns():
    """As many as the share says differ at the end, more with every step, and those that were let
    learn at the first step are the highest by the formula, worked out here again."""
    fresh = adapted()
    before, changed = learnable(fresh), []
    gradients = {}

    class Watched(Unmasking):
        def before_update(self, step, optimizers):
            if not gradients:
                gradients.update(
                    {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
                )
            super().before_update(step, optimizers)

    model = copy.deepcopy(fresh)
    train(
        model,
        lambda n: Watched(UnmaskSettings(share=0.2, exponent=1.0, epsilon=0.1), num_steps=n),
        watch=lambda _: changed.append(learnable(model) != before),
    )
    num = [int(mask.sum()) for mask in changed]
    assert num == sorted(num) and num[0] == pytest.approx(0.02 * len(before), rel=0.02)
    assert num[-1] == pytest.approx(0.2 * len(before), rel=0.02)
    assert all((earlier <= later).all() for earlier, later in pairwise(changed))
    scores = torch.cat([
        (gradients[n].abs() / (p.abs() + 0.1)).flatten()
        for n, p in fresh.named_parameters() if p.requires_grad
    ])  # fmt: skip
    assert set(scores.topk(num[0]).indices.tolist()) == set(changed[0].nonzero().flatten().tolist())


def test_all_parameters_are_plain_training():
    """Where every parameter learns from the first step on, nothing is different."""
    every = UnmaskSettings(share=1.0, exponent=0.0, epsilon=1.0)
    method = lambda _: Unmasking(every, num_steps=1)  # noqa: E731
    assert torch.equal(learnable(train(adapted())), learnable(train(adapted(), method)))


def test_the_mean_is_a_plain_adapter_and_draws_lie_around_it():
    """Outside of a draw the posterior adds what a plain adapter of its factors does. Draws have
    the mean's expectation and the deviation that the formula gives, and are the same of the same
    number."""
    model = adapted(partial(Posterior, prior=PRIOR))
    for module in posteriors(model):
        torch.nn.init.normal_(module.expand)
    module = posteriors(model)[0]
    shrink, expand = module.factors
    assert shrink is module.shrink and expand is module.expand
    draws = []
    for number in range(400):
        with drawn(model, seed=2, draw=number):
            draws.append(module.factors[0].detach().clone())
    with drawn(model, seed=2, draw=7):
        assert torch.equal(module.factors[0], draws[7])
    noise = torch.stack(draws) - module.shrink.detach()
    deviation = noise.std().item()
    # Variances of one in the mean, mixed by weights whose norm is between 1/sqrt(3) and 1.
    assert 0.05 / math.sqrt(3) < deviation < 0.05
    assert noise.mean().abs().item() < 4 * deviation / math.sqrt(noise.numel())


def test_the_divergence_is_pefts_but_for_its_dirichlet():
    """Wishart and Gaussian terms are those of PEFT's `monteclora`; the Dirichlet's is torch's, and
    all are gone where the posterior is the prior."""
    module = Posterior(torch.zeros(6, 5), 4, 1.0, PRIOR)
    torch.nn.init.normal_(module.log_deviation)
    torch.nn.init.normal_(module.log_concentration)
    module.draw(torch.Generator().manual_seed(0))
    theirs = MontecloraSampler(5, 4, PRIOR.components, device="cpu", buffer_size=1)
    deviation = torch.diag(module.log_deviation.exp())
    variances = module.log_deviation.exp().square() * module._noise[1]
    dirichlet = kl_divergence(
        Dirichlet(module.log_concentration.exp()),
        Dirichlet(torch.full((PRIOR.components,), PRIOR.concentration)),
    )
    wanted = (
        dirichlet
        + theirs.wishart_kl(deviation)
        + theirs.multivariate_kl(torch.diag(variances.clamp_min(1e-3)))
    )
    torch.testing.assert_close(module.divergence(), wanted)


def test_training_learns_the_noise_and_the_loss_holds_it_to_the_prior():
    """A heavy divergence brings the deviations to where the prior has them; a run leaves the mean
    in force, on every adapter."""
    heavy = MonteCarloSettings(deviation=0.05, components=3, concentration=0.7, weight=10.0)
    model = adapted(partial(Posterior, prior=heavy))
    for module in posteriors(model):
        torch.nn.init.constant_(module.log_deviation, 1.0)
    distance = [m.log_deviation.abs().mean().item() for m in posteriors(model)]
    train(model, lambda _: MonteCarlo(heavy, seed=1))
    for module, before in zip(posteriors(model), distance, strict=True):
        assert module.log_deviation.abs().mean().item() < before
        assert module.factors[0] is module.shrink
    assert len(low_rank_modules(model)) == len(posteriors(model))
