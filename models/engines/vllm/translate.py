"""Between Shoal and vLLM: requests there; chunks, tool calls and the scheduler's figures back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from models.engines.base import Chunk, FinishReason, GenerationRequest, Token, TopLogprob
from models.engines.text import Vocabulary
from models.errors import EngineFailed

_FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


def sampling_params(
    request: GenerationRequest,
    *,
    max_tokens: int,
    fused: bool,
    grammar: str | None = None,
    marks: Sequence[str] = (),
) -> SamplingParams:
    """Return `request` as vLLM wants it: held to `grammar`, the `marks` left in the text.

    Raises what vLLM raises for values that it refuses.
    """
    sampling = request.sampling
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or 0,
        min_p=sampling.min_p or 0.0,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        seed=sampling.seed,
        stop=list(sampling.stop) or None,
        stop_token_ids=list(sampling.stop_token_ids) or None,
        include_stop_str_in_output=sampling.include_stop,
        min_tokens=sampling.min_tokens,
        logprobs=sampling.top_logprobs or 0,
        prompt_logprobs=sampling.prompt_logprobs,
        ignore_eos=sampling.ignore_eos,
        structured_outputs=grammar and StructuredOutputsParams(grammar=grammar),
        output_kind=RequestOutputKind.DELTA,
        # Models may mark calls and thoughts with special tokens.
        skip_special_tokens=not marks,
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
        stop=output.stop_reason,
    )


def _token(
    token_id: int, entries: dict[int, Logprob], vocabulary: Vocabulary, num_top: int
) -> Token:
    ranked = sorted(entries.items(), key=lambda entry: entry[1].rank or 0)[:num_top]
    return Token(
        token_id=token_id,
        raw=vocabulary.raw(token_id),
        logprob=entries[token_id].logprob,
        top=tuple(
            TopLogprob(token_id=other, raw=vocabulary.raw(other), logprob=entry.logprob)
            for other, entry in ranked
        ),
    )


def prompt_tokens(
    token_ids: Sequence[int],
    entries: Sequence[dict[int, Logprob] | None],
    vocabulary: Vocabulary,
    num_top: int,
) -> tuple[Token, ...]:
    """Return the prompt's tokens with what vLLM says of them; of the first it says nothing."""
    start = Token(token_id=token_ids[0], raw=vocabulary.raw(token_ids[0]), logprob=None)
    pairs = zip(token_ids[1:], entries[1:], strict=True)
    return start, *(_token(i, told or {}, vocabulary, num_top) for i, told in pairs)


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


class LoadLogger(StatLoggerBase):  # type: ignore[misc] # vLLM may be absent
    """Remembers the latest figures, and counts the tokens."""

    def __init__(self) -> None:
        """Start from nothing; vLLM's own loggers read its configuration here."""
        self.num_queued = 0
        self.kv_share = 0.0
        self.num_generated_tokens = 0

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,  # noqa: ARG002 - vLLM's interface
        engine_idx: int = 0,  # noqa: ARG002
    ) -> None:
        """Take the figures of one step."""
        if scheduler_stats is not None:
            self.num_queued = scheduler_stats.num_waiting_reqs
            self.kv_share = scheduler_stats.kv_cache_usage
        if iteration_stats is not None:
            self.num_generated_tokens += iteration_stats.num_generation_tokens

    def log_engine_initialized(self) -> None:
        """Nothing to tell."""
