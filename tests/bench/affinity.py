"""How much of their prompts conversations find behind two replicas of an engine, on a real Ray.

    python -m tests.bench.affinity

Twenty-four conversations, eight side by side, of four turns: 60 tokens more each turn. Requests go
where `router.affinity` sends them, and in a second server as Ray Serve does by itself: to the less
busy of two. Prints the share of later turns' earlier tokens that were found, turn by turn, and how
many of those turns found nearly all.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx

from router.ports import free_port
from tests.models.engines.stacked.tiny import CONTEXT_TOKENS, save_checkpoint
from tests.router.conftest import write_pool

CONVERSATIONS, AT_ONCE, TURNS, NEW_TOKENS = 24, 8, 4, 60
WITHOUT = "import router.app; router.app.affinity = lambda deployment: {}; "


@contextmanager
def served(folder: Path, *, knows: bool) -> Iterator[str]:
    """Serve two replicas of a tiny model; yield the address."""
    port = free_port()
    run = f"from router.cli.main import app; app(['serve','--pool','{folder}','--port','{port}'])"
    code = ("" if knows else WITHOUT) + run
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if "curl" in line:
                break
        try:
            assert "Ready at" in said, said
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)


def converse(url: str, seed: int) -> list[float]:
    """Hold a conversation; return for each later turn what share of the earlier it found."""
    rng, said, found = random.Random(seed), list[int](), list[float]()
    with httpx.Client(base_url=url, timeout=120) as http:
        for turn in range(TURNS):
            earlier = len(said)
            said += [rng.randrange(2, 320) for _ in range(NEW_TOKENS)]
            reply = http.post(
                "/v1/completions", json={"model": "tiny", "prompt": said, "max_tokens": 4}
            )
            reply.raise_for_status()
            if turn:
                details = reply.json()["usage"]["prompt_tokens_details"]
                found.append(details["cached_tokens"] / earlier)
    return found


def main() -> None:
    """Measure both."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_checkpoint(folder / "tiny", max_position_embeddings=2 * CONTEXT_TOKENS)
        deployment = {"min_replicas": 2, "max_replicas": 2}
        write_pool(
            folder,
            policies={},
            engines=[{"name": "e", "kind": "stacked", "deployment": deployment}],
            models=[{"name": "tiny", "engine": "e", "checkpoint": "tiny"}],
        )
        for knows in (True, False):
            with served(folder, knows=knows) as url, ThreadPoolExecutor(AT_ONCE) as pool:
                told = list(pool.map(partial(converse, url), range(CONVERSATIONS)))
            turns = [turn for one in told for turn in one]
            row = {
                "rule": "router.affinity" if knows else "Ray Serve's own",
                "found": round(sum(turns) / len(turns), 3),
                "turns_that_found_all": round(sum(t > 0.9 for t in turns) / len(turns), 3),
                "by_turn": [round(sum(t) / len(t), 2) for t in zip(*told, strict=True)],
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
