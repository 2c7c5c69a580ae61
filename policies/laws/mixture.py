"""D-CPT: loss against the share of domain data in continual pre-training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from policies.errors import LawError
from policies.laws.fitting import Constant, Fitted, Number, fit_law, power


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
    return float(
        brentq(
            lambda share: general.predict(parameters, tokens, 1 - share) - general_loss_limit,
            shares[last],
            shares[last + 1],
        )
    )
