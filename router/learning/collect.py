"""Every model's answer to every question, graded: outcomes that routers and cascades learn from.

Answers and grades go into a journal beside the outcomes as they come, so that a run that was
interrupted goes on where it stopped. Nothing that is wrong with one question ends the run: it is
named and counted.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from policies.errors import OutcomesError
from policies.grading.base import Graded, Panel, Question, Sheet
from policies.kinds import Strict, explain
from policies.outcomes import AnswerLogprobs, Outcome
from router.learning.asking import Asker, AskError, Reply


class Line(Strict):
    """One line of a file of questions: a `query` or a conversation's `messages`, and what is known.

    `reference` is one right answer or several; what is no text stands for its JSON, 42 for "42".
    `choices` and `tests` are for graders, and are not
    shown to the models; a question that offers choices says them in its text.
    """

    query: str | None = None
    messages: tuple[dict[str, Any], ...] | None = Field(None, min_length=1)
    id: str = ""
    reference: str | tuple[str, ...] | None = None
    choices: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    split: str | None = None
    tests: str | None = None
    answer_schema: dict[str, Any] | None = Field(None, alias="schema")
    tools: tuple[dict[str, Any], ...] = ()

    @field_validator("reference", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return [_text(one) for one in value] if isinstance(value, list) else _text(value)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.query is None) == (self.messages is None):
            raise ValueError("give either query or messages")
        if not self.text.strip():
            raise ValueError("nothing is asked")
        return self

    @property
    def conversation(self) -> tuple[Mapping[str, Any], ...]:
        """What the models are sent."""
        return self.messages or ({"role": "user", "content": self.query},)

    @property
    def text(self) -> str:
        """What policies read of it: the last thing that the user said."""
        if self.query is not None:
            return self.query
        said = [m.get("content") for m in self.messages or () if m.get("role") == "user"]
        parts = said[-1] if said and isinstance(said[-1], list) else said[-1:]
        texts = (p.get("text") if isinstance(p, dict) else p for p in parts)
        return "\n".join(text for text in texts if isinstance(text, str))

    @property
    def question(self) -> Question:
        """What graders see."""
        right = (self.reference,) if isinstance(self.reference, str) else self.reference
        return Question(
            query=self.text,
            references=right or (),
            choices=self.choices,
            tests=self.tests,
            schema=self.answer_schema,
        )


def _text(value: object) -> object:
    return value if value is None or isinstance(value, str) else json.dumps(value)


@dataclass(kw_only=True)
class Problems:
    """What went wrong, by kind, with the first few examples of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    most_examples: int = 20

    def add(self, kind: str, text: str) -> None:
        """Count one."""
        self.counts[kind] += 1
        if len(self.examples) < self.most_examples and text not in self.examples:
            self.examples.append(text)


def read_lines(path: Path, problems: Problems) -> list[Line]:
    """Return the questions of a JSON Lines file; bad lines are added to `problems`.

    Raises `OutcomesError` for a file that cannot be read or holds no question, and says why.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OutcomesError(f"{path} cannot be read: {error.strerror}") from None
    lines = []
    for number, written in enumerate(content.split(b"\n"), start=1):
        try:
            text = written.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            problems.add("bad lines", f"{path}, line {number}: it is not UTF-8 text: {error}")
            continue
        if not text.strip():
            continue
        try:
            line = Line.model_validate_json(text)
        except ValidationError as error:
            told = explain(error, whole="the line")
            problems.add("bad lines", f"{path}, line {number}: {told}")
            continue
        lines.append(line if line.id else line.model_copy(update={"id": str(number)}))
    if not lines:
        bad = [f": {text}" for text in problems.examples[:1]]
        raise OutcomesError(f"{path}: the file holds no question that can be asked{''.join(bad)}")
    return lines


class Journal:
    """Facts by key in a file that only grows; a line that a crash cut short is forgotten."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Any] = dict(self._read())

    def __enter__(self) -> Self:
        self._file = self._path.open("ab", buffering=0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._file.close()

    def get(self, key: str) -> Any:  # noqa: ANN401 - whatever was put there
        """Return what is known by `key`; None where nothing is."""
        return self._known.get(key)

    def put(self, key: str, value: object) -> None:
        """Keep `value`, which JSON can hold. Raises `OutcomesError` where the disk is full."""
        self._known[key] = value
        # A line of its own even after one that was cut short.
        line = f"\n{json.dumps([key, value])}".encode()
        try:  # at once, so that two runs do not write into one another's lines
            whole = self._file.write(line) == len(line)
        except OSError as error:
            raise OutcomesError(f"{self._path} cannot be written: {error.strerror}") from None
        if not whole:
            raise OutcomesError(f"{self._path} cannot be written: there is no more room")

    def _read(self) -> Iterator[tuple[str, Any]]:
        if not self._path.exists():
            return
        with self._path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    key, value = json.loads(line)
                except (ValueError, TypeError):
                    continue
                yield str(key), value


def journal_of(out: Path) -> Path:
    """Return where the journal of a file of outcomes is."""
    return out.with_name(out.name + ".journal")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn: `num_samples` a question, greedily where it is one."""

    max_tokens: int = 512
    num_samples: int = 1
    temperature: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Collector:
    """Asks models, has their answers graded, and notes both in a journal.

    `problems` counts what went wrong. At most `num_at_once` questions are open at a time.
    """

    asker: Asker
    panel: Panel
    journal: Journal
    problems: Problems
    sampling: Sampling = field(default_factory=Sampling)
    num_at_once: int = 16

    async def collect(
        self,
        lines: Sequence[Line],
        models: Sequence[str],
        *,
        progress: Callable[[int], object] = lambda _: None,
    ) -> list[Outcome]:
        """Ask `models` all questions and grade their answers; `progress` is told of every outcome.

        Each sample is an outcome of its own. An outcome lacks the models that gave no answer; a
        question that no grader can grade gives none. Raises `OutcomesError` where the journal
        cannot be written.
        """
        jobs = [(line, sample) for line in lines for sample in range(self.sampling.num_samples)]
        found: list[Outcome | None] = [None] * len(jobs)
        waiting = iter(enumerate(jobs))

        async def work() -> None:
            for index, (line, sample) in waiting:
                found[index] = await self._outcome(line, sample, models)
                progress(1)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.num_at_once):
                    group.create_task(work())
        except ExceptionGroup as failed:  # what one of them met, all may have
            raise failed.exceptions[0] from None
        return [outcome for outcome in found if outcome is not None]

    async def _outcome(self, line: Line, sample: int, models: Sequence[str]) -> Outcome | None:
        replies = await asyncio.gather(*(self._ask(line, sample, name) for name in models))
        given = {n: reply for n, reply in zip(models, replies, strict=True) if reply is not None}
        if not given:
            return None
        sheet = await self._grade(line, {name: reply.text for name, reply in given.items()})
        if not sheet.scores:
            self.problems.add("not graded at all", f"question {line.id}: no grader gave a score")
            return None
        name = line.id if self.sampling.num_samples == 1 else f"{line.id}/{sample}"
        try:
            return _outcome(name, line, given, sheet)
        except ValidationError as error:  # a server's negative cost, say
            self.problems.add("not usable", f"question {line.id}: {explain(error)}")
            return None

    async def _ask(self, line: Line, sample: int, model: str) -> Reply | None:
        drawn = self.sampling
        key = _key("answer", *self.asker.place(model), model, line.conversation, line.tools, sample,
                   drawn.max_tokens, drawn.temperature)  # fmt: skip
        known = self.journal.get(key)
        if known is not None:
            logprobs = known["logprobs"] and AnswerLogprobs(**known["logprobs"])
            return Reply(**{**known, "logprobs": logprobs})
        try:
            reply = await self.asker.ask(
                model,
                line.conversation,
                max_tokens=drawn.max_tokens,
                temperature=drawn.temperature,
                seed=sample if drawn.temperature else None,
                tools=line.tools,
            )
        except AskError as error:
            self.problems.add(f"no answer of {model}", f"question {line.id}: {error}")
            return None
        self.journal.put(key, asdict(reply))
        return reply

    async def _grade(self, line: Line, answers: Mapping[str, str]) -> Sheet:
        asked = asdict(line.question)
        keys = {
            name: _key("grades", name, basis, asked, answers)
            for name, basis in self.panel.bases.items()
        }
        before = {name: self.journal.get(key) for name, key in keys.items()}
        known = {name: Graded(**told) for name, told in before.items() if told is not None}
        sheet = await self.panel.grade(line.question, answers, known)
        for spec, why in sheet.problems.items():
            self.problems.add(f"not graded by {spec}", f"question {line.id}: {spec}: {why}")
        for name, graded in known.items():
            if before[name] is None:
                self.journal.put(keys[name], asdict(graded))
        return sheet


def _outcome(name: str, line: Line, replies: Mapping[str, Reply], sheet: Sheet) -> Outcome:
    prompts = [reply.prompt_tokens for reply in replies.values() if reply.prompt_tokens is not None]
    right = line.question.references

    def known(name: str) -> dict[str, Any]:
        values = {model: getattr(reply, name) for model, reply in replies.items()}
        return {model: value for model, value in values.items() if value is not None}

    return Outcome(
        id=name,
        query=line.text,
        tags=line.tags,
        split=line.split,
        answer=right[0] if right else None,
        scores=dict(sheet.scores),
        outputs=known("text"),
        logprobs=known("logprobs"),
        prompt_tokens=min(prompts, default=None),
        output_tokens=known("output_tokens"),
        costs=known("usd"),
        format=2,
        energies=known("wh"),
        latencies=known("latency_s"),
        grades={spec: dict(grades) for spec, grades in sheet.grades.items()},
    )


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
