"""What every model is asked of what is held out, to be measured.

A domain is asked its questions with one right answer, if it has some. Otherwise the question is how
a held-out text or conversation goes on, and what counts is how likely a model finds what stands
there, per byte: nats per byte are comparable over tokenizers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import zip_longest

from models.downscale.corpora import corpus
from models.downscale.corpus import Example
from models.downscale.examples import render, renderer
from models.downscale.stage import Run, remembered
from models.errors import CorpusError
from models.tasks.base import Split
from models.training.data import Conversation


@dataclass(frozen=True, kw_only=True)
class Question:
    """What every model is asked: a question with one right answer, or how something goes on.

    `text` is what is asked, or the opening as policies see it; `answer` the right answer, or what
    follows there. `conversation` are both as tokens, the latter marked. `by_loss` says that the
    answer is not compared, but its likelihood measured.
    """

    domain: str
    example: Example
    conversation: Conversation
    text: str
    answer: str
    by_loss: bool = False

    @property
    def prompt(self) -> str | tuple[int, ...]:
        """What `ask` takes."""
        tokens = self.conversation.tokens
        return (
            tuple(tokens[: self.conversation.is_answer.index(True)]) if self.by_loss else self.text
        )

    @property
    def is_test(self) -> bool:
        """Whether figures are reported on it; the others are for routers to learn from."""
        return self.example.split is Split.TEST


@remembered
def questions(run: Run) -> list[Question]:
    """The held-out questions that every model is asked: for routers first, then for the test, by
    domain. Those that do not fit a row are left out, as everywhere.

    A domain that has no questions with a right answer in both splits is asked how its texts and
    conversations go on.

    Raises:
        CorpusError: a domain holds out nothing that can be measured.
    """
    limits = {
        Split.ROUTER: run.recipe.measure.router_questions,
        Split.TEST: run.recipe.measure.test_questions,
    }
    row_tokens = run.recipe.adapt.row_tokens
    found: dict[tuple[Split, str], list[Question]] = {}
    for domain in run.domains:
        checked = {split: _with_answers(run, domain, split) for split in limits}
        by_loss = not all(checked.values())
        for split, limit in limits.items():
            every = _to_go_on(run, domain, split) if by_loss else checked[split]
            if not every:
                raise CorpusError(
                    f"{domain}: nothing of the held-out split {split!s} can be measured (that fits "
                    f"adapt.row_tokens, {row_tokens}); give longer texts, or records with "
                    "'question' and 'answer'"
                )
            found[split, domain] = every[:limit]
            what = "pieces of texts, by their loss" if by_loss else "questions, by their answers"
            run.report(f"{domain}: {min(limit, len(every)):,} of {len(every):,} {split} {what}")
    return [one for split in limits for domain in run.domains for one in found[split, domain]]


def _with_answers(run: Run, domain: str, split: Split) -> list[Question]:
    """The questions with a right answer that fit a row."""
    examples = corpus(run, domain).questions(split)
    return [
        Question(
            domain=domain,
            example=example,
            conversation=conversation,
            text=example.question or "",
            answer=example.answer or "",
        )
        for example, conversation in zip(examples, render(run, examples), strict=True)
        if len(conversation.tokens) <= run.recipe.adapt.row_tokens and any(conversation.is_answer)
    ]


def _to_go_on(run: Run, domain: str, split: Split) -> list[Question]:
    """How the domain's texts and conversations go on: first one piece of each, then another."""
    by_example = [_pieces(run, domain, example) for example in corpus(run, domain).of(split)]
    turns = zip_longest(*by_example)
    return [piece for together in turns for piece in together if piece is not None]


def _pieces(run: Run, domain: str, example: Example) -> list[Question]:
    """A text's pieces, each to be gone on with from its middle; of a conversation the first answer,
    where it fits a row."""
    row_tokens = run.recipe.adapt.row_tokens
    if example.text is not None:
        return [
            Question(
                domain=domain,
                example=example,
                conversation=half.conversation,
                text=half.opening,
                answer=half.goes_on,
                by_loss=True,
            )
            for half in renderer(run).halves(example.text, max_tokens=row_tokens)
        ]
    first = next(i for i, turn in enumerate(example.turns) if turn.role == "assistant")
    [conversation, *_] = render(run, [replace(example, turns=example.turns[: first + 1])])
    before = [turn.content for turn in example.turns[:first] if turn.role == "user"]
    if len(conversation.tokens) > row_tokens or conversation.is_answer[0] or not before:
        return []
    return [
        Question(
            domain=domain,
            example=example,
            conversation=conversation,
            text=before[-1],
            answer=example.turns[first].content,
            by_loss=True,
        )
    ]
