"""Ways of adapting beside plain ones: under noise, and a few parameters at a time.

Low-rank adapters with a posterior (MonteCLoRA, Seth et al. 2025): trained under noise that is
learned, and drawn from afterwards, so that one training gives several members.

Each factor A is a mean with Gaussian noise, whose deviation per row of A is learned (a Wishart
draw around it) and which is mixed of several components by weights from a learned Dirichlet, all
held to a prior by their divergence (equations 6 to 12 there). The components share one covariance:
given the weights π, Σ_k π_k z_k is one Gaussian of deviation ‖π‖, and is drawn as one. The mean
alone is a plain adapter.

Selective updates (ID3, Agarwal et al. 2025, "Step-by-Step Unmasking"): few parameters learn, and
which ones is decided on the way. Every step lets a few more parameters learn, those that are
highest by |gradient| / (|weight| + ε)^x just then (the paper's D3, section 3.2), until a share of
all does; what has been let learn goes on. With the exponent 0 the gradient alone decides, with a
large one small weights come first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet, kl_divergence
from transformers import PreTrainedModel

from models.training.loop import Method
from models.training.lora import LowRank, low_rank_modules
from models.training.settings import MonteCarloSettings, UnmaskSettings

# Below, logarithms and square roots of what was drawn have no gradient to speak of.
_LEAST_VARIANCE = 1e-3


class Posterior(LowRank):
    """What is added to one matrix: by the mean, or while `noise` is there by a draw around it."""

    def __init__(self, weight: Tensor, rank: int, scale: float, prior: MonteCarloSettings) -> None:
        super().__init__(weight, rank, scale)
        self._prior = prior
        # A Wishart draw of r degrees of freedom is about r on its diagonal.
        self.log_deviation = nn.Parameter(torch.full((rank,), -0.5 * math.log(rank)))
        self.log_concentration = nn.Parameter(torch.zeros(prior.components))
        self._noise: tuple[Tensor, Tensor, Tensor] | None = None

    def draw(self, generator: torch.Generator) -> None:
        """Take noise for the mean, the variances and the weights of the components."""
        rank = len(self.shrink)
        like = self.shrink
        shapes = (like.shape, (rank, rank), (self._prior.components,))
        mean, roots, logits = (
            torch.randn(shape, generator=generator).to(like.device, like.dtype) for shape in shapes
        )
        self._noise = mean, roots.square().sum(1), logits

    def settle(self) -> None:
        """Be the mean again."""
        self._noise = None

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A, as drawn, and B."""
        if self._noise is None:
            return self.shrink, self.expand
        mean, _, logits = self._noise
        deviation_r = self._variances().sqrt() * self._prior.deviation
        mixed = self._weights(logits).norm()
        return self.shrink + mixed * deviation_r[:, None] * mean, self.expand

    def divergence(self) -> Tensor:
        """Return how far the posterior is from the prior, in nats; of what is drawn now."""
        rank = len(self.shrink)
        posterior = Dirichlet(self.log_concentration.exp())
        prior = Dirichlet(torch.full_like(self.log_concentration, self._prior.concentration))
        log_r = 2 * self.log_deviation
        wishart = 0.5 * rank * (log_r.exp() - log_r - 1).sum()
        variance_r = self._variances()
        gaussian = 0.5 * self._prior.components * (variance_r - variance_r.log() - 1).sum()
        divergence: Tensor = kl_divergence(posterior, prior)
        return divergence + wishart + gaussian

    def _variances(self) -> Tensor:
        assert self._noise is not None, "nothing has been drawn"
        return ((2 * self.log_deviation).exp() * self._noise[1]).clamp_min(_LEAST_VARIANCE)

    def _weights(self, logits: Tensor) -> Tensor:
        """Return a draw of the components' weights, by the Dirichlet's Laplace approximation in
        the space of logits, which has a gradient (Srivastava and Sutton 2017)."""
        num, inverse = len(logits), (-self.log_concentration).exp()
        mean = self.log_concentration - self.log_concentration.mean()
        variance = inverse * (1 - 2 / num) + inverse.sum() / num**2
        return (mean + variance.sqrt() * logits).softmax(0)


class MonteCarlo(Method):
    """Trains the posteriors on a model: new noise for every step, the same for all of its rows."""

    def __init__(self, prior: MonteCarloSettings, *, seed: int) -> None:
        self._prior, self._seed = prior, seed

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `Method`."""
        return {"monte_carlo": self._prior.model_dump(exclude={"members"})}

    @contextmanager
    def step(self, model: PreTrainedModel, step: int) -> Iterator[None]:
        """See `Method`."""
        with drawn(model, seed=self._seed, draw=step):
            yield

    def penalty(self, model: PreTrainedModel) -> Tensor:
        """See `Method`."""
        divergences = [module.divergence() for module in posteriors(model)]
        return self._prior.weight * torch.stack(divergences).sum()


@contextmanager
def drawn(model: PreTrainedModel, *, seed: int, draw: int) -> Iterator[None]:
    """Have the posteriors on `model` be a draw, always the same of this seed and number."""
    generator = torch.Generator().manual_seed((seed << 32) + draw)
    for module in posteriors(model):
        module.draw(generator)
    try:
        yield
    finally:
        for module in posteriors(model):
            module.settle()


def posteriors(model: PreTrainedModel) -> list[Posterior]:
    """Return the adapters on `model` that have a posterior."""
    return [m for m in low_rank_modules(model).values() if isinstance(m, Posterior)]


class Unmasking(Method):
    """Lets a share of the parameters learn, as many more with each of `num_steps` steps.

    For AdamW without weight decay, which would move those that do not learn. Its second moments
    tell who has learned, so that a run that is resumed goes on with the same parameters.
    """

    def __init__(self, settings: UnmaskSettings, *, num_steps: int) -> None:
        self._settings, self._num_steps = settings, num_steps

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `Method`."""
        return {"unmask": self._settings.model_dump()}

    @torch.no_grad()
    def before_update(self, step: int, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Choose who learns from this step on, and take the others' gradients away."""
        learned = [
            (parameter, parameter.grad, _has_learned(optimizer, parameter))
            for optimizer in optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        num_parameters = sum(parameter.numel() for parameter, _, _ in learned)
        wanted = round(
            self._settings.share * num_parameters * min(1.0, (step + 1) / self._num_steps)
        )
        num_new = wanted - sum(int(mask.sum()) for _, _, mask in learned)
        bar = torch.inf
        if num_new > 0:
            scores = torch.cat([
                torch.where(mask, -torch.inf, self._score(parameter, gradient)).flatten()
                for parameter, gradient, mask in learned
            ])  # fmt: skip
            bar = scores.topk(num_new).values[-1].item()
        for parameter, gradient, mask in learned:
            gradient.mul_(mask | (self._score(parameter, gradient) >= bar))

    def _score(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        settings = self._settings
        return gradient.abs() / (parameter.abs() + settings.epsilon) ** settings.exponent


def _has_learned(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """Return where AdamW has ever had a gradient of `parameter`."""
    moment = optimizer.state.get(parameter, {}).get("exp_avg_sq")
    return torch.zeros_like(parameter, dtype=torch.bool) if moment is None else moment > 0
