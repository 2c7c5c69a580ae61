"""The folder that `shoal stack` writes."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from models.card import read_card
from models.engines.vllm_fused.folder import read_members, write_folder
from models.errors import PoolError
from models.pool import DEFAULT_POOL, load_pool
from router.cli.main import app
from tests.models.engines.stacked.tiny import edit_config, save_checkpoint


def _cards(tmp_path: Path, kind: str = "llama", num_members: int = 2, **options: object):
    return {
        f"m{i}": read_card(save_checkpoint(tmp_path / f"m{i}", kind, seed=i, **options))
        for i in range(num_members)
    }


def test_references_members(tmp_path: Path) -> None:
    """The folder has the widths of all members, and finds them by relative paths, also after
    both moved together; it holds no weights."""
    cards = _cards(tmp_path / "before", "qwen3", 3)
    folder = tmp_path / "before" / "stacked"
    write_folder(cards, folder)
    config = json.loads((folder / "config.json").read_text())
    shape = cards["m0"].shape
    assert config["architectures"] == ["ShoalFusedForCausalLM"]
    assert config["hidden_size"] == 3 * shape.hidden_size
    assert config["num_attention_heads"] == 3 * shape.num_heads
    assert config["num_key_value_heads"] == 3 * shape.num_kv_heads
    assert config["head_dim"] == shape.head_dim
    assert not list(folder.glob("*.safetensors"))
    assert (folder / "tokenizer.json").read_bytes() == (
        cards["m0"].path / "tokenizer.json"
    ).read_bytes()
    (tmp_path / "before").rename(tmp_path / "after")
    moved = read_members(tmp_path / "after" / "stacked")
    assert list(moved) == list(cards)
    assert [card.shape for card in moved.values()] == [shape] * 3


def test_ends_where_a_member_ends(tmp_path: Path) -> None:
    """The end tokens are those of all members."""
    cards = _cards(tmp_path)
    (cards["m1"].path / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    cards["m1"] = read_card(cards["m1"].path)
    write_folder(cards, tmp_path / "stacked")
    written = json.loads((tmp_path / "stacked" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [0, 3, 5]


def test_refuses_members_that_differ(tmp_path: Path) -> None:
    """Another shape, another rotary base, one member, or a folder that exists is refused, and
    nothing is left behind."""
    cards = _cards(tmp_path)
    wide = read_card(save_checkpoint(tmp_path / "wide", intermediate_size=128))
    with pytest.raises(PoolError, match="one architecture, but 'wide'"):
        write_folder({**cards, "wide": wide}, tmp_path / "stacked")
    with pytest.raises(PoolError, match="at least two members are needed, got m0"):
        write_folder({"m0": cards["m0"]}, tmp_path / "stacked")
    edit_config(cards["m1"].path, rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    with pytest.raises(PoolError, match="one architecture, but 'm1'"):
        write_folder(cards, tmp_path / "stacked")
    edit_config(cards["m0"].path, hidden_act="gelu")
    with pytest.raises(PoolError, match="hidden_act 'gelu'"):
        write_folder(cards, tmp_path / "stacked")
    with pytest.raises(PoolError, match="is there already"):
        write_folder(cards, cards["m0"].path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m0", "m1", "wide"]


def test_refuses_quantized_members(tmp_path: Path) -> None:
    """Quantized weights cannot be stacked."""
    cards = _cards(tmp_path)
    edit_config(cards["m0"].path, quantization_config={"quant_method": "fp8"})
    cards["m0"] = read_card(cards["m0"].path)
    with pytest.raises(PoolError, match="weights are quantized: fp8"):
        write_folder(cards, tmp_path / "stacked")


def test_names_a_folder_that_is_not_one(tmp_path: Path) -> None:
    """A plain checkpoint is not taken for a fused folder."""
    with pytest.raises(PoolError, match="made by `shoal stack`"):
        read_members(save_checkpoint(tmp_path / "m0"))


def _stacked_models() -> list[str]:
    """The members of the shipped pool's stacked engine of several models."""
    pool = load_pool(DEFAULT_POOL)
    stacks = [pool.models_of(engine.name) for engine in pool.engines if engine.kind == "stacked"]
    [names] = [[model.name for model in models] for models in stacks if len(models) > 1]
    return names


def test_command(tmp_path: Path) -> None:
    """`shoal stack` takes the pool's stacked engine of several models, or those named."""
    out, names = tmp_path / "fused", _stacked_models()
    result = CliRunner().invoke(app, ["stack", str(DEFAULT_POOL), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert list(read_members(out)) == names
    assert f"vllm serve {out}" in result.output
    two, wanted = tmp_path / "two", [names[1], names[0]]
    result = CliRunner().invoke(
        app, ["stack", str(DEFAULT_POOL), "--out", str(two), "--models", ",".join(wanted)]
    )
    assert result.exit_code == 0, result.output
    assert list(read_members(two)) == wanted


@pytest.mark.parametrize(
    ("other", "message"),
    [("base", "one architecture, but 'base'"), ("tax", "'tax' is no model")],
)
def test_command_refuses(other: str, message: str, tmp_path: Path) -> None:
    """What cannot be stacked ends the command with status 2 and says why."""
    models = f"{_stacked_models()[0]},{other}"
    result = CliRunner().invoke(
        app, ["stack", str(DEFAULT_POOL), "--out", str(tmp_path / "x"), "--models", models]
    )
    assert result.exit_code == 2
    assert message in result.output
