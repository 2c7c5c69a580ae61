"""Scaling laws: loss against parameters, training tokens and shape."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from policies.errors import LawError
from policies.laws.fitting import Constant, Fitted, Number, fit_law, power


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A transformer's width and depth."""

    d_model: int
    num_layers: int

    @property
    def aspect_ratio(self) -> float:
        """R = d_model / n_layers, the law's shape variable."""
        return self.d_model / self.num_layers


@dataclass(frozen=True, kw_only=True)
class SharedExponent:
    """L = E + A·N^-α + B·D^-α: Hoffmann et al.'s law with one exponent (Bian et al. 2025)."""

    A: float
    B: float
    E: float
    alpha: float

    PUBLISHED: ClassVar[SharedExponent]

    def predict(self, parameters: Number, tokens: Number) -> Number:
        """Return the loss in nats per token."""
        return (
            self.E + self.A * power(parameters, -self.alpha) + self.B * power(tokens, -self.alpha)
        )


SharedExponent.PUBLISHED = SharedExponent(A=7720.62, B=68572.73, E=2.13, alpha=0.49)


@dataclass(frozen=True, kw_only=True)
class InferenceEfficient:
    """L = (E + A·N^-α + B·D^-α)(1 + ε·R^α), R = d_model / n_layers.

    Bian et al. 2025, "Scaling Inference-Efficient Language Models", eq. 4. N in parameters, D in
    tokens, L in nats per token. Wide and shallow (large R) answers sooner and loses little: their
    method ranks shapes by this loss and by measured latency, trains the best few and keeps the
    best. `PUBLISHED` holds their constants, fitted to models of 80M to 339M parameters.
    """

    A: float
    B: float
    E: float
    alpha: float
    epsilon: float

    PUBLISHED: ClassVar[InferenceEfficient]

    def predict(self, parameters: Number, tokens: Number, aspect_ratio: Number) -> Number:
        """Return the loss in nats per token."""
        size = (
            self.E + self.A * power(parameters, -self.alpha) + self.B * power(tokens, -self.alpha)
        )
        return size * (1 + self.epsilon * power(aspect_ratio, self.alpha))


InferenceEfficient.PUBLISHED = InferenceEfficient(
    A=54754.14, B=778340.38, E=2.45, alpha=0.61, epsilon=0.0011
)


@dataclass(frozen=True, kw_only=True)
class RankedShape:
    """A candidate shape with its predicted loss and its latency relative to the deepest one.

    At equal size a decode step reads the same bytes and its latency follows the number of layers
    that run one after another, so `relative_latency` is n_layers over the candidates' largest.
    Replace it by a measurement before training.
    """

    shape: Shape
    loss: float
    relative_latency: float


def rank_shapes(
    shapes: Iterable[Shape], *, parameters: float, tokens: float, law: InferenceEfficient
) -> tuple[RankedShape, ...]:
    """Return the shapes by predicted loss, lowest first (Bian et al. 2025, section 4)."""
    candidates = list(shapes)
    deepest = max((shape.num_layers for shape in candidates), default=1)
    ranked = [
        RankedShape(
            shape=shape,
            loss=law.predict(parameters, tokens, shape.aspect_ratio),
            relative_latency=shape.num_layers / deepest,
        )
        for shape in candidates
    ]
    return tuple(sorted(ranked, key=lambda item: item.loss))


# Of shapes to choose from: their depths, the size of a head, and d_ff / d_model.
_DEPTHS = (8, 12, 16, 20, 24, 32, 40)
_HEAD_DIM = 64
_INTERMEDIATE_RATIO = 2.7


def shapes_of_size(parameters: float) -> tuple[Shape, ...]:
    """Return, for each depth, the shape whose layers come closest to `parameters`.

    A layer has 4·d² of attention and 3·d·d_ff of a gated MLP; embeddings are not counted.
    """
    shapes = []
    for num_layers in _DEPTHS:
        width = (parameters / (num_layers * (4 + 3 * _INTERMEDIATE_RATIO))) ** 0.5
        d_model = max(_HEAD_DIM, round(width / _HEAD_DIM) * _HEAD_DIM)
        shapes.append(Shape(d_model=d_model, num_layers=num_layers))
    return tuple(shapes)


# Sengupta et al. 2025, section 4: loose values for illustration, not fitted to language models.
PAPER_LOOSE_A = 0.83
PAPER_LOOSE_B = 0.83
# Quoted there for Llama-3-8B from P2 (Chen et al. 2024); N0 in billions.
PAPER_LLAMA3_8B_GAMMA = 1.08
PAPER_LLAMA3_8B_DELTA = 0.29


@dataclass(frozen=True, kw_only=True)
class EnsembleLaw:
    """L(n) = L0 - b + b/n^a (Lobacheva et al. 2020; Sengupta et al. 2025, eq. 12 and 26).

    n members, L in whatever is averaged: nats per token, or the share of wrong answers. L(1) = L0
    and the limit is L0 - b. Fit it to your own measurements.
    """

    L0: float
    a: float
    b: float

    def predict(self, num_members: Number) -> Number:
        """Return the loss of an ensemble of `num_members`."""
        return self.L0 - self.b + self.b / power(num_members, self.a)

    def gain(self, num_members: int) -> float:
        """Return how much lower the loss of `num_members` is than that of one: b (1 - n^-a)."""
        return self.b * (1 - power(num_members, -self.a))

    def optimal_members(self, price: float, cost_per_member: float) -> float:
        """Return n* = (a·b / (λ·c))^(1/(a+1)), where one more member stops paying for itself.

        `price` λ is in loss per unit of cost, `cost_per_member` c in units of cost. The gain's
        derivative a·b/n^(a+1) meets λ·c there. At least 1; infinite where members are free.
        """
        marginal_cost = price * cost_per_member
        if self.a <= 0 or self.b <= 0:
            return 1.0
        if marginal_cost <= 0:
            return math.inf
        return float(max(1.0, (self.a * self.b / marginal_cost) ** (1 / (self.a + 1))))

    @classmethod
    def fit(
        cls,
        *,
        num_members: Sequence[float],
        losses: Sequence[float],
        seed: int = 0,
        num_resamples: int = 200,
    ) -> Fitted[EnsembleLaw]:
        """Fit L0, a and b to measured losses of ensembles of different sizes."""
        if len(set(num_members)) < 3:
            raise LawError("num_members: three constants need at least three different sizes")
        spread = max(float(max(losses) - min(losses)), 1e-6)
        return fit_law(
            cls,
            at={"num_members": num_members},
            losses=losses,
            constants=(
                Constant(name="L0", starts=(float(max(losses)),)),
                Constant(name="a", starts=(0.8, 0.3, 2.0)),
                Constant(name="b", starts=(spread, 2 * spread)),
            ),
            seed=seed,
            num_resamples=num_resamples,
        )


def ensemble_margin(
    num_members: int,
    base_parameters: float,
    *,
    a: float = PAPER_LOOSE_A,
    b: float = PAPER_LOOSE_B,
    gamma: float = PAPER_LLAMA3_8B_GAMMA,
    delta: float = PAPER_LLAMA3_8B_DELTA,
    parameter_unit: float = 1e9,
) -> float:
    """Return left minus right side of Proposition 4.1; the ensemble beats its base where >= 0.

    ((n^a - 1)/n^(a+γ))·(n - 1)^γ >= 1/(b·N0^δ) (Sengupta et al. 2025, eq. 13), for n chunks of
    N0/n parameters each. **The unit of N0 is part of the law**: with N0 = 8 (billions) it holds
    from n = 7, with N0 = 8e9 from n = 2. `base_parameters` are plain parameters and
    `parameter_unit` says what N0 counts; the paper's example counts billions. The defaults are the
    paper's illustration for Llama-3-8B, not constants of language models in general.
    """
    n, N0 = num_members, base_parameters / parameter_unit
    left = (n**a - 1) / n ** (a + gamma) * (n - 1) ** gamma
    right = 1 / (b * N0**delta)
    return float(left - right)


def smallest_winning_ensemble(
    base_parameters: float,
    *,
    a: float = PAPER_LOOSE_A,
    b: float = PAPER_LOOSE_B,
    gamma: float = PAPER_LLAMA3_8B_GAMMA,
    delta: float = PAPER_LLAMA3_8B_DELTA,
    parameter_unit: float = 1e9,
    max_members: int = 4096,
) -> int | None:
    """Return the smallest n that satisfies Proposition 4.1 (`ensemble_margin`), or None."""
    for n in range(2, max_members + 1):
        margin = ensemble_margin(
            n, base_parameters, a=a, b=b, gamma=gamma, delta=delta, parameter_unit=parameter_unit
        )
        if margin >= 0:
            return n
    return None
