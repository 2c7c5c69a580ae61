"""What cutting a model costs in loss and gains in speed, and what training it on wins back.

`RecoveryLaw` and `RuntimeLaw` are Sengupta, Chaudhary and Chakraborty 2025, "Compression Laws for
Large Language Models". Their constants are the ones they publish, from over
1,000 runs on eight models of 0.5B to 14B parameters; r is the share of parameters removed.
`PostPruningLaw` (P2) and `MixtureLaw` (D-CPT) must be fitted to one's own measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from policies.errors import LawError
from policies.laws.fitting import Constant, Fitted, Number, fit_law, power


@dataclass(frozen=True, kw_only=True)
class RecoveryLaw:
    """P = P0^α (1 + r)^β (1 + 1/(D + 1))^γ: accuracy after recovery training on D.

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
        if not 0 < kept_share <= 1:
            raise LawError(f"kept_share: {kept_share} is not in (0, 1]")
        return float(kept_share ** (1 / self.beta) - 1)


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


RuntimeLaw.PUBLISHED = RuntimeLaw(kappa=-0.67)


@dataclass(frozen=True, kw_only=True)
class PostPruningLaw:
    """L = L0 + (1/ρ)^γ (1/N0)^δ (Nc/N0^α + Dc/D^β + E) (P2; Sengupta et al. 2025, eq. 11).

    L0 is the loss before pruning, N0 the parameters before pruning in billions, D the
    post-training tokens in billions. **What ρ means:** Chen et al. (2024) call it the pruning
    rate, yet as printed, with γ > 0 (1.08 is quoted for Llama-3-8B), the loss *falls* as ρ rises,
    which fits the share of weights *kept*. So ρ is the kept share here, in (0, 1], and γ may take
    either sign: the fit decides. No full set of constants is published where we can read it.
    """

    Nc: float
    Dc: float
    E: float
    alpha: float
    beta: float
    gamma: float
    delta: float

    def predict(
        self,
        *,
        base_loss: Number,
        kept_share: Number,
        base_billion_parameters: Number,
        billion_tokens: Number,
    ) -> Number:
        """Return the loss in nats per token after post-training."""
        shortfall = (
            self.Nc / power(base_billion_parameters, self.alpha)
            + self.Dc / power(billion_tokens, self.beta)
            + self.E
        )
        return (
            base_loss
            + power(1 / kept_share, self.gamma)
            * power(1 / base_billion_parameters, self.delta)
            * shortfall
        )

    @classmethod
    def fit(
        cls,
        *,
        base_losses: Sequence[float],
        kept_shares: Sequence[float],
        base_billion_parameters: Sequence[float],
        billion_tokens: Sequence[float],
        losses: Sequence[float],
        seed: int = 0,
        num_resamples: int = 200,
    ) -> Fitted[PostPruningLaw]:
        """Fit the seven constants to measured losses.

        With one base model, δ, α and Nc cannot be told apart; what they predict for that base is
        still determined.
        """
        return fit_law(
            cls,
            at={
                "base_loss": base_losses,
                "kept_share": kept_shares,
                "base_billion_parameters": base_billion_parameters,
                "billion_tokens": billion_tokens,
            },
            losses=losses,
            constants=(
                Constant(name="Nc", starts=(0.1, 1.0)),
                Constant(name="Dc", starts=(0.3, 1.0)),
                Constant(name="E", starts=(0.1, 0.5)),
                Constant(name="alpha", starts=(0.3, -0.3), positive=False),
                Constant(name="beta", starts=(0.5, 0.2)),
                Constant(name="gamma", starts=(1.0, -1.0), positive=False),
                Constant(name="delta", starts=(0.3, 0.0), positive=False),
            ),
            seed=seed,
            num_resamples=num_resamples,
        )


@dataclass(frozen=True, kw_only=True)
class MixtureLaw:
    """L(N, D, r) = E + A/N^α + B·r^η/D^β + C/(r + ε)^γ.

    Que et al. 2024 (D-CPT); Sengupta et al. 2025, eq. 25. N in parameters, D in tokens, L in nats
    per token; r in [0, 1] is the share, in the training mixture, of the corpus on which the loss
    is measured. A domain's loss takes the domain's share r, the general loss 1 - r. Fit it to your
    own measurements.
    """

    A: float
    B: float
    C: float
    E: float
    alpha: float
    beta: float
    gamma: float
    eta: float
    epsilon: float

    def predict(self, parameters: Number, tokens: Number, share: Number) -> Number:
        """Return the loss on the corpus that makes up `share` of the mixture."""
        return (
            self.E
            + self.A / power(parameters, self.alpha)
            + self.B * power(share, self.eta) / power(tokens, self.beta)
            + self.C / power(share + self.epsilon, self.gamma)
        )

    @classmethod
    def fit(
        cls,
        *,
        parameters: Sequence[float],
        tokens: Sequence[float],
        shares: Sequence[float],
        losses: Sequence[float],
        seed: int = 0,
        num_resamples: int = 200,
    ) -> Fitted[MixtureLaw]:
        """Fit the nine constants to measured losses, by relative error."""
        floor = float(min(losses))
        return fit_law(
            cls,
            at={"parameters": parameters, "tokens": tokens, "share": shares},
            losses=losses,
            constants=(
                Constant(name="A", starts=(10.0, 100.0)),
                Constant(name="B", starts=(10.0, 100.0)),
                Constant(name="C", starts=(0.1, 0.5)),
                Constant(name="E", starts=(0.5 * floor, 0.8 * floor)),
                Constant(name="alpha", starts=(0.2, 0.4)),
                Constant(name="beta", starts=(0.2, 0.4)),
                Constant(name="gamma", starts=(0.5, 1.0)),
                Constant(name="eta", starts=(0.5, 1.0)),
                Constant(name="epsilon", starts=(0.1, 0.3)),
            ),
            scale="log",
            seed=seed,
            num_resamples=num_resamples,
        )


def largest_domain_share(
    general: MixtureLaw, *, parameters: float, tokens: float, general_loss_limit: float
) -> float:
    """Return the largest domain share in [0, 1] that keeps the general loss within its limit.

    `general` is the mixture law of the *general* loss, which sees the share 1 - r when the domain
    has r (Que et al. 2024, section 5.1: the trade-off between general and domain abilities).
    Raises `LawError` where no share meets the limit, naming the best general loss.
    """
    shares = np.linspace(0.0, 1.0, 2001)
    with np.errstate(divide="ignore"):
        losses = np.array(
            [general.predict(parameters, tokens, float(1 - share)) for share in shares]
        )
    feasible = np.flatnonzero(losses <= general_loss_limit)
    if len(feasible) == 0:
        raise LawError(
            f"general_loss_limit {general_loss_limit} cannot be met at any mixture; the lowest "
            f"general loss is {losses.min():.4f}"
        )
    last = int(feasible[-1])
    if last == len(shares) - 1:
        return 1.0
    from scipy.optimize import brentq  # noqa: PLC0415 - heavy, and a server seldom asks

    return float(
        brentq(
            lambda share: general.predict(parameters, tokens, 1 - share) - general_loss_limit,
            shares[last],
            shares[last + 1],
        )
    )
