"""What vLLM tells of its scheduler, step by step."""

from __future__ import annotations

from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats


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
