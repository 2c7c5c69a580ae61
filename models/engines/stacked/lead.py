"""Asking all members only where the one that leads is unsure: "gated" fusion without waste.

The lead runs alone, prompt and answer, as one lane. Where its likeliest token does not pass the
request's gate it waits; the others run the tokens that they have missed, in one pass and in steps
with whoever else is there, and what they say is fused with what the lead said. So the tokens are
those of running everybody at every token, and a token at which nobody is asked costs one lane.
SAFE (2026) finds that few tokens of long answers need the others. Weights that follow what the
members say of the prompt or the answer need everybody everywhere.

A lead of another shape than the others, such as a chunk before its base, is a *scout*: a sequence
of its own, on a runner and rows of its own. Where it is unsure it does not wait but goes on, as
long as its guesses are likely to stand; then the others run what they have missed and all guesses
in one pass, and each token is drawn as it is where everybody runs at every token, by the same
number of the request's generator. The first that is not the lead's guess ends the step. Where a
prompt is to be scored both read it whole, and each token counts as it would be drawn. With
weights 0 and 1 this is a speculative cascade (Narasimhan et al. 2025, "Faster Cascades via
Speculative Decoding") by Chow's rule (equation 2 there: the small model's token stands where its
likeliest has probability 1 - alpha, here `gate`), the one of their rules that can tell without
asking the large model, so that what is sure costs nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace

import torch
from torch import Tensor

from models.engines.base import GenerationRequest
from models.engines.stacked.sampler import Draw
from models.engines.stacked.sequence import Said, Sequence

MOST_AHEAD = 8
"""How many guesses of a scout are checked at once, and how many of its steps others wait for."""
# A scout goes on as long as its unsure guesses stand with this probability, as it sees it. (Mamou
# et al. 2024 stop a draft at one token's; 0.4 is also what transformers takes.)
_LEAST_CHANCE = 0.4


def lead_suffices(request: GenerationRequest) -> bool:
    """Whether the lead of `request` may run alone until it is unsure."""
    reads = request.evidence is not None or request.sampling.prompt_logprobs is not None
    return request.rule == "gated" and len(request.members) > 1 and request.gate < 1 and not reads


def with_leads(
    logp_LV: Tensor, lanes_R: Seq[list[int]], leads_R: Seq[Said | None]
) -> tuple[Tensor, list[list[int]]]:
    """Add what waiting leads said to what the others say now, each as its request's first lane."""
    joined, said = [], list[Tensor]()
    for lead, lanes in zip(leads_R, lanes_R, strict=True):
        if lead is None:
            joined.append(lanes)
        else:
            joined.append([len(logp_LV) + len(said), *lanes])
            said.append(lead.logp_V)
    return (torch.cat([logp_LV, torch.stack(said)]) if said else logp_LV), joined


def unsure_leads(
    logp_LV: Tensor, lanes_R: Seq[list[int]], sampling: Seq[Sequence]
) -> dict[Sequence, Tensor]:
    """Return what each lead says, [V], that has run alone and does not pass its request's gate."""
    alone = [
        (sequence, lanes[0])
        for sequence, lanes in zip(sampling, lanes_R, strict=True)
        if sequence.lead_alone and not sequence.said
    ]
    if not alone:
        return {}
    sure = sure_rows(logp_LV[[lane for _, lane in alone]], [sequence for sequence, _ in alone])
    return {
        sequence: logp_LV[lane].clone()
        for (sequence, lane), is_sure in zip(alone, sure, strict=True)
        if not is_sure
    }


def sure_rows(logp_RV: Tensor, sequences: Seq[Sequence]) -> list[bool]:
    """Return of which rows the likeliest token passes the gate of its request."""
    gates = logp_RV.new_tensor([sequence.request.gate for sequence in sequences]).log()
    sure: list[bool] = (logp_RV.amax(-1) >= gates).tolist()
    return sure


def scout_of(sequence: Sequence, member: int) -> Sequence:
    """Return the sequence of a request's lead, which is `member` of a runner of its own."""
    return replace(sequence.alone(member), follows=sequence)


def heard(
    scouts: Seq[Sequence], logp_RV: Tensor | None, drawn: Draw
) -> Iterator[tuple[Sequence, Said]]:
    """Yield whom each scout leads, and what it says of the next token."""
    assert logp_RV is not None, "who draws has said something"
    led = [scout.follows for scout in scouts if scout.follows is not None]
    for row, (sequence, is_sure) in enumerate(zip(led, sure_rows(logp_RV, led), strict=True)):
        yield sequence, Said(logp_RV[row], is_sure, drawn.logprobs[row])


def run_ahead(sequence: Sequence, said: Said, token: int) -> None:
    """Keep what a scout `said` until the others are asked; let it go on with `token`, or ask."""
    scout = sequence.scout
    assert scout is not None, "only scouts run ahead"
    sequence.said.append(said)
    scout.tokens.append(token)
    guesses = scout.tokens[len(sequence.tokens) :]
    chance = math.exp(sum(one.logprob for one in sequence.said if not one.is_sure))
    most = min(MOST_AHEAD, sequence.max_new_tokens - sequence.num_generated)
    grammar = sequence.sampler.grammar
    sequence.asks = (
        (sequence.reads_prompt and not sequence.num_generated)
        or chance < _LEAST_CHANCE
        or len(guesses) >= most
        or token in sequence.end_tokens
        or (grammar is not None and grammar.num_allowed(guesses) < len(guesses))
    )
    if not sequence.asks:
        scout.sampler = sequence.sampler.after(guesses)
