"""Continual training: exact mixtures, resumption, distillation, accumulation, clear stops."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from models.downscale.adapt import adapt, mean_loss, mix
from models.downscale.data import with_lessons, write_lessons
from models.downscale.recipe import AdaptSettings
from models.errors import CorpusError, DivergedError
from models.training.data import Conversation
from models.training.forward import Scorer
from models.training.settings import DistillSettings
from tests.models.downscale.tiny_models import random_conversations, tiny_model

_SETTINGS = AdaptSettings(
    rows_per_step=4,
    row_tokens=32,
    compiled=False,
    precision="float32",
    device="cpu",
    distill=DistillSettings(weight=0.0),
    checkpoint_every_s=0.001,
)


def _train(model: PreTrainedModel, *, tokens: int = 1500, folder: Path | None = None, **changes):
    return adapt(
        model,
        random_conversations(30),
        random_conversations(30, seed=1),
        general_share=0.25,
        tokens=tokens,
        settings=_SETTINGS.model_copy(update=changes),
        seed=3,
        folder=folder,
    )


def _weights(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("share", [0.0, 0.15, 1.0])
def test_the_mixture_is_exact(share: float) -> None:
    """General data has its share of the tokens to within one conversation."""
    own = random_conversations(40)
    general = [
        Conversation(tokens=[95] * len(one.tokens), is_answer=one.is_answer)
        for one in random_conversations(7, seed=2)
    ]
    drawn = list(islice(mix(own, general, general_share=share, seed=0), 500))
    total = sum(len(one.tokens) for one in drawn)
    from_general = sum(len(one.tokens) for one in drawn if set(one.tokens) == {95})
    assert abs(from_general - share * total) <= 20


def test_a_corpus_is_seen_whole_before_it_is_repeated() -> None:
    """Each pass takes every conversation once, in another order."""
    own = random_conversations(12)
    drawn = [id(one) for one in islice(mix(own, [], general_share=0.0, seed=5), 24)]
    assert set(drawn[:12]) == set(drawn[12:]) == {id(one) for one in own}
    assert drawn[:12] != drawn[12:]


def test_it_learns_and_says_what_it_took() -> None:
    """The loss on what is trained on falls; tokens, steps, time and FLOPs are told."""
    model = tiny_model("llama")
    before = mean_loss(model, random_conversations(30), row_tokens=32)
    result = _train(model, tokens=4000)
    assert mean_loss(model, random_conversations(30), row_tokens=32) < before - 0.5
    assert result.num_steps == round(4000 / 128)
    assert 0.7 * 4000 < result.tokens <= 4000
    parameters = sum(p.numel() for p in model.parameters())
    assert result.flops == 6 * parameters * result.tokens
    assert result.losses[-1][0] == result.num_steps
    assert result.device == "cpu"
    assert result.cpu_s > 0


def test_a_finished_run_is_not_repeated_and_another_is_not_mistaken_for_it(tmp_path: Path) -> None:
    """The same run is restored from its folder; with another seed it starts afresh."""
    first, again, other = (tiny_model("qwen3") for _ in range(3))
    _train(first, folder=tmp_path)
    _train(again, folder=tmp_path)
    assert torch.equal(_weights(first), _weights(again))
    adapt(
        other,
        random_conversations(30),
        random_conversations(30, seed=1),
        general_share=0.25,
        tokens=1500,
        settings=_SETTINGS,
        seed=4,
        folder=tmp_path,
    )
    assert not torch.equal(_weights(first), _weights(other))


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    """A step in two parts ends where a step at once does."""
    whole, parts = tiny_model("llama"), tiny_model("llama")
    _train(whole, tokens=300, optimizer="adamw")
    _train(parts, tokens=300, optimizer="adamw", accumulate=2)
    torch.testing.assert_close(_weights(whole), _weights(parts), atol=2e-4, rtol=0)


def test_a_broken_loss_stops_the_run_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    """A model with a NaN in it is not trained; the message says what to try."""
    model = tiny_model("llama")
    with torch.no_grad():
        next(model.parameters())[:] = float("nan")
    with pytest.raises(DivergedError, match=r"loss is nan at step 0.*learning_rate below 0.003"):
        _train(model, folder=tmp_path)
    assert not (tmp_path / "last").exists()


@pytest.mark.parametrize("examples", [[], [Conversation(tokens=[1] * 40, is_answer=[True] * 40)]])
def test_a_corpus_that_does_not_fit_is_refused(examples: list[Conversation]) -> None:
    """No examples, or only ones longer than a row, are an error and not an endless loop."""
    with pytest.raises(CorpusError, match="the own corpus fits 32 tokens"):
        adapt(
            tiny_model("llama"),
            examples,
            [],
            general_share=0.0,
            tokens=100,
            settings=_SETTINGS,
            seed=0,
        )


def test_lessons_are_what_the_base_says(tmp_path: Path) -> None:
    """Its likeliest tokens at every position, once for conversations that occur twice."""
    base, examples = tiny_model("qwen2"), random_conversations(8)
    corpora = {"own": examples, "general": examples[:3]}
    scorer = Scorer(base, row_tokens=32)
    tokens = write_lessons(base, corpora, tmp_path, scorer=scorer, num_top=4)
    assert tokens == sum(len(one.tokens) for one in examples)
    taught = with_lessons(corpora, tmp_path)
    assert len(taught["general"]) == 3
    for one in (*taught["own"], *taught["general"]):
        assert one.teacher is not None
        with torch.no_grad():
            logits = base(input_ids=torch.tensor([one.tokens])).logits[0]
        top = logits.log_softmax(-1).topk(4)
        assert np.array_equal(one.teacher.ids, top.indices.numpy())
        found = one.teacher.log_probabilities.astype(np.float32)
        np.testing.assert_allclose(found, top.values.numpy(), atol=4e-3)


def test_distillation_brings_a_student_closer_to_its_teacher(tmp_path: Path) -> None:
    """Trained with the base's lessons alone, a student's answers move towards the base's."""
    base, student = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    examples = random_conversations(30)
    write_lessons(base, {"own": examples}, tmp_path, scorer=Scorer(base, row_tokens=32), num_top=96)
    own = with_lessons({"own": examples}, tmp_path)["own"]

    def divergence() -> float:
        ids = torch.tensor([examples[0].tokens])
        with torch.no_grad():
            teacher, ours = (m(input_ids=ids).logits.log_softmax(-1) for m in (base, student))
        return float((teacher.exp() * (teacher - ours)).sum(-1).mean())

    before = divergence()
    adapt(
        student,
        own,
        [],
        general_share=0.0,
        tokens=4000,
        settings=_SETTINGS.model_copy(update={"distill": DistillSettings(weight=1.0)}),
        seed=0,
    )
    assert divergence() < 0.6 * before
