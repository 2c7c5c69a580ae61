"""Adapters as members: each computes what PEFT and transformers compute for it alone."""

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from models.adapter import AdapterSource, read_adapter
from models.engines.base import Chunk, Engine, GenerationRequest
from models.engines.stacked import matrices
from models.errors import EngineFailed, EngineOverloaded, PoolError
from models.pool import load_pool
from tests.models.engines.stacked.adapters import (
    build,
    peft_logits,
    save_adapter,
    write_pool,
)
from tests.models.engines.stacked.tiny import (
    ARCHITECTURES,
    VOCAB_SIZE,
    answer,
    read,
    request,
    running,
    save_checkpoint,
    token_ids,
)

PROMPT = [17, 250, 3, 99, 99, 301, 8, 45, 120, 77]
# Of different ranks, scales and modules.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"r": 9, "lora_alpha": 3, "use_rslora": True},
    "some": {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 2},
    "by-pattern": {
        "target_modules": r".*\.(k_proj|o_proj|gate_proj)",
        "rank_pattern": {"k_proj": 3, r"layers\.1\.mlp\.gate_proj": 7},
        "alpha_pattern": {"o_proj": 1},
    },
    "one-layer": {"target_modules": ["up_proj"], "layers_to_transform": [1]},
}
PACKED = {"plain": {}, "some": {"target_modules": ["qkv_proj"], "r": 3}}


def logprobs(chunks: list[Chunk]) -> list[dict[int, float]]:
    """What an answer says of the prompt's positions but the first: log-probabilities by token."""
    prompt = [token for chunk in chunks for token in chunk.prompt][1:]
    return [{one.token_id: one.logprob for one in token.top} for token in prompt]


def check(told: list[dict[int, float]], logp_TV: torch.Tensor, most: float) -> None:
    """Hold the likeliest tokens' log-probabilities at every position against a reference."""
    for found, row in zip(told, logp_TV, strict=True):
        assert len(found) == 20
        for token, logprob in found.items():
            assert abs(logprob - row[token].item()) < most


@pytest.fixture(name="base", scope="module")
def saved_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint."""
    return save_checkpoint(tmp_path_factory.mktemp("base") / "base", initializer_range=0.08)


@pytest.fixture(name="folders", scope="module")
def saved_adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Its adapters of all `KINDS`."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(root / name, base, seed=seed, **config)
        for seed, (name, config) in enumerate(KINDS.items())
    }


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "phi3", "gemma3_text", "reordered"])
def test_members_are_what_peft_computes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base and adapters side by side in one step, float32: within 1e-4 at every position; also of
    a base whose matrices are kept as large ones are."""
    if kind == "reordered":
        monkeypatch.setattr(matrices, "_MOST_AS_THEY_ARE", 0)
        kind = "llama"
    base = save_checkpoint(tmp_path / "base", kind)
    adapters = {
        name: save_adapter(tmp_path / name, base, seed=seed, **config)
        for seed, (name, config) in enumerate((PACKED if kind == "phi3" else KINDS).items())
    }
    pool = write_pool(tmp_path / "pool", base, adapters)
    names = ["base", *adapters]
    answers = answer(
        build(pool), *(request(PROMPT, [name], max_tokens=1, prompt_logprobs=20) for name in names)
    )
    for name, chunks in zip(names, answers, strict=True):
        logits = peft_logits(base, adapters.get(name), PROMPT)
        check(logprobs(chunks), logits.log_softmax(-1)[:-1], 1e-4)


@pytest.mark.parametrize("rule", ["mixture", "product"])
def test_fused_is_the_average(
    base: Path, folders: dict[str, Path], tmp_path: Path, rule: str
) -> None:
    """Base and adapters fused with weights: the reference's average at every position."""
    pool = write_pool(tmp_path, base, folders)
    names, weights = ["rslora", "base", "some"], (0.5, 0.2, 0.3)
    [chunks] = answer(
        build(pool),
        request(PROMPT, names, weights=weights, rule=rule, max_tokens=1, prompt_logprobs=20),
    )
    logps = [peft_logits(base, folders.get(name), PROMPT).log_softmax(-1) for name in names]
    parts = list(zip(weights, logps, strict=True))
    if rule == "mixture":
        expected = torch.stack([logp.exp() * weight for weight, logp in parts]).sum(0).log()
    else:
        expected = torch.stack([logp * weight for weight, logp in parts]).sum(0).log_softmax(-1)
    check(logprobs(chunks), expected[:-1], 1e-4)


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.03), ("int8", 0.04)])
def test_small_bases_take_adapters(
    base: Path, folders: dict[str, Path], tmp_path: Path, dtype: str, most: float
) -> None:
    """What the rounding of the base costs, and not more; at once and piece by piece."""
    prompt = PROMPT * 8
    logp = peft_logits(base, folders["plain"], prompt).log_softmax(-1)[:-1]
    expected = logp.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    for step_rows in (2048, 16):
        pool = write_pool(tmp_path, base, folders, dtype=dtype, options={"step_rows": step_rows})
        [chunks] = answer(build(pool), request(prompt, ["plain"], max_tokens=2, prompt_logprobs=0))
        told = [t.logprob for chunk in chunks for t in chunk.prompt][1:]
        assert (torch.tensor(told) - expected).std() < most * expected.std()


requests = st.builds(
    request,
    st.lists(st.integers(2, VOCAB_SIZE - 1), min_size=1, max_size=40),
    st.lists(st.sampled_from(["base", *KINDS]), min_size=1, max_size=4, unique=True),
    rule=st.sampled_from(["mixture", "product"]),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 99),
    max_tokens=st.integers(1, 12),
)


@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
@given(
    plan=st.lists(st.tuples(requests, st.integers(0, 6)), min_size=2, max_size=6),
    step_rows=st.sampled_from([8, 2048]),
    at_start=st.sets(st.sampled_from([*KINDS])),
)
def test_answers_depend_on_nobody_else(
    base: Path,
    folders: dict[str, Path],
    tmp_path: Path,
    plan: list[tuple[GenerationRequest, int]],
    step_rows: int,
    at_start: set[str],
) -> None:
    """Random arrivals, member sets, and adapters loaded meanwhile: tokens are those alone."""
    origins = {name: read_adapter(path, base).origin for name, path in folders.items()}
    full = build(write_pool(tmp_path, base, folders))
    some = {name: path for name, path in folders.items() if name in at_start}
    pool = write_pool(tmp_path, base, some, options={"step_rows": step_rows, "max_adapters": 5})

    async def arrive(engine: Engine, wanted: GenerationRequest, wait: int) -> list[Chunk]:
        for _ in range(wait):
            await asyncio.sleep(0.002)
        adapters = {name: origins[name] for name in wanted.members if name != "base"}
        return await read(engine, dataclasses.replace(wanted, adapters=adapters))

    async def run() -> tuple[list[list[Chunk]], list[list[Chunk]]]:
        async with running(full) as engine:
            alone = [await read(engine, one) for one, _ in plan]
        async with running(build(pool)) as engine:
            arriving = (arrive(engine, one, wait) for one, wait in plan)
            return alone, await asyncio.gather(*arriving)

    alone, together = asyncio.run(run())
    assert list(map(token_ids, together)) == list(map(token_ids, alone))


async def test_adapters_make_room_and_come_back(
    base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """With room for two, the third takes the place of the one longest unused, never of one in use;
    what comes back computes what it did, and no prefix of another is taken for its own."""
    origins = {name: read_adapter(path, base).origin for name, path in folders.items()}
    names = ["plain", "rslora", "some", "plain", "by-pattern", "rslora"]
    wanted = [
        dataclasses.replace(
            request(PROMPT * 4, [name], max_tokens=8, ignore_eos=True),
            adapters={name: origins[name]},
        )
        for name in names
    ]
    alone = {}
    for name, one in zip(names, wanted, strict=True):
        async with running(build(write_pool(tmp_path, base, {name: folders[name]}))) as engine:
            alone[name] = token_ids(await read(engine, one))
    pool = write_pool(tmp_path, base, {}, options={"max_adapters": 2})
    async with running(build(pool)) as engine:
        for name, one in zip(names, wanted, strict=True):
            assert token_ids(await read(engine, one)) == alone[name], name
        long = [
            dataclasses.replace(
                request(PROMPT, [name], max_tokens=200, ignore_eos=True),
                adapters={name: origins[name]},
            )
            for name in names[:2]
        ]
        busy = [asyncio.create_task(read(engine, one)) for one in long]
        await asyncio.sleep(0.05)
        with pytest.raises(EngineOverloaded, match="max_adapters"):
            await read(engine, wanted[2])
        assert [len(token_ids(await one)) for one in busy] == [200, 200]
        assert token_ids(await read(engine, wanted[2])) == alone["some"]


async def test_what_cannot_be_loaded_fails_alone(
    base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """A folder that is gone, or holds something else by now: that request's error alone."""
    pool = write_pool(tmp_path / "pool", base, {"plain": folders["plain"]})
    gone = AdapterSource(source=str(tmp_path / "gone"), sha256="0" * 64)
    changed = AdapterSource(source=str(folders["some"]), sha256="0" * 64)

    async with running(build(pool)) as engine:
        for origin, why in ((gone, "no folder"), (changed, "has changed")):
            wanted = dataclasses.replace(request(PROMPT, ["x"]), adapters={"x": origin})
            with pytest.raises(EngineFailed, match=why):
                await read(engine, wanted)
        assert token_ids(await read(engine, request(PROMPT, ["plain"])))


async def test_a_base_that_was_replaced_takes_no_more_adapters(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Of other norms an adapter's factors would be others; what is loaded goes on."""
    base = save_checkpoint(tmp_path / "base", initializer_range=0.08)
    pool = write_pool(tmp_path / "pool", base, {"plain": folders["plain"]})
    late = read_adapter(folders["some"], base).origin
    async with running(build(pool)) as engine:
        before = token_ids(await read(engine, request(PROMPT, ["plain"])))
        tensors = load_file(base / "model.safetensors")
        for name in tensors:
            if "layernorm" in name:
                tensors[name] = tensors[name] * 2
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        wanted = dataclasses.replace(request(PROMPT, ["some"]), adapters={"some": late})
        with pytest.raises(EngineFailed, match=r"some cannot be loaded: the base .* has changed"):
            await read(engine, wanted)
        assert token_ids(await read(engine, request(PROMPT, ["plain"]))) == before


def test_adapters_and_a_second_base_are_refused(
    base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """By the second base's name, before anything is loaded."""
    write_pool(tmp_path, base, {"plain": folders["plain"]})
    file = tmp_path / "pool.yaml"
    file.write_text(
        file.read_text().replace(
            "models:\n", f"models:\n- {{name: b, engine: e, checkpoint: {base}}}\n"
        )
    )
    with pytest.raises(PoolError, match=r"engines.e: adapters share .* but 'base' is another"):
        load_pool(tmp_path)
