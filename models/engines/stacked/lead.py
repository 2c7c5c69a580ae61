"""Asking all members only where the one that leads is unsure: "gated" fusion without waste.

The lead runs alone, prompt and answer, as one lane. Where its likeliest token does not pass the
request's gate it waits; the others run the tokens that they have missed, in one pass and in steps
with whoever else is there, and what they say is fused with what the lead said. So the tokens are
those of running everybody at every token, and a token at which nobody is asked costs one lane.
SAFE (2026) finds that few tokens of long answers need the others. Weights that follow what the
members say of the prompt or the answer need everybody everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from models.engines.base import GenerationRequest
from models.engines.stacked.sequence import Sequence


def lead_suffices(request: GenerationRequest) -> bool:
    """Whether the lead of `request` may run alone until it is unsure."""
    reads = request.evidence is not None or request.sampling.prompt_logprobs is not None
    return request.rule == "gated" and len(request.members) > 1 and request.gate < 1 and not reads


def with_leads(
    logp_LV: Tensor, lanes_R: Seq[list[int]], sampling: Seq[Sequence]
) -> tuple[Tensor, list[list[int]]]:
    """Add what waiting leads said to what the others say now, each as its request's first lane."""
    joined, said = [], list[Tensor]()
    for sequence, lanes in zip(sampling, lanes_R, strict=True):
        if sequence.lead_said is None:
            joined.append(lanes)
        else:
            joined.append([len(logp_LV) + len(said), *lanes])
            said.append(sequence.lead_said)
    return (torch.cat([logp_LV, torch.stack(said)]) if said else logp_LV), joined


def unsure_leads(
    logp_LV: Tensor, lanes_R: Seq[list[int]], sampling: Seq[Sequence]
) -> dict[Sequence, Tensor]:
    """Return what each lead says, [V], that has run alone and does not pass its request's gate."""
    alone = [
        (sequence, lanes[0])
        for sequence, lanes in zip(sampling, lanes_R, strict=True)
        if sequence.lead_alone and sequence.lead_said is None
    ]
    if not alone:
        return {}
    surest = logp_LV[[lane for _, lane in alone]].amax(-1)
    gates = surest.new_tensor([sequence.request.gate for sequence, _ in alone]).log()
    return {
        sequence: logp_LV[lane].clone()
        for (sequence, lane), sure in zip(alone, (surest >= gates).tolist(), strict=True)
        if not sure
    }
