"""The packed forward pass of a decoder, its loss, and any per-token figure of its logits.

Written to compile to few, large kernels. Matrix products run in the weights' type (bf16 as a rule);
norms, softmax, residual stream and logits in fp32. Computes what transformers computes for Llama,
Mistral, Qwen2 and Qwen3 (a test compares them), at two to three times its training speed on a CPU,
because packed rows of T = 128 need no general attention kernel. On CUDA the fused attention kernel
is the faster one.

Distillation is Hinton, Vinyals and Dean 2015: at temperature τ, τ²·KL(teacher ‖ student). The
teacher is given by its K likeliest tokens at each position, renormalised, so it need not run
beside the student. Held-out losses, a teacher's likeliest tokens and members' probabilities of the
right answers are all one forward pass and a reduction (`Scorer`).

Shapes: `B` rows, `T` tokens a row, `D` hidden, `H` heads, `K` key/value heads (of a teacher: its
likeliest tokens), `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from models.card import SUPPORTED_ARCHITECTURES
from models.errors import PoolError
from models.training.data import Conversation, Rows, lay_out

Weights = dict[str, Tensor]
Compiled = TypeVar("Compiled", bound=Callable[..., Any])
_MASKED = -1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """What the forward pass must know beyond the weights' own shapes and names."""

    num_layers: int
    head_size: int
    eps: float


def geometry(model: PreTrainedModel) -> Geometry:
    """Read it off `model`'s configuration.

    Raises:
        PoolError: an architecture or activation that this forward pass does not compute.
    """
    config: Any = model.config
    if config.model_type not in SUPPORTED_ARCHITECTURES:
        raise PoolError(
            f"model_type {config.model_type!r} is not supported; "
            f"allowed are {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise PoolError(f"hidden_act {config.hidden_act!r} is not supported; allowed is silu")
    head_size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return Geometry(
        num_layers=int(config.num_hidden_layers),
        head_size=int(head_size),
        eps=float(config.rms_norm_eps),
    )


def low_precision(model: PreTrainedModel, dtype: torch.dtype) -> Weights:
    """Parameters by name, matrices cast to `dtype` (differentiably), norms left in fp32.

    Of a matrix that is computed of others, as an adapted one is, the one that they make.
    """
    weights: Weights = {n: p for n, p in model.named_parameters() if ".parametrizations." not in n}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            weights[f"{name}.weight"] = module.get_submodule("parametrizations.weight")()
    return {name: p if p.ndim == 1 else p.to(dtype) for name, p in weights.items()}


@torch.no_grad()
def rotary_tables(model: PreTrainedModel, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[num_positions, head_size]` of the model's own rotary embedding."""
    positions = torch.arange(num_positions, device=model.device)[None]
    rotary: Any = model.model.rotary_emb
    cos, sin = rotary(torch.zeros(1, device=model.device), positions)
    return cos[0].float(), sin[0].float()


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def _linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    bias = weights.get(f"{name}.bias")
    y = x @ weights[f"{name}.weight"].T
    return y if bias is None else y + bias.to(y.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    if q.is_cuda:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
    scores = torch.matmul(q, k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5 + bias
    return torch.matmul(scores.softmax(-1).to(q.dtype), v)


def packed_states(
    weights: Weights,
    *,
    tokens_BT: Tensor,
    segments_BT: Tensor,
    positions_BT: Tensor,
    cos: Tensor,
    sin: Tensor,
    geometry: Geometry,
) -> list[Tensor]:
    """The residual stream `[B, T, D]` after each layer, and last what the head reads of it.

    Every segment attends to itself alone.
    """
    embedding = weights["model.embed_tokens.weight"]
    dtype, size, eps = embedding.dtype, geometry.head_size, geometry.eps
    B, T = tokens_BT.shape
    same = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=tokens_BT.device).tril()
    bias = torch.where(same & causal, 0.0, _MASKED)
    cos_B1TH = cos[positions_BT][:, None].to(dtype)
    sin_B1TH = sin[positions_BT][:, None].to(dtype)
    x = functional.embedding(tokens_BT, embedding).float()
    states = []
    for i in range(geometry.num_layers):
        layer = f"model.layers.{i}."
        h = _norm(x, weights[layer + "input_layernorm.weight"], eps).to(dtype)
        q, k, v = (
            _linear(h, weights, f"{layer}self_attn.{part}_proj").view(B, T, -1, size)
            for part in "qkv"
        )
        if f"{layer}self_attn.q_norm.weight" in weights:
            q = _norm(q.float(), weights[f"{layer}self_attn.q_norm.weight"], eps).to(dtype)
            k = _norm(k.float(), weights[f"{layer}self_attn.k_norm.weight"], eps).to(dtype)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k = _rotate(q, cos_B1TH, sin_B1TH), _rotate(k, cos_B1TH, sin_B1TH)
        shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        mixed = _attend(q, k, v, bias).transpose(1, 2).reshape(B, T, -1)
        x = x + _linear(mixed, weights, f"{layer}self_attn.o_proj").float()
        h = _norm(x, weights[layer + "post_attention_layernorm.weight"], eps).to(dtype)
        gated = functional.silu(_linear(h, weights, f"{layer}mlp.gate_proj"))
        gated = gated * _linear(h, weights, f"{layer}mlp.up_proj")
        x = x + _linear(gated, weights, f"{layer}mlp.down_proj").float()
        states.append(x)
    return [*states, _norm(x, weights["model.norm.weight"], eps).to(dtype)]


def head_of(weights: Weights) -> Tensor:
    """The matrix `[V, D]` that makes logits of the last state; the embedding where it is tied."""
    return weights.get("lm_head.weight", weights["model.embed_tokens.weight"])


def packed_logits(weights: Weights, **arguments: Any) -> Tensor:  # noqa: ANN401 - see `packed_states`
    """Logits `[B, T, V]` in fp32, of what `packed_states` takes."""
    return (packed_states(weights, **arguments)[-1] @ head_of(weights).T).float()


def compile_shapes(function: Compiled) -> Compiled:
    """`function` compiled for the very shapes it is called with, however many they are."""
    compile_: Any = torch.compile  # its overloads leave recompile_limit out
    result: Compiled = compile_(function, dynamic=False, recompile_limit=256)
    return result


def to_tensors(rows: Rows, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The arrays of `rows` under the names that the forward pass and the losses take them by."""
    arrays = {
        "tokens_BT": rows.tokens,
        "segments_BT": rows.segments,
        "positions_BT": rows.positions,
        "targets_BT": rows.targets,
        "loss_weights_BT": rows.weights,
    }
    if rows.teacher is not None:
        arrays["teacher_ids_BTK"] = rows.teacher.ids
        arrays["teacher_log_probabilities_BTK"] = rows.teacher.log_probabilities
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation:
    """`weight` in [0, 1] is the share of the teacher in the loss, the label has the rest."""

    temperature: float = 2.0
    weight: float = 0.5


def packed_loss(
    weights: Weights,
    *,
    targets_BT: Tensor,
    loss_weights_BT: Tensor,
    total_weight: Tensor,
    distillation: Distillation | None = None,
    teacher_ids_BTK: Tensor | None = None,
    teacher_log_probabilities_BTK: Tensor | None = None,
    **inputs: Any,  # noqa: ANN401 - see `packed_states`
) -> tuple[Tensor, Tensor]:
    """What to minimise, and the label loss within it; both in nats, weighted sums.

    The sums are divided by `total_weight`, that of the whole step, so that the parts of an
    accumulated step add up. A position where the teacher says nothing (its first log-probability
    is positive) counts by its label alone.
    """
    flat = packed_logits(weights, **inputs).flatten(0, 1)
    label_N = functional.cross_entropy(flat, targets_BT.reshape(-1), reduction="none")
    shares_N = loss_weights_BT.reshape(-1) / total_weight
    label = (label_N * shares_N).sum()
    if distillation is None or teacher_ids_BTK is None or teacher_log_probabilities_BTK is None:
        return label, label.detach()
    tau = distillation.temperature
    teacher_NK = (teacher_log_probabilities_BTK.flatten(0, 1).float() / tau).log_softmax(-1)
    student_NV = (flat / tau).log_softmax(-1)
    student_NK = student_NV.gather(-1, teacher_ids_BTK.flatten(0, 1).long())
    divergence_N = tau**2 * (teacher_NK.exp() * (teacher_NK - student_NK)).sum(-1)
    taught_N = teacher_log_probabilities_BTK[..., 0].reshape(-1) <= 0
    share = distillation.weight
    mixed_N = torch.where(taught_N, (1 - share) * label_N + share * divergence_N, label_N)
    return (mixed_N * shares_N).sum(), label.detach()


Reduction: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""From logits `[B, T, V]` and targets `[B, T]` to tensors `[B, T, ...]`."""

_ROWS: Final = 64


class Scorer:
    """Runs one model over packed rows; `dtype` is that of the matrix products."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        row_tokens: int,
        compiled: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Prepare; the model's weights must not change afterwards."""
        self._row_tokens = row_tokens
        self._device = model.device
        with torch.no_grad():
            self._weights = low_precision(model, dtype)
        cos, sin = rotary_tables(model, row_tokens)
        self._constants: dict[str, Any] = {"cos": cos, "sin": sin, "geometry": geometry(model)}
        self._forward = compile_shapes(packed_logits) if compiled else packed_logits

    @torch.no_grad()
    def map(
        self,
        conversations: Sequence[Conversation],
        reduce: Reduction,
        *,
        progress: Callable[[int], None] = lambda _: None,
    ) -> list[tuple[NDArray[Any], ...]]:
        """What `reduce` makes of each conversation, `[its tokens, ...]` per returned array.

        Position t stands for what follows token t; the last position follows the end and its
        target means nothing. `progress` is told how many conversations each batch held.

        Raises:
            ValueError: a conversation is longer than a row.
        """
        found: dict[int, tuple[NDArray[Any], ...]] = {}
        rows = _fill(conversations, self._row_tokens)
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            # Always the same shape, so that one compiled forward serves all batches.
            padded = [*part, *[[] for _ in range(min(_ROWS, len(rows)) - len(part))]]
            batch = lay_out(
                [[conversations[i] for i in row] for row in padded],
                row_tokens=self._row_tokens,
                question_weight=1.0,
            )
            tensors = to_tensors(batch, self._device)
            logits = self._forward(
                self._weights,
                tokens_BT=tensors["tokens_BT"],
                segments_BT=tensors["segments_BT"],
                positions_BT=tensors["positions_BT"],
                **self._constants,
            )
            arrays = [a.cpu().numpy() for a in reduce(logits, tensors["targets_BT"])]
            for r, row in enumerate(part):
                at = 0
                for index in row:
                    end = at + len(conversations[index].tokens)
                    found[index] = tuple(np.array(array[r, at:end]) for array in arrays)
                    at = end
            progress(sum(map(len, part)))
        return [found[index] for index in range(len(conversations))]


def _fill(conversations: Sequence[Conversation], row_tokens: int) -> list[list[int]]:
    """Rows of indices, longest conversations first, each row filled until the next is too long."""
    lengths = [len(conversation.tokens) for conversation in conversations]
    if lengths and max(lengths) > row_tokens:
        raise ValueError(f"a conversation has {max(lengths)} tokens; a row has {row_tokens}")
    rows: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not rows or lengths[index] > room:
            rows.append([])
            room = row_tokens
        rows[-1].append(index)
        room -= lengths[index]
    return rows


def target_log_probabilities(logits: Tensor, targets: Tensor) -> tuple[Tensor]:
    """The natural-log probability of each target, `[B, T]`."""
    return (logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0],)


def answer_loss(
    conversations: Sequence[Conversation], log_probabilities: Sequence[NDArray[Any]]
) -> float:
    """Mean negative log-probability of the answers' tokens, in nats.

    `log_probabilities` are those of each conversation's targets.
    """
    total, count = 0.0, 0
    for conversation, values in zip(conversations, log_probabilities, strict=True):
        answers = np.asarray(conversation.is_answer[1:], bool)
        total -= float(values[:-1][answers].sum())
        count += int(answers.sum())
    return total / max(count, 1)
