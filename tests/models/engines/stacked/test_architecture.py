"""What a checkpoint says is read, or refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from models.card import read_card
from models.engines.registry import create_engine
from models.engines.stacked.architecture import read_architecture, read_end_tokens
from models.errors import PoolError
from models.spec import EngineSpec, Model, ModelSpec
from tests.models.engines.stacked.tiny import (
    answer,
    build_engine,
    edit_config,
    request,
    save_checkpoint,
)


def test_llama3_frequencies_are_those_of_transformers(tmp_path: Path) -> None:
    """The rescaled rotary frequencies agree to float32 precision."""
    folder = save_checkpoint(tmp_path, "llama3-rope", head_dim=64)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(folder), "cpu")
    torch.testing.assert_close(read_architecture(read_card(folder)).frequencies(), theirs)


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"mlp_bias": True}, "mlp_bias True"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "rope_type 'yarn'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "'factor' is missing"),
        ("mistral", {"sliding_window": 64}, "sliding_window 64"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ],
)
def test_refuses_what_it_does_not_compute(
    kind: str, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    """A key that would change the result is refused with its name and value."""
    folder = save_checkpoint(tmp_path, kind)
    edit_config(folder, **changes)
    with pytest.raises(PoolError, match=named):
        read_architecture(read_card(folder))


def test_end_tokens(tmp_path: Path) -> None:
    """generation_config.json comes before config.json; one token or a list."""
    folder = save_checkpoint(tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert read_end_tokens(read_card(folder)) == {3, 4}
    (folder / "generation_config.json").unlink()
    assert read_end_tokens(read_card(folder)) == {0}


def test_members_need_one_architecture(tmp_path: Path) -> None:
    """A member with another norm or rotary base is refused, naming its file."""
    folders = [save_checkpoint(tmp_path / name) for name in ("a", "b")]
    edit_config(folders[1], rms_norm_eps=0.5)
    with pytest.raises(PoolError, match=r"b/config\.json: members of a stacked engine need one"):
        answer(build_engine(folders), request([1]))


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    """A checkpoint without one of the weights is refused with the weight's name."""
    folder = save_checkpoint(tmp_path)
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(PoolError, match=r"model\.layers\.2\.\S+' is missing"):
        answer(build_engine([folder]), request([1]))


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    """An option that the engine does not know is named when the engine is made."""
    with pytest.raises(PoolError, match=r"engines\.tiny\.options: speed: unknown key"):
        build_engine([save_checkpoint(tmp_path)], speed=11)


def test_cuda_must_be_there(tmp_path: Path) -> None:
    """Asking for CUDA on a machine without it says so at start."""
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    spec = EngineSpec(name="tiny", kind="stacked", device="cuda")
    model = ModelSpec(name="m", engine="tiny", checkpoint=str(tmp_path))
    engine = create_engine(spec, [Model(spec=model, card=read_card(save_checkpoint(tmp_path)))])
    with pytest.raises(PoolError, match=r"engines\.tiny\.device: cuda is not there"):
        answer(engine, request([1]))
