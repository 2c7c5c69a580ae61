"""The forward pass of M members at once: a transformer whose weight matrices are block-diagonal.

Shapes: N rows of a step (see `layout`), L lanes, M members, D hidden, H query heads, K key/value
heads, G = H / K queries per key/value head, d head size, Q = (H + 2K)·d, F feed-forward, V
vocabulary, T tokens of one request in this step.

The cost of a decoding step on CPU is mostly the number of tensor operations, so there are few: one
product for query, key and value, one for gate and up, rotation as one complex product, residuals
added by the products themselves, everything into `buffers` that are made once. It knows nothing of
requests, sampling or fusion.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from models.engines.stacked.architecture import Architecture
from models.engines.stacked.buffers import Buffers, Norm, Product
from models.engines.stacked.cache import Arena
from models.engines.stacked.layers import Rotary
from models.engines.stacked.layout import Grouping, Layout, Order
from models.engines.stacked.weights import LayerWeights, Weights


class StackedModel:
    """Computes next-token logits of every lane; see the module's docstring."""

    def __init__(self, architecture: Architecture, weights: Weights[Any]) -> None:
        self._architecture, self._shape = architecture, architecture.shape
        self._norm_eps = architecture.norm_eps
        self._weights = weights
        self._layout: Layout | None = None
        self._buffers: Buffers | None = None
        device, dtype = weights.final_gain_MD.device, weights.final_gain_MD.dtype
        # [positions, 1, d / 2], complex: one rotation for all heads
        rotaries = list({layer.rotary for layer in architecture.layers if layer.rotary})
        self._rotations_T1d = [
            rotations(rotary, architecture.context_tokens)[:, None].to(device)
            for rotary in rotaries
        ]
        self._rotation_of_layer = [
            rotaries.index(layer.rotary) if layer.rotary else None for layer in architecture.layers
        ]
        # Rounded as the weights are.
        self._embedding_scale = torch.tensor(architecture.embedding_scale).to(dtype).item()

    def buffers(self, layout: Layout, *, keeps_copies: bool) -> Buffers:
        """Return what a forward pass over `layout` writes to; of copies see `PaddedAttention`."""
        like = self._weights.final_gain_MD
        return Buffers(self._architecture, layout, like, keeps_copies=keeps_copies)

    def forward(self, layout: Layout, arena: Arena, buffers: Buffers | None = None) -> Tensor:
        """Run the step's tokens, write their keys and values; return hidden states [N, D].

        The result is valid until the next call, or with `buffers` until the next one with these.
        """
        members_N = layout.rows.members_N
        b = buffers or self._buffers_of(layout)
        x_ND = b.x_ND.copy_(self._embed(members_N, layout.tokens_N))
        if self._embedding_scale != 1:
            x_ND *= self._embedding_scale
        rotations_N1d = [table.index_select(0, layout.positions_N) for table in self._rotations_T1d]
        for path in b.attention:
            path.begin()
        for index, (rotation, weights, cache) in enumerate(
            zip(self._rotation_of_layer, self._weights.layers, arena.layers, strict=True)
        ):
            self._norm(b)
            b.to_qkv.write(weights.qkv_MDQ)
            _add_bias(b.qkv_NQ, weights.qkv_bias_MQ, members_N)
            self._norm_heads(b, weights, members_N)
            if rotation is not None:
                _rotate(b.rotated_NHd, rotations_N1d[rotation])
            cache.index_copy_(0, layout.cache_rows_N, b.kv_NQ)
            _attend(b, cache, layout.order, index)
            if weights.out_gain_MD is None:
                b.from_attention.add(weights.out_MQD)
                _add_bias(x_ND, weights.out_bias_MD, members_N)
            else:
                b.attention_apart.write(weights.out_MQD)
                _add_bias(b.added_ND, weights.out_bias_MD, members_N)
                self._add_normed(b, weights.out_gain_MD, members_N)
            self._norm(b)
            b.to_gate_up.write(weights.gate_up_MDF)
            _add_bias(b.gate_up_NF, weights.gate_up_bias_MF, members_N)
            torch.mul(self._activate(b.gate_NF), b.up_NF, out=b.activated_NF)
            if weights.down_gain_MD is None:
                b.from_activated.add(weights.down_MFD)
                _add_bias(x_ND, weights.down_bias_MD, members_N)
            else:
                b.feed_forward_apart.write(weights.down_MFD)
                _add_bias(b.added_ND, weights.down_bias_MD, members_N)
                self._add_normed(b, weights.down_gain_MD, members_N)
        return x_ND

    def logits(self, hidden_LD: Tensor, lanes: Grouping) -> Tensor:
        """Return the next-token logits of hidden states, [L, V], float32."""
        normed_LD = torch.empty_like(hidden_LD)
        Norm(hidden_LD, normed_LD, self._norm_eps)()
        normed_LD *= self._weights.final_gain_MD.index_select(0, lanes.members_N)
        logits_LV = hidden_LD.new_empty(len(hidden_LD), self._shape.vocab_size)
        Product(normed_LD, logits_LV, lanes).write(self._weights.head_MDV)
        logits_LV = logits_LV.float()
        cap = self._architecture.logit_cap
        return logits_LV if cap is None else torch.tanh(logits_LV / cap) * cap

    def _embed(self, members_N: Tensor, tokens_N: Tensor) -> Tensor:
        weights = self._weights
        embedded_ND: Tensor = (
            weights.head_MDV.outputs(members_N, tokens_N)
            if weights.embed_MVD is None
            else weights.embed_MVD[members_N, tokens_N]
        )
        return embedded_ND

    def _buffers_of(self, layout: Layout) -> Buffers:
        if self._buffers is None or self._layout is not layout:
            # On CUDA copies are cheap and memory is dear.
            keeps_copies = not layout.positions_N.is_cuda
            self._layout = layout
            self._buffers = self.buffers(layout, keeps_copies=keeps_copies)
        return self._buffers

    def _norm(self, b: Buffers) -> None:
        """Norm a layer's input, where its architecture does."""
        if self._architecture.norms == "after":
            b.normed_ND.copy_(b.x_ND)
        else:
            b.norm()

    def _add_normed(self, b: Buffers, gain_MD: Tensor, members_N: Tensor) -> None:
        """Norm what attention or feed-forward made, and add it."""
        b.norm_added()
        b.x_ND.addcmul_(b.normed_ND, gain_MD.index_select(0, members_N))

    def _norm_heads(self, b: Buffers, weights: LayerWeights[Any], members_N: Tensor) -> None:
        """Norm queries and keys, each head by itself or all together, where that is done."""
        if weights.qk_gain_MHd is None:
            return
        heads_NHd, num_heads, eps = b.heads_NHd, self._shape.num_heads, self._norm_eps
        if self._architecture.head_norms == "each":
            normed_NHd = F.rms_norm(heads_NHd, heads_NHd.shape[-1:], None, eps)
        else:
            normed_NHd = torch.cat(
                [
                    F.rms_norm(part, part.shape[1:], None, eps)
                    for part in (heads_NHd[:, :num_heads], heads_NHd[:, num_heads:])
                ],
                dim=1,
            )
        torch.mul(normed_NHd, weights.qk_gain_MHd.index_select(0, members_N), out=heads_NHd)

    def _activate(self, gate_NF: Tensor) -> Tensor:
        if self._architecture.activation == "silu":
            return F.silu(gate_NF, inplace=True)
        return F.gelu(gate_NF, approximate="tanh")


def _attend(b: Buffers, cache: Tensor, order: Order | None, layer: int) -> None:
    """Attend from the step's rows to everything cached, or as far as the layer's window."""
    if order is not None:
        torch.index_select(b.query_NQ, 0, order.to_requests_N, out=b.ordered_query_NQ)
    for path in b.attention:
        path.attend(layer, cache)
    if order is not None:
        torch.index_select(b.ordered_output_NQ, 0, order.to_members_N, out=b.attended_NQ)


def _rotate(heads_NHd: Tensor, rotations_N1d: Tensor) -> None:
    """Apply the rotary embedding to queries and keys in place."""
    if heads_NHd.dtype == torch.float32:
        _complex(heads_NHd).mul_(rotations_N1d)
    else:
        rotated = _complex(heads_NHd.float()) * rotations_N1d
        heads_NHd.copy_(torch.view_as_real(rotated).flatten(-2))


def _add_bias(x_NO: Tensor, bias_MO: Tensor | None, members_N: Tensor) -> None:
    if bias_MO is not None:
        x_NO += bias_MO.index_select(0, members_N)


def _complex(heads_NHd: Tensor) -> Tensor:
    """View neighbouring pairs as complex numbers."""
    return torch.view_as_complex(heads_NHd.view(*heads_NHd.shape[:2], -1, 2))


def rotations(rotary: Rotary, context_tokens: int) -> Tensor:
    """Return the turn of every position and pair, [T, dims / 2], complex64.

    Their length is 1, or what YaRN and longrope multiply queries and keys by.
    """
    positions_T = torch.arange(context_tokens, dtype=torch.float32)
    angles = torch.outer(positions_T, frequencies(rotary, context_tokens))
    return torch.polar(torch.full_like(angles, _length(rotary)), angles)


def frequencies(rotary: Rotary, context_tokens: int) -> Tensor:
    """Return the frequencies, [dims / 2], float32, in radians per token."""
    exponents = torch.arange(0, rotary.dims, 2, dtype=torch.float32) / rotary.dims
    plain = 1.0 / rotary.theta**exponents
    factors = dict(rotary.factors)
    match rotary.scaling:
        case "linear":
            return plain / factors["factor"]
        case "llama3":
            return _llama3(plain, rotary)
        case "yarn":
            return _yarn(plain, rotary)
        case "longrope":
            # Ding et al. 2024. transformers takes the long ones as soon as a text is longer than
            # the model's first context, and computes it all anew; like vLLM and llama.cpp, an
            # engine that serves longer texts takes them for all.
            longer = context_tokens > rotary.original_context_tokens
            return plain / torch.tensor(rotary.long if longer else rotary.short)
        case "default" | "dynamic":  # dynamic changes nothing within the model's context
            return plain


def _llama3(plain: Tensor, rotary: Rotary) -> Tensor:
    """Grattafiori et al. 2024, section 3.2: slow waves are stretched by `factor`, fast ones kept,
    those between interpolated.
    """
    factors = dict(rotary.factors)
    low, high = factors["low_freq_factor"], factors["high_freq_factor"]
    waves_in_context = rotary.original_context_tokens * plain / (2 * math.pi)
    kept = ((waves_in_context - low) / (high - low)).clamp(0, 1)
    return kept * plain + (1 - kept) * plain / factors["factor"]


def _yarn(plain: Tensor, rotary: Rotary) -> Tensor:
    """Peng et al. 2023, section 3.2: as above, with a ramp over the dimensions."""
    factors = {"beta_fast": 32.0, "beta_slow": 1.0, **dict(rotary.factors)}

    def dimension(turns: float) -> float:
        """Return the dimension that turns so often within the original context."""
        waves = rotary.original_context_tokens / (turns * 2 * math.pi)
        return rotary.dims * math.log(waves) / (2 * math.log(rotary.theta))

    low, high = dimension(factors["beta_fast"]), dimension(factors["beta_slow"])
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.dims - 1)
    ramp = (torch.arange(rotary.dims // 2, dtype=torch.float32) - low) / (high - low or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return kept * plain + (1 - kept) * plain / factors["factor"]


def _length(rotary: Rotary) -> float:
    """Return what YaRN (section 3.4, "attention temperature") and longrope multiply queries and
    keys by.
    """
    factors = dict(rotary.factors)
    if "attention_factor" in factors:
        return factors["attention_factor"]
    if rotary.scaling == "longrope" and factors["factor"] > 1:
        return math.sqrt(1 + math.log(factors["factor"]) / math.log(rotary.original_context_tokens))
    if rotary.scaling != "yarn":
        return 1.0

    def temperature(weight: float) -> float:
        factor = factors["factor"]
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if "mscale" in factors and "mscale_all_dim" in factors:
        return temperature(factors["mscale"]) / temperature(factors["mscale_all_dim"])
    return temperature(1.0)
