"""What is known of an engine before it runs: which plans it can take part in, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EngineTraits:
    """What plans and meters must know.

    `fuses`: one request may name several members. `logprobs`: answers carry log-probabilities,
    which scorers of cascades read. `here`: it draws its energy from this machine.
    """

    fuses: bool = True
    logprobs: bool = True
    here: bool = True
