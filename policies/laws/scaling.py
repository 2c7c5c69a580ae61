"""Scaling laws: loss against parameters, training tokens and shape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from policies.laws.fitting import Number, power


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A transformer's width and depth, with the parameters of its layers.

    `intermediate_ratio` is d_ff / d_model.
    """

    d_model: int
    num_layers: int
    intermediate_ratio: float = 2.7

    @property
    def aspect_ratio(self) -> float:
        """R = d_model / n_layers, the law's shape variable."""
        return self.d_model / self.num_layers

    @property
    def layer_parameters(self) -> float:
        """Parameters of all layers: attention 4·d² and a gated MLP of 3·d·d_ff each."""
        return self.num_layers * self.d_model**2 * (4 + 3 * self.intermediate_ratio)


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


def shapes_of_size(
    parameters: float,
    *,
    depths: Sequence[int] = (8, 12, 16, 20, 24, 32, 40),
    head_dim: int = 64,
    intermediate_ratio: float = 2.7,
) -> tuple[Shape, ...]:
    """Return, for each depth, the shape whose layers come closest to `parameters`.

    d_model is a multiple of `head_dim`; embeddings are not counted.
    """
    shapes = []
    for num_layers in depths:
        width = (parameters / (num_layers * (4 + 3 * intermediate_ratio))) ** 0.5
        d_model = max(head_dim, round(width / head_dim) * head_dim)
        shapes.append(
            Shape(d_model=d_model, num_layers=num_layers, intermediate_ratio=intermediate_ratio)
        )
    return tuple(shapes)
