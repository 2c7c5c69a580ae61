"""Cutting chunks out of tiny models of every architecture."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from models.downscale.cut import (
    activation_importance,
    cut,
    load_importance,
    pad,
    save_importance,
)
from models.downscale.recipe import MemberShape
from models.downscale.shape import (
    TOLERANCE,
    count_parameters,
    shape_of,
    solve_shape,
)
from models.errors import BaseError
from tests.models.downscale.tiny_models import ARCHITECTURES, random_conversations, tiny_model

HALF = {
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 40,
}


def logits(model, conversations):
    """The model's logits of padded conversations."""
    tokens, mask = pad(conversations)
    with torch.inference_mode():
        return model(input_ids=tokens, attention_mask=mask.long()).logits[mask]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cutting_nothing_leaves_the_base(architecture, tied):
    """With the base's own shape, the cut has the base's weights, bit for bit."""
    model, conversations = tiny_model(architecture, tied=tied), random_conversations()
    importance = activation_importance(model, conversations)
    chunk, report = cut(model, importance, shape_of(model.config))
    for name, tensor in model.state_dict().items():
        assert torch.equal(chunk.state_dict()[name], tensor), name
    assert report.parameters == report.base_parameters
    assert report.layers == (0, 1, 2, 3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cut_checkpoint_loads_and_has_the_solved_size(architecture, tmp_path):
    """A cut of a quarter loads with AutoModelForCausalLM, gives the same logits, and is within 2%
    of the wanted size, counted without building it."""
    model, conversations = tiny_model(architecture), random_conversations()
    target = model.num_parameters() // 4
    shape = solve_shape(model.config, target, MemberShape())
    chunk, report = cut(model, activation_importance(model, conversations), shape)
    assert abs(report.parameters / target - 1) <= TOLERANCE
    assert report.parameters == chunk.num_parameters() == count_parameters(model.config, shape)
    chunk.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(loaded, conversations), logits(chunk, conversations))
    assert torch.isfinite(logits(chunk, conversations)).all()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parts_that_do_nothing_can_go_without_a_trace(architecture, tied):
    """Where heads, channels and a layer of the base are zero, the cut without them keeps the
    logits: the norms' scale over fewer channels is made up for."""
    model, conversations = tiny_model(architecture, tied=tied), random_conversations()
    keep_hidden = torch.arange(0, 64, 2)
    with torch.no_grad():
        zero = torch.ones(64, dtype=torch.bool)
        zero[keep_hidden] = False
        model.model.embed_tokens.weight[:, zero] = 0
        for index, layer in enumerate(model.model.layers):
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.weight[zero] = 0
                if index == 1:
                    part.weight.zero_()
            layer.mlp.down_proj.weight[:, index + 4 : index + 20] = 0
            layer.mlp.up_proj.weight[index + 4 : index + 20] = 0
            # One dead head in two groups, and two dead groups: heads 0, 3 of groups 0, 1.
            for head in (0, 3, 4, 5, 6, 7):
                layer.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8] = 0
                group = head // 2
                if group > 1:
                    layer.self_attn.v_proj.weight[8 * group : 8 * group + 8] = 0
                    if layer.self_attn.v_proj.bias is not None:
                        layer.self_attn.v_proj.bias[8 * group : 8 * group + 8] = 0
    importance = activation_importance(model, conversations)
    # A head that writes nowhere may still have activations, which is all that the score sees.
    heads = importance.heads_LH.copy()
    heads[:, [0, 3]] = 0
    shape = replace(
        shape_of(model.config),
        hidden_size=32,
        num_layers=3,
        num_heads=2,
        num_kv_heads=2,
        intermediate_size=80,
    )
    if architecture == "qwen2":
        shape = replace(shape, hidden_size=32, num_heads=4, num_kv_heads=2)
    chunk, report = cut(model, replace(importance, heads_LH=heads), shape)
    assert report.hidden == tuple(keep_hidden.tolist())
    assert report.layers == (0, 2, 3)
    expected, found = logits(model, conversations), logits(chunk, conversations)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_domain_decides_what_is_kept():
    """Different examples lead to different channels: each chunk keeps what its domain uses."""
    model = tiny_model("llama")
    low = [replace(c, tokens=[t % 8 + 1 for t in c.tokens]) for c in random_conversations()]
    high = [replace(c, tokens=[t % 8 + 80 for t in c.tokens]) for c in random_conversations()]
    shape = replace(shape_of(model.config), **HALF)
    kept = [cut(model, activation_importance(model, c), shape)[1] for c in (low, high)]
    assert kept[0].hidden != kept[1].hidden
    assert kept[0].feed_forward != kept[1].feed_forward


def test_importance_ignores_padding_and_survives_a_file(tmp_path):
    """Scores of examples of uneven length are those of the examples one by one; and round-trip."""
    model, conversations = tiny_model("qwen3"), random_conversations(4)
    together = activation_importance(model, conversations)
    alone = [activation_importance(model, [c]) for c in conversations]
    squares = np.sum([one.feed_forward_LF**2 for one in alone], axis=0)
    np.testing.assert_allclose(together.feed_forward_LF, np.sqrt(squares), rtol=1e-4)
    tokens = [len(c.tokens) for c in conversations]
    layers = np.average([one.layers_L for one in alone], axis=0, weights=tokens)
    np.testing.assert_allclose(together.layers_L, layers, atol=1e-6)
    save_importance(together, tmp_path / "importance.npz")
    loaded = load_importance(tmp_path / "importance.npz")
    np.testing.assert_array_equal(loaded.hidden_D, together.hidden_D)


def test_importance_formulas():
    """Channel, head and layer scores are those of the papers, computed here the long way."""
    model, (example,) = tiny_model("llama"), random_conversations(1)
    seen = {}
    layer = model.model.layers[1]
    layer.mlp.down_proj.register_forward_pre_hook(lambda _, x: seen.update(ff=x[0][0]))
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, x: seen.update(o=x[0][0]))
    layer.register_forward_hook(lambda _, x, y: seen.update(before=x[0][0], after=y[0]))
    importance = activation_importance(model, [example])
    np.testing.assert_allclose(
        importance.feed_forward_LF[1], seen["ff"].abs().mean(0).detach(), rtol=1e-5
    )
    heads = seen["o"].abs().mean(0).view(8, 8).norm(dim=-1).detach()
    np.testing.assert_allclose(importance.heads_LH[1], heads, rtol=1e-5)
    cosine = torch.cosine_similarity(seen["before"], seen["after"], dim=-1).mean().item()
    assert importance.layers_L[1] == pytest.approx(1 - cosine, abs=1e-5)


def test_impossible_shapes_are_refused_by_name():
    """Errors name the key, the value and what is allowed."""
    llama, qwen2 = tiny_model("llama"), tiny_model("qwen2")
    importance = activation_importance(llama, random_conversations())
    base = shape_of(llama.config)
    with pytest.raises(BaseError, match="hidden_size: 128 is not within 1 and the base's 64"):
        cut(llama, importance, replace(base, hidden_size=128))
    with pytest.raises(BaseError, match="hidden_size: 30 is no multiple of num_heads 4"):
        cut(llama, importance, replace(base, hidden_size=30, num_heads=4))
    with pytest.raises(BaseError, match="Qwen2 has no head_dim of its own"):
        cut(qwen2, importance, replace(base, hidden_size=48, num_heads=4))
    with pytest.raises(BaseError, match="more per group"):
        cut(llama, importance, replace(base, num_heads=4, num_kv_heads=1))
    with pytest.raises(BaseError, match="no shape of 100 parameters"):
        solve_shape(llama.config, 100, MemberShape())
