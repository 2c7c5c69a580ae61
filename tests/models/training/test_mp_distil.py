"""MPDistil: its losses are the paper's, its parts learn what they are for, it can be resumed."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from models.downscale.adapt import adapt
from models.downscale.recipe import AdaptSettings
from models.errors import CorpusError
from models.training.data import lay_out
from models.training.forward import geometry, low_precision, rotary_tables, to_tensors
from models.training.loop import Trainer
from models.training.mp_distil import MPDistil, Running
from models.training.mp_parts import meta_loss, outdoing_loss, taught_loss
from models.training.settings import DistillSettings, MetaDistillSettings
from tests.models.downscale.tiny_models import random_conversations, tiny_model

QUIZZES = {name: random_conversations(8, seed=seed) for seed, name in enumerate("ab", start=5)}
META = MetaDistillSettings(
    hidden_weight=10.0, learning_rate=0.01, every_steps=2, curriculum_share=0.5, episode_steps=3
)
DISTILL = DistillSettings(weight=0.5, temperature=2.0, meta=META)


def student():
    """Half as deep and wide as the teacher, of as many tokens."""
    model = tiny_model("llama", seed=3)
    config = model.config
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads = 32, 2, 4
    config.num_key_value_heads = 2
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return type(model)(config).eval()


def method(num_steps=20, **changes):
    """MPDistil of a student of domain a by a teacher of four layers."""
    running = Running(
        num_steps=num_steps, rows_per_step=4, row_tokens=32, device="cpu", dtype=torch.float32,
        compiled=False, seed=1,
    )  # fmt: skip
    meta = META.model_copy(update=changes)
    settings = DISTILL.model_copy(update={"meta": meta})
    return MPDistil(
        student(), tiny_model("llama"), "a", QUIZZES, settings=settings, running=running
    )


def train(model, chosen, *, num_steps=20, folder: Path | None = None):
    """Train for so many steps, at a constant rate."""
    settings = AdaptSettings.model_validate({
        "rows_per_step": 4, "row_tokens": 32, "compiled": False, "precision": "float32",
        "device": "cpu", "warmup_share": 0, "decay_share": 0, "checkpoint_every_s": 1e-6,
    })  # fmt: skip
    return adapt(
        model, random_conversations(40, seed=2), (), general_share=0.0,
        tokens=num_steps * 4 * 32, settings=settings, seed=1, folder=folder,
        method=lambda _: chosen,
    )  # fmt: skip


def test_the_meta_teachers_losses_are_the_papers():
    """Collaborative: the mean of both cross entropies; competitive: the teacher's, less its mean
    probability of what is right, plus that of the student's states."""
    generator = torch.Generator().manual_seed(0)
    head, told, heard = (
        torch.randn(shape, generator=generator) for shape in ((9, 4), (6, 4), (6, 4))
    )
    targets, shares = torch.tensor([0, 1, 2, 3, 4, 5]), torch.full((6,), 1 / 6)
    theirs, ours = (functional.cross_entropy(states @ head.T, targets) for states in (told, heard))
    right, wrong = (
        (states @ head.T).softmax(-1)[range(6), targets].mean() for states in (told, heard)
    )
    collaborative = meta_loss(head, told, heard, targets, shares, competitive=False)
    competitive = meta_loss(head, told, heard, targets, shares, competitive=True)
    assert collaborative.item() == pytest.approx((0.5 * theirs + 0.5 * ours).item(), rel=1e-5)
    assert competitive.item() == pytest.approx((theirs - right + wrong).item(), rel=1e-5)


def test_the_students_losses_are_the_papers():
    """Distilled: labels, squared distance of the softened distributions, and of the matched hidden
    states at length 1; in the curriculum the cross entropy less the probability of what is right.
    Against transformers' own forward passes."""
    pupil, teacher = student(), tiny_model("llama")
    [conversation] = random_conversations(1, seed=4)
    length = len(conversation.tokens)
    tokens = to_tensors(lay_out([[conversation]], row_tokens=length, question_weight=1.0))
    cos, sin = rotary_tables(pupil, length)
    arguments = {
        **tokens, "total_weight": tokens["loss_weights_BT"].sum(), "cos": cos, "sin": sin,
        "geometry": geometry(pupil),
    }  # fmt: skip
    bridge = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (
            one(tokens["tokens_BT"], output_hidden_states=True) for one in (pupil, teacher)
        )
        found, label = taught_loss(
            low_precision(pupil, torch.float32), **arguments,
            states=[*theirs.hidden_states[1:], theirs.hidden_states[-1]],
            head_VD=teacher.lm_head.weight, bridge_DS=bridge, pairs=((0, 1), (2, 4)),
            weight=0.3, temperature=2.0, hidden_weight=7.0,
        )  # fmt: skip
        alone, same = outdoing_loss(low_precision(pupil, torch.float32), **arguments)
    targets = torch.tensor(conversation.tokens[1:])
    logs = ours.logits[0, :-1].log_softmax(-1)[range(length - 1), targets]
    distance = (ours.logits[0, :-1] / 2).softmax(-1) - (theirs.logits[0, :-1] / 2).softmax(-1)
    hidden = [
        (
            functional.normalize(ours.hidden_states[s][0, :-1] @ bridge.T, dim=-1)
            - functional.normalize(theirs.hidden_states[t][0, :-1], dim=-1)
        ).pow(2).mean()
        for s, t in ((1, 2), (2, 4))
    ]  # fmt: skip
    soft = 4 * distance.pow(2).sum(-1).mean()
    expected = -0.7 * logs.mean() + 0.3 * soft + 7 * (hidden[0] + hidden[1]) / 2
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert alone.item() == pytest.approx((-logs - logs.exp()).mean().item(), rel=1e-4)
    assert label.item() == same.item() == pytest.approx(-logs.mean().item(), rel=1e-4)


@pytest.mark.parametrize("loss", ["collaborative", "competitive"])
def test_the_meta_teacher_learns_the_quiz(loss):
    """Its head, on the teacher's states, comes to know the quiz's answers; the teacher stays."""
    chosen = method(num_steps=200, loss=loss, curriculum_share=0.0, every_steps=1)
    head, pupil = chosen.state()["parts/head.weight"].clone(), student()
    train(pupil, chosen, num_steps=200)
    teacher, losses = tiny_model("llama"), []
    for matrix in (head, chosen.state()["parts/head.weight"]):
        with torch.no_grad():
            losses.append(sum(
                functional.cross_entropy(
                    (teacher.model(torch.tensor([one.tokens])).last_hidden_state @ matrix.T)
                    [0, :-1][one.is_answer[1:]],
                    torch.tensor(one.tokens)[1:][one.is_answer[1:]],
                ).item()
                for one in QUIZZES["a"]
            ))  # fmt: skip
    assert losses[1] < 0.7 * losses[0]


def test_a_student_becomes_like_its_teacher():
    """Taught by states and probabilities alone, its bridged last states point where the teacher's
    do, and its loss on the labels is not what fell."""
    chosen = method(num_steps=150, weight=1.0, curriculum_share=0.0, every_steps=10**6)
    pupil, teacher = student(), tiny_model("llama")

    def likeness():
        bridge, total = chosen.state()["parts/bridge.weight"], 0.0
        for one in random_conversations(40, seed=2):
            tokens = torch.tensor([one.tokens])
            with torch.no_grad():
                ours = pupil.model(tokens).last_hidden_state @ bridge.T
                theirs = teacher.model(tokens).last_hidden_state
                total += functional.cosine_similarity(ours, theirs, dim=-1).mean().item() / 40
        return total

    before = likeness()
    train(pupil, chosen, num_steps=150)
    assert likeness() > before + 0.3


@pytest.mark.parametrize("reward", ["real", "binary"])
def test_the_curriculum_chooses_and_is_rewarded(reward):
    """One choice for each of its steps, from all domains, the same of one seed; the rewards are
    shares of tokens, or differences of probabilities; the policy learns from each episode."""
    chosen = method(num_steps=24, reward=reward)
    before = chosen.state()["parts/policy.weight"].clone()
    train(student(), chosen, num_steps=24)
    assert len(chosen.choices) == 12
    assert set(chosen.choices) == {"a", "b"}
    assert len(chosen.rewards) == 11
    assert all((0 if reward == "binary" else -1) <= one <= 1 for one in chosen.rewards)
    assert len(set(chosen.rewards)) > 1
    assert not torch.equal(chosen.state()["parts/policy.weight"], before)
    again = method(num_steps=24, reward=reward)
    train(student(), again, num_steps=24)
    assert (again.choices, again.rewards) == (chosen.choices, chosen.rewards)


@pytest.mark.parametrize("stop_at", [5, 14])
def test_it_goes_on_where_it_stopped(stop_at, tmp_path, monkeypatch):
    """Interrupted in the distillation, or within an episode of the curriculum, and resumed by a
    new object, it ends with the same weights, choices and rewards as if it had been left alone."""
    alone, left = student(), method()
    train(alone, left)
    step = Trainer.step

    def failing(self, rows, share, number):
        if number == stop_at:
            raise KeyboardInterrupt
        return step(self, rows, share, number)

    monkeypatch.setattr(Trainer, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        train(student(), method(), folder=tmp_path)
    monkeypatch.setattr(Trainer, "step", step)
    resumed, chosen = student(), method()
    train(resumed, chosen, folder=tmp_path)
    assert (chosen.choices, chosen.rewards) == (left.choices, left.rewards)
    for name, tensor in left.state().items():
        assert torch.equal(chosen.state()[name], tensor), name
    for ours, theirs in zip(resumed.parameters(), alone.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_quiz_that_fits_no_row_is_named():
    """Rather than a choice of nothing."""
    running = Running(
        num_steps=4, rows_per_step=4, row_tokens=2, device="cpu", dtype=torch.float32,
        compiled=False, seed=1,
    )  # fmt: skip
    with pytest.raises(CorpusError, match="the quiz of a fits 2 tokens"):
        MPDistil(student(), tiny_model("llama"), "a", QUIZZES, settings=DISTILL, running=running)
