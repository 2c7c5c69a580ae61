"""`shoal serve` on Ray with a pool that mixes engines: chunks stacked, the base on vLLM."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from models.pool import DEFAULT_POOL, load_pool
from models.tokenizer import load_tokenizer
from tests.server import started, until

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1800)]

ONE, OTHER, *_, BASE = [model for model in load_pool(DEFAULT_POOL).models if model.spec.domains]
CHAT: list[Any] = [{"role": "user", "content": "Write the word 'lantern' backwards."}]
ENGINE_ARGS = {"enforce_eager": True, "max_model_len": 256, "max_num_seqs": 4}
CONFIG = {
    "pool": "pool.yaml",
    "ledger": {"url": "sqlite:///rows.db"},
    "limits": {"stage_timeout_s": 120, "request_timeout_s": 300},
}


def _pool() -> dict[str, Any]:
    chunk = {"engine": "chunks", "usd_per_million_output_tokens": 0.03}
    return {
        "name": "mixed",
        "engines": [
            {"name": "chunks", "kind": "stacked", "device": "cpu", "kv_memory_bytes": 2**26},
            {
                "name": "big",
                "kind": "vllm",
                "dtype": "float32",
                "kv_memory_bytes": 2**26,
                "options": {"engine_args": ENGINE_ARGS},
                "deployment": {"drain_s": 30},
            },
        ],
        "models": [
            {"name": "one", "checkpoint": str(ONE.card.path), **chunk},
            {"name": "other", "checkpoint": str(OTHER.card.path), **chunk},
            {"name": "base", "checkpoint": str(BASE.card.path), "engine": "big"},
        ],
        "policies": {
            "auto": {
                "kind": "fixed",
                "plan": {"cascade": {"stages": ["one", "base"], "thresholds": [1.0]}},
            }
        },
    }


@dataclass
class Served:
    """A server process."""

    url: str
    client: openai.OpenAI

    def get(self, path: str) -> httpx.Response:
        """Return what stands at `path`."""
        return httpx.get(self.url + path, timeout=120)


@pytest.fixture(scope="module", name="server")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for this file."""
    folder: Path = tmp_path_factory.mktemp("mixed")
    (folder / "pool.yaml").write_text(yaml.safe_dump(_pool()))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    with (
        # Compiling vLLM's sampler takes a minute.
        started(folder, "--config", "config.yaml", env={"TORCHDYNAMO_DISABLE": "1"}) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300) as client,
    ):
        yield Served(server.url, client)


def test_vllm_answers_through_the_openai_client(server: Served) -> None:
    """The base on vLLM says, greedily, what transformers says, and streams the same."""
    assert BASE.card is not None
    tokenizer = load_tokenizer(BASE)
    prompt = torch.tensor([tokenizer.encode_chat(CHAT)])
    reference = AutoModelForCausalLM.from_pretrained(BASE.card.path, dtype=torch.float32)
    with torch.inference_mode():
        whole = reference.generate(prompt, do_sample=False, max_new_tokens=40)
    expected = tokenizer.decode(whole[0, prompt.shape[1] :].tolist())
    asked: dict[str, Any] = {"model": "base", "messages": CHAT, "temperature": 0, "max_tokens": 40}
    answer = server.client.chat.completions.create(**asked, logprobs=True)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].logprobs is not None
    stream = server.client.chat.completions.create(**asked, stream=True)
    texts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(texts) == expected
    assert len(texts) > 2


def test_a_cascade_crosses_engines(server: Served) -> None:
    """The stacked chunk answers first, is not sure enough, and the base on vLLM takes over."""
    answer = server.client.chat.completions.create(
        model="auto", messages=CHAT, temperature=0, extra_body={"shoal": {"explain": True}}
    )
    shoal: Any = answer.shoal  # type: ignore[attr-defined]
    assert shoal["members"] == ["base"]
    assert {name: part["engine"] for name, part in shoal["footprint"]["members"].items()} == {
        "one": "chunks",
        "base": "big",
    }
    outcomes = [stage["outcome"] for stage in shoal["stages"] if "members" in stage]
    assert outcomes[0] in ("rejected", "hopeless")
    assert outcomes[1:] == ["ok"]


def test_members_on_two_engines_fuse(server: Served) -> None:
    """All the weight on the member inside vLLM gives its answer, a string at a time."""
    plan = {"answer": {"members": ["one", "base"], "weights": [0, 1]}}
    asked: dict[str, Any] = {"messages": CHAT, "temperature": 0, "max_tokens": 6}
    fused = server.client.chat.completions.create(
        model="auto", **asked, extra_body={"shoal": {"plan": plan}}
    )
    alone = server.client.chat.completions.create(model="base", **asked)
    assert fused.choices[0].message.content == alone.choices[0].message.content


def test_leaving_frees_vllms_lane(server: Served) -> None:
    """A client who hangs up aborts the request inside vLLM; health stays good."""
    stream = server.client.chat.completions.create(
        model="base",
        messages=CHAT,
        stream=True,
        max_tokens=200,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    until(lambda: not server.get("/health").json()["engines"]["big"]["running_requests"], 60)
    assert server.get("/health").status_code == 200


def test_vllms_metrics_are_on_the_page(server: Served) -> None:
    """What vLLM counts stands beside what Shoal counts, with the engine's name."""
    page = server.get("/metrics").text
    [line] = [row for row in page.splitlines() if row.startswith("vllm:generation_tokens_total{")]
    assert 'shoal_engine="big"' in line
    assert float(line.split()[-1]) > 0


def test_bad_requests_are_400(server: Served) -> None:
    """What vLLM would refuse is the client's fault here too."""
    with pytest.raises(openai.BadRequestError, match="context"):
        server.client.completions.create(model="base", prompt="x " * 400, max_tokens=5)
