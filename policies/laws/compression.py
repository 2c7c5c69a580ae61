"""What structured compression costs in loss and gains in speed.

Sengupta, Chaudhary and Chakraborty 2025, "Compression Laws for Large Language Models". The
constants are the ones they publish, from over 1,000 runs on eight models of 0.5B to 14B
parameters. r is the share of parameters removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from policies.errors import LawError
from policies.laws.fitting import Constant, Fitted, Number, fit_law, power


@dataclass(frozen=True, kw_only=True)
class CompressionLaw:
    """P = P0^α (1 + r)^β: performance (accuracy) after compression, without recovery training."""

    alpha: float
    beta: float

    PUBLISHED: ClassVar[CompressionLaw]

    def predict(self, base_performance: Number, compression_ratio: Number) -> Number:
        """Return the performance at `compression_ratio` r in [0, 1)."""
        return power(base_performance, self.alpha) * power(1 + compression_ratio, self.beta)

    def critical_ratio(self, kept_share: float) -> float:
        """Return r_critical(σ) = σ^(1/β) - 1, the ratio up to which the share σ can be kept.

        Above it no amount of recovery data restores σ of the base's performance.
        """
        return _critical_ratio(kept_share, self.beta)

    @classmethod
    def fit(
        cls,
        *,
        base_performances: Sequence[float],
        compression_ratios: Sequence[float],
        performances: Sequence[float],
        seed: int = 0,
        num_resamples: int = 200,
    ) -> Fitted[CompressionLaw]:
        """Fit both exponents to measurements, by relative error."""
        return fit_law(
            cls,
            at={"base_performance": base_performances, "compression_ratio": compression_ratios},
            losses=performances,
            constants=(
                Constant(name="alpha", starts=(1.0,), positive=False),
                Constant(name="beta", starts=(-1.0,), positive=False),
            ),
            scale="log",
            seed=seed,
            num_resamples=num_resamples,
        )


CompressionLaw.PUBLISHED = CompressionLaw(alpha=1.01, beta=-1.05)


@dataclass(frozen=True, kw_only=True)
class RecoveryLaw:
    """P = P0^α (1 + r)^β (1 + 1/(D + 1))^γ: performance after recovery training on D.

    The unit of D is that of the fit; D = 0 is no recovery training, and the last factor tends to
    one as D grows, which is why `critical_ratio` does not depend on D.
    """

    alpha: float
    beta: float
    gamma: float

    PUBLISHED: ClassVar[RecoveryLaw]

    def predict(
        self, base_performance: Number, compression_ratio: Number, recovery_data: Number
    ) -> Number:
        """Return the performance at `compression_ratio` after training on `recovery_data`."""
        return (
            power(base_performance, self.alpha)
            * power(1 + compression_ratio, self.beta)
            * power(1 + 1 / (recovery_data + 1), self.gamma)
        )

    def critical_ratio(self, kept_share: float) -> float:
        """Return r_critical(σ) = σ^(1/β) - 1: above it no recovery data restores the share σ."""
        return _critical_ratio(kept_share, self.beta)

    @classmethod
    def fit(
        cls,
        *,
        base_performances: Sequence[float],
        compression_ratios: Sequence[float],
        recovery_data: Sequence[float],
        performances: Sequence[float],
        seed: int = 0,
        num_resamples: int = 200,
    ) -> Fitted[RecoveryLaw]:
        """Fit the three exponents to measurements, by relative error."""
        return fit_law(
            cls,
            at={
                "base_performance": base_performances,
                "compression_ratio": compression_ratios,
                "recovery_data": recovery_data,
            },
            losses=performances,
            constants=(
                Constant(name="alpha", starts=(1.0,), positive=False),
                Constant(name="beta", starts=(-1.0,), positive=False),
                Constant(name="gamma", starts=(-0.1,), positive=False),
            ),
            scale="log",
            seed=seed,
            num_resamples=num_resamples,
        )


RecoveryLaw.PUBLISHED = RecoveryLaw(alpha=0.98, beta=-1.03, gamma=-0.14)


@dataclass(frozen=True, kw_only=True)
class RuntimeLaw:
    """T = T0 (1 + r)^κ: inference time after compression; κ = -0.67 published."""

    kappa: float

    PUBLISHED: ClassVar[RuntimeLaw]

    def predict(self, base_runtime_s: Number, compression_ratio: Number) -> Number:
        """Return the time in seconds at `compression_ratio`."""
        return base_runtime_s * power(1 + compression_ratio, self.kappa)

    def speedup(self, compression_ratio: float) -> float:
        """Return how many times faster the compressed model answers."""
        return float(power(1 + compression_ratio, -self.kappa))

    @classmethod
    def fit(
        cls,
        *,
        base_runtimes_s: Sequence[float],
        compression_ratios: Sequence[float],
        runtimes_s: Sequence[float],
        seed: int = 0,
        num_resamples: int = 200,
    ) -> Fitted[RuntimeLaw]:
        """Fit κ to measured times, by relative error."""
        return fit_law(
            cls,
            at={"base_runtime_s": base_runtimes_s, "compression_ratio": compression_ratios},
            losses=runtimes_s,
            constants=(Constant(name="kappa", starts=(-0.7,), positive=False),),
            scale="log",
            seed=seed,
            num_resamples=num_resamples,
        )


RuntimeLaw.PUBLISHED = RuntimeLaw(kappa=-0.67)


def _critical_ratio(kept_share: float, beta: float) -> float:
    if not 0 < kept_share <= 1:
        raise LawError(f"kept_share: {kept_share} is not in (0, 1]")
    return float(kept_share ** (1 / beta) - 1)
