"""Choosing which examples are worth training on."""

import numpy as np
import pytest
import torch

from models.downscale.data import keep_by, select, select_at_random, uncertainty
from models.training.data import Conversation
from tests.models.downscale.tiny_models import random_conversations, tiny_model


def members(*seeds):
    """Tiny models that differ."""
    return [tiny_model("llama", seed=seed) for seed in seeds]


def log_probabilities(model, conversation):
    """Of every next token, at the positions that predict the answer."""
    tokens = torch.tensor([conversation.tokens])
    with torch.inference_mode():
        logs = model(input_ids=tokens).logits[0].log_softmax(-1).double()
    judged = [i - 1 for i, written in enumerate(conversation.is_answer) if written and i]
    return logs[judged], tokens[0, [i + 1 for i in judged]]


def test_bald_is_the_mutual_information_of_answer_and_member():
    """The score is H(mean p) - mean H(p) over answer tokens, here computed one by one."""
    ensemble, conversations = members(1, 2, 3), random_conversations(5)
    scores = uncertainty(ensemble, conversations, by="bald")
    for conversation, score in zip(conversations, scores, strict=True):
        p = torch.stack([log_probabilities(m, conversation)[0] for m in ensemble]).exp()
        mean = p.mean(0)
        entropy = -(mean * mean.log()).sum(-1) + (p * p.log()).sum(-1).mean(0)
        assert score == pytest.approx(entropy.mean().item(), abs=1e-5)


def test_disagreement_is_the_spread_about_the_right_token():
    """The score is the members' standard deviation of the answer's log-probability."""
    ensemble, conversations = members(1, 2), random_conversations(5)
    scores = uncertainty(ensemble, conversations, by="disagreement")
    for conversation, score in zip(conversations, scores, strict=True):
        found = []
        for model in ensemble:
            logs, targets = log_probabilities(model, conversation)
            found.append(logs.gather(-1, targets[:, None])[:, 0])
        assert score == pytest.approx(
            torch.stack(found).std(0, correction=0).mean().item(), abs=1e-5
        )


def test_members_that_agree_are_sure():
    """The same member twice has no disagreement, and so no uncertainty of this kind."""
    ensemble = members(1, 1)
    for by in ("bald", "disagreement"):
        np.testing.assert_allclose(
            uncertainty(ensemble, random_conversations(4), by=by), 0, atol=1e-5
        )


def test_conversations_without_an_answer_score_nothing():
    """There is nothing to be unsure of."""
    mute = Conversation(tokens=[1, 2, 3], is_answer=[False] * 3)
    assert uncertainty(members(1, 2), [mute], by="bald").tolist() == [0]


def test_hard_and_easy_are_the_two_ends():
    """Hard keeps the highest scores, easy the lowest, in the corpus's order."""
    scores = np.array([0.3, 0.9, 0.1, 0.5])
    assert keep_by(scores, 0.5, "hard") == (1, 3)
    assert keep_by(scores, 0.5, "easy") == (0, 2)
    assert keep_by(scores, 0.01, "hard") == (1,)


@pytest.mark.parametrize("better", ["hard", "easy"])
def test_the_switch_goes_by_the_trials(better):
    """With "auto" both ends are tried, and the one with the lower held-out loss is kept."""
    ensemble, conversations = members(1, 2), random_conversations(8)
    scores = uncertainty(ensemble, conversations, by="bald")
    ends = {name: keep_by(scores, 0.5, name) for name in ("hard", "easy")}
    selection = select(
        ensemble,
        conversations,
        keep=0.5,
        by="bald",
        switch="auto",
        trial=lambda kept: 1.0 if tuple(kept) == ends[better] else 2.0,
    )
    assert selection.switch == better
    assert selection.kept == ends[better]
    assert selection.trials[better] == 1.0


def test_a_given_switch_needs_no_trials():
    """No training is spent where the recipe decides."""

    def never(kept):
        raise AssertionError("no trial was asked for")

    selection = select(
        members(1, 2), random_conversations(8), keep=0.25, by="bald", switch="hard", trial=never
    )
    assert len(selection.kept) == 2
    assert selection.trials == {}


def test_random_choice_is_of_the_same_size_and_by_seed():
    """The comparison keeps as many, the same ones for the same seed."""
    one, two, other = (select_at_random(100, keep=0.3, seed=seed) for seed in (1, 1, 2))
    assert len(one.kept) == 30
    assert one == two
    assert one.kept != other.kept
