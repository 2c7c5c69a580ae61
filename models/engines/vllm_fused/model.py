"""M same-shaped members as one wide vLLM model: a transformer with block-diagonal matrices.

Shapes: T tokens of a step, R rows to sample, M members of this rank, D hidden, H query heads, K
key/value heads, d head size, Q = (H + 2K)·d, F feed-forward, V vocabulary. vLLM sees one model with
M·H heads and hidden states [T, M·D]; inside, members lead: [M, T, D], one batched product for all.

Weights are those of `models.engines.stacked.weights` (norms' gains are in the projections). Under
tensor parallelism a rank holds whole members, and ranks talk once per step, about the fused
distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from vllm import _custom_ops as ops
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding import get_rope

from models.card import ModelCard
from models.engines.stacked.architecture import Architecture, read_architecture
from models.engines.stacked.matrices import as_they_are
from models.engines.stacked.weights import LayerWeights, Weights, load_weights
from models.engines.vllm_fused.feed_forward import FeedForward
from models.engines.vllm_fused.folder import read_members
from models.engines.vllm_fused.processor import Fusion, FusionTable

logger = init_logger(__name__)

# Rows of a prompt whose distributions are in memory at once, to hear evidence.
_EVIDENCE_ROWS = 256


class FusedLayer(nn.Module):
    """One layer of all members, around one wide attention."""

    def __init__(
        self, config: VllmConfig, architecture: Architecture, num_members: int, prefix: str
    ) -> None:
        super().__init__()
        shape = self._shape = architecture.shape
        self._num_members = num_members
        # Gains are in the weights that follow, but for those of Qwen3's heads.
        self.norm = RMSNorm(shape.hidden_size, architecture.norm_eps, has_weight=False)
        self.head_norm = RMSNorm(shape.head_dim, architecture.norm_eps, has_weight=False)
        self.feed_forward = FeedForward()
        self.rotary = get_rope(
            shape.head_dim,
            max_position=architecture.context_tokens,
            rope_parameters=config.model_config.hf_config.rope_parameters,
        )
        self.attention = Attention(
            num_members * shape.num_heads,
            shape.head_dim,
            shape.head_dim**-0.5,
            num_kv_heads=num_members * shape.num_kv_heads,
            cache_config=config.cache_config,
            prefix=f"{prefix}.attention",
        )

    def take(self, weights: LayerWeights[Tensor]) -> None:
        """Take the weights of this rank's members."""
        self.qkv_MDQ = _frozen(weights.qkv_MDQ)
        self.qkv_bias_M1Q = _optional(weights.qkv_bias_MQ)
        self.qk_gain_M1Hd = _optional(weights.qk_gain_MHd)
        self.out_MQD = _frozen(weights.out_MQD)
        self.out_bias_M1D = _optional(weights.out_bias_MD)
        self.feed_forward.take(weights.gate_up_MDF, weights.down_MFD)

    def forward(self, positions_T: Tensor, x_MTD: Tensor) -> Tensor:
        """Return the hidden states after this layer."""
        qkv_MTQ = torch.bmm(_normed(self.norm, x_MTD), self.qkv_MDQ)
        if self.qkv_bias_M1Q is not None:
            qkv_MTQ = qkv_MTQ + self.qkv_bias_M1Q
        attended_MTQ = self._attend(positions_T, qkv_MTQ)
        x_MTD = x_MTD.baddbmm_(attended_MTQ, self.out_MQD)
        if self.out_bias_M1D is not None:
            x_MTD = x_MTD + self.out_bias_M1D
        return x_MTD.add_(self.feed_forward(_normed(self.norm, x_MTD)))

    def _attend(self, positions_T: Tensor, qkv_MTQ: Tensor) -> Tensor:
        shape = self._shape
        num_qk = shape.num_heads + shape.num_kv_heads
        heads_MTHd = qkv_MTQ.view(
            self._num_members, -1, num_qk + shape.num_kv_heads, shape.head_dim
        )
        qk_MTHd, value_MTHd = heads_MTHd[:, :, :num_qk], heads_MTHd[:, :, num_qk:]
        if self.qk_gain_M1Hd is not None:
            qk_MTHd = self.head_norm(qk_MTHd.contiguous()) * self.qk_gain_M1Hd
        # vLLM's attention is token-major: the heads of all members side by side.
        query, key, value = (
            heads.transpose(0, 1).flatten(1).contiguous()
            for heads in (
                qk_MTHd[:, :, : shape.num_heads],
                qk_MTHd[:, :, shape.num_heads :],
                value_MTHd,
            )
        )
        query, key = self.rotary(positions_T, query, key)
        attended: Tensor = self.attention(query, key, value)
        return attended.view(-1, self._num_members, shape.num_heads * shape.head_dim).transpose(
            0, 1
        )


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0})
class FusedModel(nn.Module):
    """Everything before the language-model heads; vLLM compiles it as a whole."""

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        architecture: Architecture,
        num_members: int,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.norm = RMSNorm(architecture.shape.hidden_size, architecture.norm_eps, has_weight=False)
        self.layers = nn.ModuleList(
            FusedLayer(vllm_config, architecture, num_members, f"{prefix}.layers.{index}")
            for index in range(architecture.shape.num_layers)
        )

    def take(self, weights: Weights[Tensor]) -> None:
        """Take the weights of this rank's members."""
        # On CPU a transposed view of the heads is read ten times as slowly as rows side by side.
        embed_MVD = weights.embed_MVD
        assert embed_MVD is not None, "numbers have an embedding"
        self.embed_MVD = _frozen(embed_MVD.contiguous() if embed_MVD.is_cpu else embed_MVD)
        self.final_gain_M1D = _frozen(weights.final_gain_MD[:, None])
        for layer, its in zip(self.layers, weights.layers, strict=True):
            assert isinstance(layer, FusedLayer)
            layer.take(its)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Return the normed hidden states of all members side by side, [T, M·D]."""
        # Not index_select: on CPU that first copies a table that is the heads' transpose.
        x_MTD: Tensor = self.embed_MVD[:, input_ids]
        for layer in self.layers:
            x_MTD = layer(positions, x_MTD)
        normed_MTD: Tensor = _normed(self.norm, x_MTD) * self.final_gain_M1D
        return normed_MTD.transpose(0, 1).flatten(1)


class ShoalFusedForCausalLM(nn.Module):
    """The ensemble as vLLM sees it: one causal language model."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        members = read_members(Path(model_config.model))
        self._architecture = read_architecture(next(iter(members.values())))
        num_ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        num_local = len(members) // num_ranks
        self._local = slice(rank * num_local, (rank + 1) * num_local)
        self._num_ranks = num_ranks
        self._device = torch.get_default_device()
        self._dtype = model_config.dtype
        self._table = FusionTable.of(vllm_config, tuple(members), self._device)
        self.model = FusedModel(
            vllm_config=vllm_config,
            architecture=self._architecture,
            num_members=num_local,
            prefix=f"{prefix}.model" if prefix else "model",
        )

    def load_members(self, cards: Sequence[ModelCard]) -> None:
        """Load the weights of those members that are this rank's."""
        # vLLM's rotary embedding is vectorized on CPU only for halves.
        weights = load_weights(
            cards[self._local],
            self._architecture,
            self._device,
            self._dtype,
            pack=as_they_are,
            rotary_pairs=False,
        )
        if self._device.type == "cpu":
            # vLLM's attention computes rows of its scratch memory that nobody wrote. After its
            # mixture of experts, which shares that memory, they are small integers: denormal as
            # floats, and attention takes four times as long unless they count as zero.
            torch.set_flush_denormal(True)
        self.model.take(weights)
        self.head_MDV = _frozen(weights.head_MDV)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings of all members side by side, [T, M·D]."""
        return self.model.embed_MVD[:, input_ids].transpose(0, 1).flatten(1)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: object = None,  # noqa: ARG002 - vLLM passes it
        inputs_embeds: Tensor | None = None,  # noqa: ARG002 - vLLM passes it
    ) -> Tensor:
        """Return hidden states [T, M·D]; `inputs_embeds` and pipelines are not supported."""
        hidden: Tensor = self.model(input_ids, positions)
        if self._table.is_reading:
            self._read_prompts(hidden, positions)
        return hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Return the fused log-probabilities of each row, [R, V], float32."""
        fusion = self._table.take(len(hidden_states))
        logits_MRV = self._logits(hidden_states)
        return self._fuse(logits_MRV, fusion or self._prompt_fusion(hidden_states, logits_MRV))

    def _prompt_fusion(self, hidden: Tensor, logits_MTV: Tensor) -> Fusion:
        """Return how to fuse rows of one prompt that is scored.

        vLLM does not say whose they are, but they are a view into what `forward` returned.
        """
        if not self._table.scored:
            return self._table.uniform(len(hidden))
        row_bytes = hidden.stride(0) * hidden.element_size()
        first, within = divmod(hidden.data_ptr() - self._hidden_start, row_bytes)
        assert not within and 0 <= first < self._num_hidden, "a view into what forward returned"
        if first not in self._table.scored:
            return self._table.uniform(len(hidden))
        row, position = self._table.scored[first]
        tokens = row.following(position, len(hidden))
        said_TM = self._said(logits_MTV, tokens).T.tolist()
        return self._table.fusion_of(row, said_TM)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return each member's next-token logits, [M, R, V], float32."""
        hidden_MRD = hidden.view(len(hidden), len(self.head_MDV), -1).transpose(0, 1)
        return torch.bmm(hidden_MRD, self.head_MDV).float()

    def _fuse(self, logits_MRV: Tensor, fusion: Fusion) -> Tensor:
        """Fuse over the members of all ranks; both rules are sums over members inside."""
        weights_MR1 = fusion.weights_RM[:, self._local].T[:, :, None]
        if fusion.product_R1 is None:
            return _finish_mixture(self._sum(logits_MRV.softmax(-1).mul_(weights_MR1)))
        logp_MRV = logits_MRV.log_softmax(-1)
        mixed_RV = _finish_mixture(self._sum(logp_MRV.exp() * weights_MR1))
        multiplied_RV = self._sum(logp_MRV.mul_(weights_MR1)).log_softmax(-1)
        return torch.where(fusion.product_R1, multiplied_RV, mixed_RV)

    def _sum(self, terms_MRV: Tensor) -> Tensor:
        total_RV = terms_MRV.sum(0)
        return tensor_model_parallel_all_reduce(total_RV) if self._num_ranks > 1 else total_RV

    def _read_prompts(self, hidden: Tensor, positions: Tensor) -> None:
        """Hear the prompts' tokens of this step where requests weigh members by them, and note
        where those are that are scored.
        """
        self._hidden_start, self._num_hidden = hidden.data_ptr(), len(hidden)
        attention = get_forward_context().attn_metadata
        if not isinstance(attention, dict):  # a warm-up run
            return
        row_starts = getattr(next(iter(attention.values())), "query_start_loc", None)
        if row_starts is None:
            logger.warning_once(
                "shoal_evidence is not heard, and prompts are scored by the uniform mixture: the "
                "attention backend does not say where rows start; choose another with "
                "--attention-backend"
            )
            return
        starts = row_starts.tolist()
        for place, row in self._table.reading():
            start, end = starts[place], starts[place + 1]
            # Asked, not counted: steps inside a CUDA graph are not seen here.
            position = int(positions[start])
            tokens = row.following(position, end - start)
            if row.scored:
                self._table.scored[start] = row, position
            if tokens and row.evidence:
                row.hear(self._likelihoods(hidden[start:], tokens), len(tokens))
            row.read_to(position + len(tokens))

    def _likelihoods(self, hidden: Tensor, tokens: Sequence[int]) -> list[float]:
        """Return Σ log p of `tokens` for all members, each predicted by its row of `hidden`."""
        sums_M = []
        for first in range(0, len(tokens), _EVIDENCE_ROWS):
            some = tokens[first : first + _EVIDENCE_ROWS]
            logits_MTV = self._logits(hidden[first : first + len(some)])
            sums_M.append(self._said(logits_MTV, some).sum(1))
        return torch.stack(sums_M).sum(0).tolist()

    def _said(self, logits_MTV: Tensor, tokens: Sequence[int]) -> Tensor:
        """Return what all members say of `tokens`, each predicted by its row, [M, T]."""
        index_MT1 = torch.tensor(tokens, device=logits_MTV.device)[None, :, None].expand(
            len(logits_MTV), -1, 1
        )
        local_MT = logits_MTV.log_softmax(-1).gather(-1, index_MT1).squeeze(-1)
        return tensor_model_parallel_all_gather(local_MT, 0) if self._num_ranks > 1 else local_MT


def _normed(norm: RMSNorm, x: Tensor) -> Tensor:
    """Return `x`, each row scaled to a root mean square of one."""
    if x.is_cpu and not torch.compiler.is_compiling():
        # Where operations are launched one by one, one is faster than `norm`'s six.
        out = torch.empty_like(x)
        ops.rms_norm(out, x, None, norm.variance_epsilon)
        return out
    scaled: Tensor = norm(x)
    return scaled


def _finish_mixture(probs_RV: Tensor) -> Tensor:
    """Log of Σ w p; what no member finds likelier than 1e-38 counts as that."""
    return probs_RV.clamp_min_(torch.finfo(probs_RV.dtype).tiny).log_()


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _optional(weight: Tensor | None) -> nn.Parameter | None:
    """With an axis for tokens after that of members, None as None."""
    return None if weight is None else _frozen(weight[:, None])
