"""Scaling laws: loss against parameters and training tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from policies.laws.fitting import Constant, Fitted, Number, fit_law, power

# Sengupta et al. 2025, eq. 10: performance grows with carbon to this power.
PERFORMANCE_CARBON_EXPONENT = 0.08


@dataclass(frozen=True, kw_only=True)
class Kaplan:
    """L(N, D) = [(Nc/N)^(αN/αD) + Dc/D]^αD (Kaplan et al. 2020; Sengupta et al. 2025, eq. 1).

    N in parameters, D in tokens, L in nats per token. Constants depend on data and tokenizer and
    must be fitted.
    """

    Nc: float
    Dc: float
    alpha_N: float
    alpha_D: float

    def predict(self, parameters: Number, tokens: Number) -> Number:
        """Return the loss in nats per token."""
        capacity: Number = power(self.Nc / parameters, (self.alpha_N / self.alpha_D))
        return power(capacity + self.Dc / tokens, self.alpha_D)

    @classmethod
    def fit(
        cls,
        *,
        parameters: Sequence[float],
        tokens: Sequence[float],
        losses: Sequence[float],
        seed: int = 0,
        num_resamples: int = 200,
    ) -> Fitted[Kaplan]:
        """Fit the four constants to measured losses, by relative error."""
        return fit_law(
            cls,
            at={"parameters": parameters, "tokens": tokens},
            losses=losses,
            constants=(
                Constant(name="Nc", starts=(1e13, 1e9, 1e6)),
                Constant(name="Dc", starts=(1e13, 1e9, 1e6)),
                Constant(name="alpha_N", starts=(0.08, 0.2)),
                Constant(name="alpha_D", starts=(0.1, 0.2)),
            ),
            scale="log",
            seed=seed,
            num_resamples=num_resamples,
        )


@dataclass(frozen=True, kw_only=True)
class Chinchilla:
    """L(N, D) = A/N^α + B/D^β + E (Hoffmann et al. 2022; Sengupta et al. 2025, eq. 2).

    N in parameters, D in tokens, L in nats per token; E is the irreducible loss. Constants depend
    on data and tokenizer and must be fitted.
    """

    A: float
    B: float
    E: float
    alpha: float
    beta: float

    def predict(self, parameters: Number, tokens: Number) -> Number:
        """Return the loss in nats per token."""
        return self.A / power(parameters, self.alpha) + self.B / power(tokens, self.beta) + self.E

    @classmethod
    def fit(
        cls,
        *,
        parameters: Sequence[float],
        tokens: Sequence[float],
        losses: Sequence[float],
        seed: int = 0,
        num_resamples: int = 200,
    ) -> Fitted[Chinchilla]:
        """Fit the five constants to measured losses, by relative error."""
        floor = float(min(losses))
        return fit_law(
            cls,
            at={"parameters": parameters, "tokens": tokens},
            losses=losses,
            constants=(
                Constant(name="A", starts=(400.0, 20.0, 5000.0)),
                Constant(name="B", starts=(400.0, 20.0, 50000.0)),
                Constant(name="E", starts=(0.8 * floor, 0.4 * floor)),
                Constant(name="alpha", starts=(0.34, 0.2, 0.5)),
                Constant(name="beta", starts=(0.28, 0.2, 0.5)),
            ),
            scale="log",
            seed=seed,
            num_resamples=num_resamples,
        )


def performance_gain_carbon_factor(
    performance_factor: float, exponent: float = PERFORMANCE_CARBON_EXPONENT
) -> float:
    """Return how many times the carbon a `performance_factor` times better model costs.

    P ∝ CO2eq^α, so CO2eq grows with P^(1/α) (Sengupta et al. 2025, eq. 7-10, α ≈ 0.08): +10%
    performance costs 1.1^12.5 = 3.29 times the carbon.
    """
    return float(performance_factor ** (1 / exponent))
