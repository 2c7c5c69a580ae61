"""What a task domain is: exactly checkable questions, split by instance.

A domain is a set of weighted skills. A skill draws one question together with the *instance* it
asks about (its operands, word or list, never its wording). A hash of the instance alone decides
the split, so a held-out instance is unseen under every template and every skill that shares it.

This module does not know any domain, tokenizer or model.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

_MAX_DRAWS = 10_000
_SHARE_LOWER_CASE = 0.12
_SHARE_NO_FULL_STOP = 0.10


class Split(StrEnum):
    """Which part of the instances: 80% train, 10% router, 10% test."""

    TRAIN = "train"
    ROUTER = "router"
    TEST = "test"


Instance = tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A drawn question before its split is known.

    `instance` None marks a primitive fact (for example a times-table entry): it is always in
    `train`, because nothing follows it from other facts and holding it out would test luck.
    """

    instance: Instance | None
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One question with its one right answer."""

    question: str
    answer: str
    domain: str
    split: Split
    skill: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Skill:
    """One kind of question; `weight` is its share of the domain relative to the other skills."""

    name: str
    weight: float
    draw: Callable[[random.Random], Draft]
    held_out: bool = True


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A named set of skills."""

    name: str
    skills: tuple[Skill, ...]

    def sample(self, rng: random.Random, split: Split) -> Task:
        """Draw one task of `split`.

        Raises:
            RuntimeError: a skill has no instance in this split (a defect of the skill).
        """
        skills = [s for s in self.skills if s.held_out or split is Split.TRAIN]
        skill = rng.choices(skills, [s.weight for s in skills])[0]
        for _ in range(_MAX_DRAWS):
            draft = skill.draw(rng)
            if split_of(draft.instance) is split:
                return Task(
                    question=_as_typed(draft.question, rng),
                    answer=draft.answer,
                    domain=self.name,
                    split=split,
                    skill=skill.name,
                )
        raise RuntimeError(f"skill {self.name}/{skill.name} has no instance in split {split}")

    def stream(self, split: Split, *, seed: int) -> Iterator[Task]:
        """Endless tasks of `split`, the same for the same seed."""
        rng = random.Random(f"{self.name}/{split}/{seed}")
        while True:
            yield self.sample(rng, split)

    def distinct(self, split: Split, count: int, *, seed: int) -> list[Task]:
        """`count` tasks with distinct questions, the same for the same seed."""
        found: dict[str, Task] = {}
        for task in self.stream(split, seed=seed):
            if len(found) == count:
                break
            found.setdefault(task.question, task)
        return list(found.values())


def split_of(instance: Instance | None) -> Split:
    """The split of an instance: a stable hash, the same on every machine and in every run."""
    if instance is None:
        return Split.TRAIN
    digest = hashlib.blake2b(repr(instance).encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % 10
    if bucket < 8:
        return Split.TRAIN
    return Split.ROUTER if bucket == 8 else Split.TEST


def normalise(text: str) -> str:
    """Strip surrounding white space and one trailing full stop; nothing else is forgiven."""
    return text.strip().removesuffix(".").rstrip()


def check(answer: str, output: str) -> bool:
    """Whether a model's output is the gold answer after `normalise`."""
    return normalise(output) == normalise(answer)


def _as_typed(question: str, rng: random.Random) -> str:
    """Now and then drop the capital or the closing mark, as people do in a chat box."""
    draw = rng.random()
    if draw < _SHARE_LOWER_CASE and question[:2].isalpha():
        question = question[0].lower() + question[1:]
    if draw > 1 - _SHARE_NO_FULL_STOP and question[-1] in "?.":
        question = question[:-1].rstrip()
    return question
