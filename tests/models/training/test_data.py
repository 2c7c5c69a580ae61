"""Rendering and packing: what the model is trained on, and where its loss counts."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerFast

from models.downscale.base import TaskTraining, batches
from models.downscale.corpus import draw_example
from models.downscale.render import Renderer
from models.tasks import DOMAINS
from models.training.data import Conversation, pack

_EVEN = dict.fromkeys(DOMAINS, 1.0)
_TRAINING = TaskTraining(
    mixture=_EVEN, num_steps=40, num_decay_steps=0, rows_per_step=2, row_tokens=96
)


def test_training_text_is_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    """The fast renderer gives the tokens that the template gives, turn by turn."""
    rng = random.Random(0)
    examples = [draw_example(rng, _EVEN) for _ in range(100)]
    assert {sum(turn.role == "user" for turn in one.turns) for one in examples} >= {1, 2}
    assert any(one.turns[0].role == "system" for one in examples)
    for one, conversation in zip(examples, Renderer(tokenizer).render(examples), strict=True):
        messages = [{"role": turn.role, "content": turn.content} for turn in one.turns]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert isinstance(text, str)
        assert conversation.tokens == tokenizer.encode(text, add_special_tokens=False)


def test_answers_are_what_the_assistant_wrote(tokenizer: PreTrainedTokenizerFast) -> None:
    """The answer mask covers each answer and its end token, and nothing else."""
    example = draw_example(random.Random(0), {"arithmetic": 1.0})
    [conversation] = Renderer(tokenizer).render([example])
    pairs = zip(conversation.tokens, conversation.is_answer, strict=True)
    written = tokenizer.decode([token for token, own in pairs if own])
    answers = [turn.content for turn in example.turns if turn.role == "assistant"]
    assert written == "".join(f"{answer}<|end|>" for answer in answers)


def _conversations(*lengths: int) -> Iterator[Conversation]:
    for n, length in enumerate(lengths, 1):
        tokens = [100 * n + i for i in range(length)]
        half = length // 2
        yield Conversation(tokens=tokens, is_answer=[False] * half + [True] * (length - half))


def test_packing_keeps_conversations_whole_and_apart() -> None:
    """Each segment is one conversation from position 0, its targets never reach the next."""
    stream = _conversations(*(4, 6, 5, 3, 9, 2, 30, 4) * 20)
    rows = pack(stream, num_rows=3, row_tokens=12, question_weight=0.25)
    assert rows.tokens.shape == (3, 12)
    for r in range(3):
        for s in range(1, rows.segments[r].max() + 1):
            (where,) = np.nonzero(rows.segments[r] == s)
            tokens = rows.tokens[r, where]
            assert list(np.diff(where)) == [1] * (len(where) - 1)
            assert list(tokens) == [tokens[0] + i for i in range(len(tokens))]
            assert list(rows.positions[r, where]) == list(range(len(where)))
            assert list(rows.targets[r, where][:-1]) == list(tokens[1:])
            half = len(tokens) // 2
            wanted = [0.25] * (half - 1) + [1.0] * (len(tokens) - half) + [0.0]
            assert list(rows.weights[r, where]) == wanted
        assert not rows.weights[r][rows.segments[r] == 0].any()


def test_packing_wastes_little(tokenizer: PreTrainedTokenizerFast) -> None:
    """Real rows are at least 95% full."""
    training = replace(_TRAINING, rows_per_step=4, row_tokens=128)
    batch = next(batches(tokenizer, training, first_step=0))
    assert (batch.segments > 0).mean() > 0.95


def test_batches_do_not_depend_on_where_a_run_starts(tokenizer: PreTrainedTokenizerFast) -> None:
    """Step n has the same batch in a run from the start and in one resumed at n."""

    def tokens_from(first_step: int, count: int) -> list[np.ndarray]:
        stream = batches(tokenizer, replace(_TRAINING, seed=7), first_step=first_step)
        return [rows.tokens for rows in islice(stream, count)]

    whole = tokens_from(0, 36)
    for step, tokens in zip((31, 32, 33), tokens_from(31, 3), strict=True):
        assert np.array_equal(whole[step], tokens)
    assert not np.array_equal(whole[0], whole[32])
