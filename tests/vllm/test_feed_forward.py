"""The feed-forward of all members against its definition, by each kernel that this machine has."""

import pytest
import torch
from torch.nn import functional

pytest.importorskip("vllm")

from vllm.config import VllmConfig, set_current_vllm_config

from models.engines.vllm_fused.feed_forward import FeedForward

MEMBERS = 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("num_tokens", [1, 2, 9, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# vLLM's kernels take multiples of 32; batched products take other hidden sizes.
@pytest.mark.parametrize(
    ("hidden", "feed_forward"), [(64, 96), (64, 80), (48, 96)], ids=["packed", "padded", "plain"]
)
def test_is_its_definition(
    num_tokens: int, dtype: torch.dtype, hidden: int, feed_forward: int
) -> None:
    """down(silu(x·gate) · (x·up)) per member, whichever kernel computes it."""
    generator = torch.Generator().manual_seed(hidden + feed_forward + num_tokens)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(MEMBERS, *shape, generator=generator).mul(0.3).to(DEVICE, dtype)

    x, gate, up = random(num_tokens, hidden), *(random(hidden, feed_forward) for _ in range(2))
    down = random(feed_forward, hidden)
    with set_current_vllm_config(VllmConfig()):
        layer = FeedForward()
    layer.take(torch.cat([gate, up], -1), down)
    with torch.inference_mode():
        out = layer(x)
    x64, gate64, up64, down64 = (tensor.double() for tensor in (x, gate, up, down))
    expected = (functional.silu(x64 @ gate64) * (x64 @ up64)) @ down64
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        out.double(), expected, rtol=rounding, atol=rounding * float(expected.abs().max())
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="packed on a CPU only")
def test_weights_are_packed_where_they_can_be() -> None:
    """A CPU's kernels take a hidden size that is a multiple of 32, in a layout of their own, with
    the inner columns padded to one."""
    with set_current_vllm_config(VllmConfig()):
        packed, plain = FeedForward(), FeedForward()
    packed.take(torch.ones(MEMBERS, 64, 160), torch.ones(MEMBERS, 80, 64))
    assert packed.gate_up.shape == (MEMBERS, 192, 64)
    assert packed.down.shape == (MEMBERS, 64, 96)
    plain.take(torch.ones(MEMBERS, 48, 192), torch.ones(MEMBERS, 96, 48))
    assert plain.gate_up.shape == (MEMBERS, 48, 192)
