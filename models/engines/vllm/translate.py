"""Between Shoal's requests and vLLM's: sampling parameters there, chunks back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from models.engines.base import Chunk, FinishReason, GenerationRequest, Token, TopLogprob
from models.engines.text import Vocabulary
from models.errors import EngineFailed

_FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


def sampling_params(request: GenerationRequest, *, max_tokens: int, fused: bool) -> SamplingParams:
    """Return `request` as vLLM wants it; raises what vLLM raises for values that it refuses."""
    sampling = request.sampling
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or 0,
        min_p=sampling.min_p or 0.0,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        seed=sampling.seed,
        stop=list(sampling.stop) or None,
        logprobs=sampling.top_logprobs or 0,
        ignore_eos=sampling.ignore_eos,
        structured_outputs=_structured(sampling.json_schema),
        output_kind=RequestOutputKind.DELTA,
        # Models mark their calls with special tokens.
        skip_special_tokens=request.tools is None,
        extra_args=_fusion(request) if fused else None,
    )


def chunk(output: CompletionOutput, vocabulary: Vocabulary, num_top: int) -> Chunk:
    """Return what `output`, a delta, adds; with the `num_top` likeliest tokens of each position."""
    reason: FinishReason | None = None
    if output.finish_reason is not None:
        if output.finish_reason not in _FINISH_REASONS:
            raise EngineFailed(f"vLLM ended the answer: {output.finish_reason}")
        reason = _FINISH_REASONS[output.finish_reason]
    logprobs: Sequence[dict[int, Logprob]] = output.logprobs or ()
    return Chunk(
        text=output.text,
        tokens=tuple(
            _token(token_id, entries, vocabulary, num_top)
            for token_id, entries in zip(output.token_ids, logprobs, strict=True)
        ),
        finish_reason=reason,
    )


def _token(
    token_id: int, entries: dict[int, Logprob], vocabulary: Vocabulary, num_top: int
) -> Token:
    ranked = sorted(entries.items(), key=lambda entry: entry[1].rank or 0)[:num_top]
    raw = vocabulary.raw(token_id)
    return Token(
        token_id=token_id,
        text=raw.decode(errors="replace"),
        raw=raw,
        logprob=entries[token_id].logprob,
        top=tuple(
            TopLogprob(
                token_id=other,
                text=vocabulary.raw(other).decode(errors="replace"),
                raw=vocabulary.raw(other),
                logprob=entry.logprob,
            )
            for other, entry in ranked
        ),
    )


def _structured(json_schema: str | None) -> StructuredOutputsParams | None:
    if json_schema is None:
        return None
    if json.loads(json_schema) == {"type": "object"}:
        return StructuredOutputsParams(json_object=True)
    return StructuredOutputsParams(json=json_schema)


def _fusion(request: GenerationRequest) -> dict[str, Any]:
    """Return what the fused model's `request` module reads."""
    rule = request.rule if len(request.members) > 1 else "mixture"
    args: dict[str, Any] = {"shoal_members": list(request.members), "shoal_rule": rule}
    if request.weights is not None:
        args["shoal_weights"] = list(request.weights)
    if request.evidence is not None:
        args["shoal_evidence"] = "mean" if request.evidence.per_token else "sum"
        args["shoal_evidence_temperature"] = request.evidence.temperature
    return args
