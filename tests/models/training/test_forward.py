"""The packed forward pass and its losses, against transformers' own."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from models.errors import PoolError
from models.training.data import Conversation, Rows, TopTokens, lay_out
from models.training.forward import (
    Distillation,
    geometry,
    low_precision,
    packed_logits,
    packed_loss,
    rotary_tables,
    to_tensors,
)

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _model(architecture: str) -> PreTrainedModel:
    torch.manual_seed(7)
    model: PreTrainedModel
    if architecture == "llama":
        rope = {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
        model = LlamaForCausalLM(LlamaConfig(**_SIZES, rope_parameters=rope))
    elif architecture == "mistral":
        model = MistralForCausalLM(MistralConfig(**_SIZES, head_dim=16, sliding_window=None))
    elif architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**_SIZES, tie_word_embeddings=True))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=16))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Fresh biases are 0 and norms 1, which would hide them.
            parameter.add_(0.1 * torch.randn_like(parameter)) if "norm" in name else None
            parameter.normal_(0, 0.2) if name.endswith("bias") else None
    return model.eval()


def _rows(*, teacher: bool = False) -> Rows:
    rng = np.random.default_rng(0)

    def conversation(length: int) -> Conversation:
        return Conversation(
            tokens=[int(i) for i in rng.integers(0, 61, length)],
            is_answer=[bool(b) for b in rng.integers(0, 2, length)],
            teacher=TopTokens(
                ids=np.stack([rng.permutation(61)[:5] for _ in range(length)]).astype(np.int32),
                log_probabilities=np.log(rng.dirichlet(np.ones(5), length)).astype(np.float16),
            )
            if teacher
            else None,
        )

    rows = [[conversation(7), conversation(12)], [conversation(20)]]
    return lay_out(rows, row_tokens=24, question_weight=0.25)


def _logits(model: PreTrainedModel, rows: Rows) -> torch.Tensor:
    cos, sin = rotary_tables(model, 24)
    tensors = to_tensors(rows)
    return packed_logits(
        low_precision(model, torch.float32),
        tokens_BT=tensors["tokens_BT"],
        segments_BT=tensors["segments_BT"],
        positions_BT=tensors["positions_BT"],
        cos=cos,
        sin=sin,
        geometry=geometry(model),
    )


def _loss(
    model: PreTrainedModel,
    tensors: dict[str, torch.Tensor],
    distillation: Distillation | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = rotary_tables(model, 24)
    return packed_loss(
        low_precision(model, torch.float32),
        **tensors,
        total_weight=tensors["loss_weights_BT"].sum(),
        cos=cos,
        sin=sin,
        geometry=geometry(model),
        distillation=distillation,
    )


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_the_logits_are_those_of_transformers(architecture: str) -> None:
    """On each packed conversation they equal transformers' on the conversation alone."""
    model, rows = _model(architecture), _rows()
    ours = _logits(model, rows)
    for r in range(2):
        for s in range(1, rows.segments[r].max() + 1):
            where = rows.segments[r] == s
            theirs = model(input_ids=torch.from_numpy(rows.tokens[r, where])[None]).logits[0]
            torch.testing.assert_close(ours[r, torch.from_numpy(where)], theirs, atol=2e-5, rtol=0)


@torch.no_grad()
def test_the_label_loss_is_a_weighted_mean() -> None:
    """Answers count fully, the rest by its weight, the end of a conversation not at all."""
    model, rows = _model("qwen3"), _rows()
    tensors = to_tensors(rows)
    loss, label = _loss(model, tensors)
    losses = functional.cross_entropy(
        _logits(model, rows).flatten(0, 1), tensors["targets_BT"].flatten(), reduction="none"
    )
    weights = tensors["loss_weights_BT"].flatten()
    wanted = (losses * weights).sum() / weights.sum()
    assert float(loss) == float(label) == pytest.approx(float(wanted), abs=1e-6)


@torch.no_grad()
def test_distillation_is_the_divergence_from_the_teacher() -> None:
    """τ²·KL over the teacher's tokens at that temperature, mixed with the label loss."""
    model, rows = _model("llama"), _rows(teacher=True)
    tensors = to_tensors(rows)
    loss, label = _loss(model, tensors, Distillation(temperature=3.0, weight=0.25))
    wanted = 0.0
    student = (_logits(model, rows) / 3).log_softmax(-1)
    assert rows.teacher is not None
    for r, t in zip(*np.nonzero(rows.weights), strict=True):
        powers = np.exp(rows.teacher.log_probabilities[r, t].astype(np.float64) / 3)
        teacher = powers / powers.sum()
        there = student[r, t, torch.from_numpy(rows.teacher.ids[r, t]).long()].numpy()
        wanted += rows.weights[r, t] * 9 * (teacher * (np.log(teacher) - there)).sum()
    expected = 0.75 * float(label) + 0.25 * wanted / rows.weights.sum()
    assert float(loss) == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_a_silent_teacher_leaves_the_label_loss() -> None:
    """Conversations without a teacher beside ones with it count by their labels alone."""
    model = _model("llama")
    taught = Conversation(
        tokens=[1, 2, 3],
        is_answer=[True] * 3,
        teacher=TopTokens(
            ids=np.zeros((3, 2), np.int32), log_probabilities=np.full((3, 2), -9, np.float16)
        ),
    )
    rows = lay_out(
        [[taught], [Conversation(tokens=[4, 5, 6, 7], is_answer=[True] * 4)]],
        row_tokens=8,
        question_weight=1.0,
    )
    loss, label = _loss(model, to_tensors(rows.part(slice(1, 2))), Distillation())
    assert float(loss) == pytest.approx(float(label))


def test_what_cannot_be_computed_is_refused() -> None:
    """Another architecture or activation is named with what is allowed."""
    model = _model("llama")
    model.config.hidden_act = "gelu"
    with pytest.raises(PoolError, match="'gelu' is not supported; allowed is silu"):
        geometry(model)
    model.config.model_type = "gpt2"
    with pytest.raises(PoolError, match=r"'gpt2' is not supported.*llama"):
        geometry(model)
