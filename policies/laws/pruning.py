"""P2: the loss of a pruned model after post-training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from policies.laws.fitting import Constant, Fitted, Number, fit_law, power


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
