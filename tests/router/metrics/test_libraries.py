"""What an engine's own library counts stands on the page, told apart by engine and replica."""

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from models.errors import EngineFailed
from router.metrics.gauges import library_metrics
from router.metrics.page import exposition

TEXT = """# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="big"} %d
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="big"} 2.0
"""


class _Client:
    def __init__(self, *texts: str, error: Exception | None = None) -> None:
        self._texts = texts
        self._error = error

    async def metrics(self) -> list[tuple[str, str]]:
        if self._error is not None:
            raise self._error
        return [(f"r{index}", text) for index, text in enumerate(self._texts)]


def test_replicas_and_engines_are_told_apart() -> None:
    """Each series keeps its labels and gets ours; an engine that fails leaves the page whole."""
    engines = {
        "big": _Client(TEXT % 10, TEXT % 20),
        "other": _Client(""),
        "gone": _Client(error=EngineFailed("gone")),
    }
    others = asyncio.run(library_metrics(engines))  # type: ignore[arg-type]
    page, _ = exposition({}, accept="", others=others)
    families = {f.name: f for f in text_string_to_metric_families(page.decode())}
    tokens = families["vllm:generation_tokens"]
    assert tokens.type == "counter"
    assert {s.labels["shoal_replica"]: s.value for s in tokens.samples} == {"r0": 10, "r1": 20}
    assert tokens.samples[0].labels == {
        "engine": "0",
        "model_name": "big",
        "shoal_engine": "big",
        "shoal_replica": "r0",
    }
    assert len(families["vllm:num_requests_running"].samples) == 2
