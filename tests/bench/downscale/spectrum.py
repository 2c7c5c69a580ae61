"""Importance of a model's parts from its weights alone, by what they keep of the spectrum.

PruneNet (Sengupta et al. 2025, "You Only Prune Once") prunes the rows of a matrix so that its
singular values change least, with a learned policy. Here the change is taken to first order
instead: without row i, the k-th singular value falls by about σ_k·u_ik² / 2, so a row's score is
Σ_k σ_k·u_ik², its part of the nuclear norm. No examples, no forward pass.

Shapes: `D` hidden, `F` feed-forward, `H` heads; a matrix is scored by its rows.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.downscale.cut import Array, Importance
from models.downscale.shape import layers_of, shape_of


@torch.inference_mode()
def spectrum_importance(model: PreTrainedModel) -> Importance:
    """Score the parts of `model` without running it.

    A layer's score is what it writes to the residual stream, the nuclear norm of its two output
    projections, each scaled by the norm weights before it.
    """
    shape = shape_of(model.config)
    layers_L, heads_LH, feed_forward_LF = [], [], []
    hidden_D = row_scores(_weight(model, "model.embed_tokens").T)
    for index in range(len(layers_of(model))):
        at = f"model.layers.{index}."
        before, after = (
            model.get_parameter(f"{at}{name}.weight").float()
            for name in ("input_layernorm", "post_attention_layernorm")
        )
        value = _weight(model, at + "self_attn.v_proj") * before
        gate, up = (_weight(model, f"{at}mlp.{part}_proj") * after for part in ("gate", "up"))
        out, down = (_weight(model, at + part) for part in ("self_attn.o_proj", "mlp.down_proj"))
        per_group = shape.num_heads // shape.num_kv_heads
        groups = value.view(shape.num_kv_heads, shape.head_dim, -1)
        values = groups.repeat_interleave(per_group, 0).flatten(0, 1)
        heads = row_scores(torch.cat((values, out.T), 1))
        heads_LH.append(heads.reshape(shape.num_heads, shape.head_dim).sum(-1))
        feed_forward_LF.append(row_scores(torch.cat((gate, up, down.T), 1)))
        hidden_D = hidden_D + row_scores(torch.cat((gate.T, up.T, value.T, out, down), 1))
        layers_L.append(_nuclear(out) * _mean(before) + _nuclear(down) * _mean(after))
    return Importance(
        layers_L=np.array(layers_L),
        heads_LH=np.stack(heads_LH),
        feed_forward_LF=np.stack(feed_forward_LF),
        hidden_D=hidden_D,
        norm_energy_ND=np.ones((2 * shape.num_layers + 1, shape.hidden_size)),
    )


def row_scores(matrix: Tensor) -> Array:
    """Each row's part of the nuclear norm; they sum to it."""
    u, sigma, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    scores: Array = (u.square() * sigma).sum(-1).cpu().numpy()
    return scores


def _weight(model: PreTrainedModel, name: str) -> Tensor:
    return model.get_parameter(name + ".weight").float()


def _nuclear(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix.double()).sum())


def _mean(weight: Tensor) -> float:
    return float(weight.abs().mean())
