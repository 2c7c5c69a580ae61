"""The training loss of a Llama checkpoint, written out so that it compiles to few, large kernels.

Shapes: `B` rows, `T` tokens a row, `D` hidden, `H` heads, `K` key/value heads, `V` vocabulary.
Matrix products run in bf16, norms, softmax, residual stream and loss in fp32. Computes what
transformers' `LlamaForCausalLM` computes (a test compares them) at two to three times its
training speed on a CPU, because packed rows need no general attention kernel at T = 128.
"""

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from models.training.data import Rows
from models.training.shapes import ROPE_THETA

Weights = dict[str, Tensor]
_MASKED = -1e9


def low_precision(model: LlamaForCausalLM, dtype: torch.dtype) -> Weights:
    """Parameters by name, matrices cast to `dtype` (differentiably), norms left in fp32."""
    return {name: p if p.ndim == 1 else p.to(dtype) for name, p in model.named_parameters()}


def rotary_tables(head_size: int, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[num_positions, head_size]` of the rotary embedding."""
    inverse = ROPE_THETA ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inverse).repeat(1, 2)
    return angles.cos(), angles.sin()


def _norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return (weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))).to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def packed_loss(
    weights: Weights,
    *,
    tokens_BT: Tensor,
    segments_BT: Tensor,
    positions_BT: Tensor,
    targets_BT: Tensor,
    loss_weights_BT: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_layers: int,
    head_size: int,
    eps: float,
) -> Tensor:
    """Weighted mean cross-entropy of the next token, in nats."""
    embedding = weights["model.embed_tokens.weight"]
    dtype = embedding.dtype
    B, T = tokens_BT.shape
    same = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=tokens_BT.device).tril()
    bias = torch.where(same & causal, 0.0, _MASKED)
    cos_B1TH = cos[positions_BT][:, None].to(dtype)
    sin_B1TH = sin[positions_BT][:, None].to(dtype)
    x = functional.embedding(tokens_BT, embedding).float()
    for i in range(num_layers):
        layer = f"model.layers.{i}."
        h = _norm(x, weights[layer + "input_layernorm.weight"], eps, dtype)
        q, k, v = (
            (h @ weights[f"{layer}self_attn.{part}_proj.weight"].T)
            .view(B, T, -1, head_size)
            .transpose(1, 2)
            for part in "qkv"
        )
        q, k = _rotate(q, cos_B1TH, sin_B1TH), _rotate(k, cos_B1TH, sin_B1TH)
        shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        scores = torch.matmul(q, k.transpose(-1, -2)).float() * head_size**-0.5 + bias
        mixed = torch.matmul(scores.softmax(-1).to(dtype), v).transpose(1, 2).reshape(B, T, -1)
        x = x + (mixed @ weights[layer + "self_attn.o_proj.weight"].T).float()
        h = _norm(x, weights[layer + "post_attention_layernorm.weight"], eps, dtype)
        gate = functional.silu(h @ weights[layer + "mlp.gate_proj.weight"].T)
        up = h @ weights[layer + "mlp.up_proj.weight"].T
        x = x + ((gate * up) @ weights[layer + "mlp.down_proj.weight"].T).float()
    h = _norm(x, weights["model.norm.weight"], eps, dtype)
    logits = (h @ embedding.T).float().view(B * T, -1)
    loss = functional.cross_entropy(logits, targets_BT.reshape(-1), reduction="none")
    flat = loss_weights_BT.reshape(-1)
    return (loss * flat).sum() / flat.sum()


def to_tensors(rows: Rows) -> dict[str, Tensor]:
    """The arrays of `rows` under the names that `packed_loss` takes them by."""
    return {
        "tokens_BT": torch.from_numpy(rows.tokens),
        "segments_BT": torch.from_numpy(rows.segments),
        "positions_BT": torch.from_numpy(rows.positions),
        "targets_BT": torch.from_numpy(rows.targets),
        "loss_weights_BT": torch.from_numpy(rows.weights),
    }
