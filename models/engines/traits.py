"""What is known of an engine before it runs: which plans it can take part in, and what it needs."""

from __future__ import annotations

from dataclasses import dataclass

from models.engines.base import FusionRule


@dataclass(frozen=True, kw_only=True)
class EngineTraits:
    """What plans, meters and deployments must know.

    `tools`: its models can be offered tools. `fuses`: one request may name several members, by one
    of `rules`, and with `updates_evidence` their weights may follow the answer's tokens.
    `logprobs`: answers carry log-probabilities, which scorers of cascades read. `here`: it draws
    its energy from this machine. `context_tokens` bounds prompt and answer further than the models
    do. A replica spreads over `num_workers` devices. With `metrics`, it is a `HasMetrics`. `needs`
    says what is missing for it to run on this machine.
    """

    fuses: bool = True
    rules: tuple[FusionRule, ...] = ("mixture", "product", "gated", "contrastive")
    updates_evidence: bool = True
    logprobs: bool = True
    tools: bool = False
    here: bool = True
    context_tokens: int | None = None
    num_workers: int = 1
    metrics: bool = False
    needs: str | None = None
