"""Conversations drawn from a mixture of domains and packed into rows of fixed length.

Shapes: `B` rows, `T` tokens a row. A row holds whole conversations; each is a *segment* that
attends only to itself and starts at position 0, exactly as at inference. Most conversations have
one turn; some have several, or a system prompt.

Data is a function of (mixture, seed, shard index) alone, so training resumes at any step.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from models.tasks import DOMAINS, Split, Task
from models.training.tokenizer import ASSISTANT, END, SYSTEM, SYSTEM_PROMPTS, USER

_SHARE_MULTI_TURN: Final = 0.10
_SHARE_SYSTEM_PROMPT: Final = 0.08
_OPEN_ROWS: Final = 16
_STEPS_PER_SHARD: Final = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Token ids of one rendered conversation and which of them the assistant wrote."""

    tokens: list[int]
    is_answer: list[bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Packed rows, all `[B, T]`: `segments` is 0 on padding and counts conversations from 1."""

    tokens: NDArray[np.int64]
    segments: NDArray[np.int64]
    positions: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]


class Renderer:
    """Turns tasks into token ids exactly as the chat template does, but in batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Look up the control tokens once."""
        self._backend = tokenizer.backend_tokenizer
        self._id: Callable[[str], int] = partial(_token_id, tokenizer)

    def render(self, dialogues: Sequence[tuple[str | None, Sequence[Task]]]) -> list[Conversation]:
        """Render (system prompt or None, turns) pairs."""
        texts: list[str] = []
        for system, turns in dialogues:
            texts += [system] if system is not None else []
            for task in turns:
                texts += [task.question, task.answer]
        encoded = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        end = self._id(END)
        rendered = []
        for system, turns in dialogues:
            roles = ([SYSTEM] if system is not None else []) + [USER, ASSISTANT] * len(turns)
            tokens: list[int] = []
            is_answer: list[bool] = []
            for role in roles:
                body = [*next(encoded).ids, end]
                tokens += [self._id(role), *body]
                is_answer += [False] + [role == ASSISTANT] * len(body)
            rendered.append(Conversation(tokens=tokens, is_answer=is_answer))
        return rendered


def _token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    index = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(index, int)
    return index


def draw_dialogue(
    rng: random.Random, mixture: Mapping[str, float]
) -> tuple[str | None, list[Task]]:
    """One training dialogue: a domain by its share, one turn or a few, now and then a system."""
    name = rng.choices(list(mixture), list(mixture.values()))[0]
    num_turns = rng.randint(2, 3) if rng.random() < _SHARE_MULTI_TURN else 1
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < _SHARE_SYSTEM_PROMPT else None
    return system, [DOMAINS[name].sample(rng, Split.TRAIN) for _ in range(num_turns)]


def pack(
    conversations: Iterator[Conversation],
    *,
    num_rows: int,
    row_tokens: int,
    question_weight: float,
) -> Rows:
    """Fill `num_rows` rows first-fit with whole conversations.

    The loss weight is 1 on answers (their <|end|> included) and `question_weight` on the rest;
    the last token of a segment predicts nothing. Conversations longer than a row are left out.
    """
    done: list[list[Conversation]] = []
    open_rows: list[list[Conversation]] = []
    used: list[int] = []
    while len(done) < num_rows:
        conversation = next(conversations)
        need = len(conversation.tokens)
        if need > row_tokens:
            continue
        place = next((i for i, u in enumerate(used) if u + need <= row_tokens), None)
        if place is None:
            if len(open_rows) == _OPEN_ROWS:
                fullest = max(range(len(used)), key=used.__getitem__)
                done.append(open_rows.pop(fullest))
                used.pop(fullest)
            open_rows.append([])
            used.append(0)
            place = len(used) - 1
        open_rows[place].append(conversation)
        used[place] += need
    return _to_arrays(done, row_tokens=row_tokens, question_weight=question_weight)


def _to_arrays(
    rows: Sequence[Sequence[Conversation]], *, row_tokens: int, question_weight: float
) -> Rows:
    shape = (len(rows), row_tokens)
    tokens, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    positions, targets = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    weights = np.zeros(shape, np.float32)
    for r, row in enumerate(rows):
        start = 0
        for s, conversation in enumerate(row, 1):
            end = start + len(conversation.tokens)
            tokens[r, start:end] = conversation.tokens
            segments[r, start:end] = s
            positions[r, start:end] = np.arange(end - start)
            targets[r, start : end - 1] = conversation.tokens[1:]
            answer = np.asarray(conversation.is_answer[1:])
            weights[r, start : end - 1] = np.where(answer, 1.0, question_weight)
            start = end
    return Rows(
        tokens=tokens, segments=segments, positions=positions, targets=targets, weights=weights
    )


def steps(
    renderer: Renderer,
    mixture: Mapping[str, float],
    *,
    seed: int,
    first_step: int,
    rows_per_step: int,
    row_tokens: int,
    question_weight: float,
) -> Iterator[Rows]:
    """Endless training batches from step `first_step` on."""
    shard, skip = divmod(first_step, _STEPS_PER_SHARD)
    while True:
        rng = random.Random(f"{sorted(mixture.items())}/{seed}/{shard}")
        rows = pack(
            _conversations(renderer, rng, mixture),
            num_rows=_STEPS_PER_SHARD * rows_per_step,
            row_tokens=row_tokens,
            question_weight=question_weight,
        )
        for step in range(skip, _STEPS_PER_SHARD):
            part = slice(step * rows_per_step, (step + 1) * rows_per_step)
            yield Rows(
                tokens=rows.tokens[part],
                segments=rows.segments[part],
                positions=rows.positions[part],
                targets=rows.targets[part],
                weights=rows.weights[part],
            )
        shard, skip = shard + 1, 0


def _conversations(
    renderer: Renderer, rng: random.Random, mixture: Mapping[str, float]
) -> Iterator[Conversation]:
    while True:
        yield from renderer.render([draw_dialogue(rng, mixture) for _ in range(256)])
