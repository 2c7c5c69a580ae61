"""The held-out questions that every model of a run is asked, in one fixed order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models.downscale.corpus import Example
from models.downscale.errors import CorpusError
from models.downscale.run import Run
from models.tasks import Split
from models.training.data import Conversation


@dataclass(frozen=True, kw_only=True)
class Question:
    """A checkable example with its domain and its token ids, right answer included."""

    domain: str
    example: Example
    conversation: Conversation

    @property
    def text(self) -> str:
        """What is asked."""
        assert self.example.question is not None
        return self.example.question

    @property
    def answer(self) -> str:
        """The one right answer."""
        assert self.example.answer is not None
        return self.example.answer

    @property
    def is_test(self) -> bool:
        """Whether figures are reported on it; the others are for routers to learn from."""
        return self.example.split is Split.TEST


def questions(run: Run) -> list[Question]:
    """All questions: for routers first, then for the test, by domain.

    Raises:
        CorpusError: no domain has questions that can be checked.
    """
    limits = {
        Split.ROUTER: run.recipe.measure.router_questions,
        Split.TEST: run.recipe.measure.test_questions,
    }
    found = []
    for split, limit in limits.items():
        for domain in run.domains:
            examples = run.corpus(domain).questions(split)[:limit]
            for example, conversation in zip(examples, run.render(domain, examples), strict=True):
                if example.answer is not None and any(conversation.is_answer):
                    found.append(
                        Question(domain=domain, example=example, conversation=conversation)
                    )
    for split in limits:
        if not any(question.example.split is split for question in found):
            raise CorpusError(
                f"no domain has a held-out question of the split {split!s} that can be checked; "
                "give records with 'question' and 'answer'"
            )
    return found


def texts(asked: Sequence[Question]) -> list[str]:
    """What is asked, in order."""
    return [question.text for question in asked]
