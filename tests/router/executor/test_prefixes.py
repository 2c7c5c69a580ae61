"""Whatever reads a prompt again, on a member that has read it, computes only what is new."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import yaml

from models.engines.base import Chunk
from models.engines.stacked.runner import Runner
from models.pool import load_pool
from policies.plan import from_json
from router.executor.trace import Trace
from tests.models.engines.stacked.tiny import save_checkpoint
from tests.router.executor.running import chunks_of, executor_of, task_of, workers_of
from tests.router.executor.test_union import other_tokenizer

TEXT = "the quick brown fox says hello world 123 " * 2
NUM_TOKENS = 4
PLANS: dict[str, Any] = {
    "a cascade's stages": {"cascade": {"stages": ["m", "m", "m"], "thresholds": [1.0, 1.0]}},
    "candidates of best-of": {"best": {"candidates": ["m", "m", "m"], "select": "majority"}},
    "steps of union fusion": {"answer": {"members": ["m", "n"]}},
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_prompt_is_computed_once(
    plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three stages, three candidates, or a string after the other of two members with their own
    tokenizers: the rows that go through a model are those of one prompt and the answers' own.
    """
    for name, seed in (("m", 3), ("n", 4)):
        save_checkpoint(tmp_path / name, seed=seed)
    (tmp_path / "n" / "tokenizer.json").write_text(other_tokenizer().to_str())
    names = ("m", "n")
    content = {
        "name": "p",
        "engines": [{"name": f"e{n}", "kind": "stacked", "kv_memory_bytes": 2**22} for n in names],
        "models": [{"name": n, "engine": f"e{n}", "checkpoint": n} for n in names],
    }
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump(content))
    pool = load_pool(tmp_path)
    tokenizers = {name: pool.model(name).tokenizer for name in names}
    assert all(tokenizers.values())
    rows = 0
    step = Runner.step

    def counting(self: Runner, parts: Any) -> Any:
        nonlocal rows
        rows += sum(part.num_rows for part in parts)
        return step(self, parts)

    async def run() -> tuple[list[Chunk], Trace]:
        nonlocal rows
        engines = workers_of(pool)
        for worker in engines.values():
            await worker.start()
        rows = 0
        task = task_of(TEXT, max_tokens=NUM_TOKENS, temperature=1.0, seed=1)
        trace = Trace()
        chunks = await chunks_of(executor_of(pool, engines), from_json(PLANS[plan]), task, trace)
        for worker in engines.values():
            await worker.stop()
        return chunks, trace

    monkeypatch.setattr(Runner, "step", counting)
    _, trace = asyncio.run(run())
    prompts = [run.prompt_tokens for run in trace.runs.values() if run.prompt_tokens]
    members = 2 if "union" in plan else 1
    assert rows < members * (max(prompts) + 16) + 3 * NUM_TOKENS * 8
    assert rows < 0.7 * max(prompts) * (members * NUM_TOKENS if "union" in plan else 3)
