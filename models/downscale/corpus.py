"""A domain's corpus: examples to train on and held-out ones, from files or a built-in generator.

A JSON line is one of
    {"messages": [{"role": …, "content": …}, …]}      a conversation
    {"question": …, "answer": …}                       one that is checked by exact match
    {"text": …}                                        plain text
each optionally with "split": "train", "router" or "test". Any other file holds plain text: alone it
is one example per paragraph, in a folder it is one example, a document, so that no document is both
trained on and held out. Lines end at line feeds and nowhere else. Copies of texts are left out, and
what is left out is counted. This module knows no tokenizer and no model.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from models.downscale.recipe import TASKS, CorpusSettings
from models.downscale.texts import LINES, Copies, files_of, paragraphs, read_text
from models.errors import CorpusError
from models.tasks import DOMAINS
from models.tasks.base import Split, Task
from policies.cascade.base import normalise
from policies.json_text import whole_text

ROLES: Final = ("system", "user", "assistant")
MIN_TRAIN_EXAMPLES: Final = 32
# A text counts as one example for each of these: it is cut into about as many rows.
_EXAMPLE_CHARACTERS: Final = 512
_SAMPLE_SEED: Final = 2026

_SHARE_MULTI_TURN: Final = 0.10
_SHARE_SYSTEM_PROMPT: Final = 0.08
_SYSTEM_PROMPTS: Final = (
    "You are a helpful assistant.",
    "Answer with the result only.",
    "You are a helpful assistant. Answer briefly.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One message of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A conversation (`turns`) or a plain `text`, and which split it belongs to.

    `answer` is the one right answer where a model's own can be checked against it; the
    conversation is then one question and that answer. `skill` is the kind of question, if known.
    """

    turns: tuple[Turn, ...] = ()
    text: str | None = None
    answer: str | None = None
    split: Split = Split.TRAIN
    skill: str | None = None

    @property
    def question(self) -> str | None:
        """The question of a checkable example, None for any other."""
        return self.turns[0].content if self.answer is not None else None

    @property
    def asked(self) -> tuple[str, ...]:
        """What tells duplicates, in whichever form they are written: what the user says in each
        turn, or the lines of a text, without what does not change a question."""
        if self.text is not None:
            parts = [line for line in self.text.split("\n") if line.strip()]
        else:
            parts = [turn.content for turn in self.turns if turn.role == "user"]
        return tuple(normalise(part) for part in parts)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A named list of examples; what is held out never stands in the training split.

    `left_out` says how much of the source is not among them, by reason.
    """

    name: str
    examples: tuple[Example, ...]
    left_out: Mapping[str, int] = field(default_factory=dict, compare=False)

    def of(self, split: Split) -> list[Example]:
        """Return the examples of `split`, in order."""
        return [example for example in self.examples if example.split is split]

    def questions(self, split: Split) -> list[Example]:
        """Return the checkable examples of `split`, in order."""
        return [example for example in self.of(split) if example.answer is not None]


def generate_corpus(name: str, settings: CorpusSettings, *, held_out: int, seed: int) -> Corpus:
    """Draw the corpus of a built-in task domain; the same for the same settings and seed.

    `held_out` is the number of questions for each held-out split.

    Raises:
        CorpusError: there is no such task domain.
    """
    task = settings.corpus.removeprefix(TASKS)
    if task not in DOMAINS:
        raise CorpusError(
            f"{name}: there is no task domain {task!r}; allowed are {', '.join(DOMAINS)}"
        )
    examples = _generated(task, settings.examples, held_out=held_out, seed=seed)
    return _checked(name, settings, examples)


def load_corpus(name: str, settings: CorpusSettings) -> Corpus:
    """Read the corpus of `name` from its files.

    Raises:
        CorpusError: it is missing, malformed, empty or too small.
    """
    examples, left_out = _read(Path(settings.corpus))
    if settings.held_out is not None:
        others, left_out_too = _read(Path(settings.held_out), hashed=False)
        examples = [replace(example, split=Split.TRAIN) for example in examples]
        examples += _held_out(others)
        left_out += left_out_too
    return _checked(name, settings, examples, left_out)


def _checked(
    name: str,
    settings: CorpusSettings,
    examples: Iterable[Example],
    left_out: Counter[str] | None = None,
) -> Corpus:
    left_out = Counter() if left_out is None else left_out
    kept = without_leaks(_with_every_split(without_copies(examples, left_out)), left_out)
    corpus = Corpus(name=name, examples=tuple(kept), left_out=+left_out)
    _check_size(corpus, settings)
    return corpus


def write_corpus(corpus: Corpus, file: Path) -> None:
    """Write `corpus` as JSON lines."""
    with file.open("w", encoding="utf-8") as stream:
        for example in corpus.examples:
            record = {k: v for k, v in asdict(example).items() if v not in (None, ())}
            if "turns" in record:
                record["messages"] = record.pop("turns")
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_corpus(name: str, file: Path) -> Corpus:
    """Read what `write_corpus` wrote.

    Raises:
        CorpusError: a line is malformed.
    """
    return Corpus(name=name, examples=tuple(_read_file(file, hashed=False)))


def _generated(task: str, count: int, *, held_out: int, seed: int) -> Iterator[Example]:
    rng = random.Random(f"{task}/{seed}")
    for _ in range(count):
        yield draw_example(rng, {task: 1.0})
    for split in (Split.ROUTER, Split.TEST):
        for one in DOMAINS[task].distinct(split, held_out, seed=_SAMPLE_SEED):
            yield Example(turns=_dialogue(one), answer=one.answer, split=split, skill=one.skill)


def draw_example(rng: random.Random, mixture: Mapping[str, float]) -> Example:
    """A training conversation on a task domain, drawn by its share in `mixture`.

    Most have one turn; some have several, or a system prompt.
    """
    name = rng.choices(list(mixture), list(mixture.values()))[0]
    num_turns = rng.randint(2, 3) if rng.random() < _SHARE_MULTI_TURN else 1
    turns: list[Turn] = []
    if rng.random() < _SHARE_SYSTEM_PROMPT:
        turns.append(Turn(role="system", content=rng.choice(_SYSTEM_PROMPTS)))
    tasks = [DOMAINS[name].sample(rng, Split.TRAIN) for _ in range(num_turns)]
    for task in tasks:
        turns += _dialogue(task)
    return Example(turns=tuple(turns), skill=tasks[0].skill)


def _dialogue(task: Task) -> tuple[Turn, Turn]:
    return (
        Turn(role="user", content=task.question),
        Turn(role="assistant", content=task.answer),
    )


def _read(source: Path, *, hashed: bool = True) -> tuple[list[Example], Counter[str]]:
    """The examples of a file or of all files in a folder, and what of it is none."""
    files, others = files_of(source)
    left_out = Counter({f"files that end in {s or 'nothing'!r}": n for s, n in others.items()})
    if not source.is_dir():
        return _read_file(source, hashed=hashed), left_out
    examples: list[Example] = []
    for file in files:
        if file.suffix.lower() == LINES:
            examples += _read_file(file, hashed=hashed)
        elif text := read_text(file).strip():
            examples.append(_with_split(Example(text=text), None, str(file), hashed))
        else:
            left_out["empty files"] += 1
    return examples, left_out


def _read_file(file: Path, *, hashed: bool) -> list[Example]:
    """The examples of a file; those that name no split get one by `hashed`, or are for training."""
    content = read_text(file)
    if file.suffix.lower() != LINES:
        return [
            _with_split(Example(text=text), None, str(file), hashed) for text in paragraphs(content)
        ]
    lines = enumerate(content.split("\n"), 1)  # not splitlines: U+2028 may stand in a string
    # A byte-order mark stands within where files were joined.
    marked = ((line.lstrip("\ufeff"), number) for number, line in lines)
    return [_parse(line, f"{file}:{number}", hashed) for line, number in marked if line.strip()]


def _parse(line: str, where: str, hashed: bool) -> Example:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise CorpusError(f"{where}: not a JSON object")
    skill = record.get("skill")
    example = Example(skill=None if skill is None else whole_text(str(skill)))
    if "messages" in record:
        turns = _turns(record["messages"], where)
        answer = _text(record, "answer", where) if "answer" in record else None
        if answer is not None and [turn.role for turn in turns] != ["user", "assistant"]:
            raise CorpusError(f"{where}: messages: with an answer they are one question and reply")
        example = replace(example, turns=turns, answer=answer)
    elif "question" in record:
        question, answer = _text(record, "question", where), _text(record, "answer", where)
        turns = (Turn(role="user", content=question), Turn(role="assistant", content=answer))
        example = replace(example, turns=turns, answer=answer)
    elif "text" in record:
        example = replace(example, text=_text(record, "text", where))
    else:
        raise CorpusError(f"{where}: needs 'messages', 'question' and 'answer', or 'text'")
    return _with_split(example, record.get("split"), where, hashed)


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise CorpusError(f"{where}: {key}: must be a text that is not empty, got {value!r}")
    return whole_text(value)


def _turns(messages: object, where: str) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise CorpusError(f"{where}: messages: must be a list of objects with role and content")
    turns = tuple(
        Turn(role=str(message.get("role")), content=_text(message, "content", where))
        for message in messages
    )
    for turn in turns:
        if turn.role not in ROLES:
            raise CorpusError(
                f"{where}: messages: role {turn.role!r} is unknown; allowed are {', '.join(ROLES)}"
            )
    if not any(turn.role == "assistant" for turn in turns):
        raise CorpusError(f"{where}: messages: no turn of the assistant to learn from")
    return turns


def _with_split(example: Example, split: object, where: str, hashed: bool) -> Example:
    if split is None:
        return replace(example, split=_hashed_split(example.asked)) if hashed else example
    try:
        return replace(example, split=Split(str(split)))
    except ValueError:
        raise CorpusError(
            f"{where}: split: {split!r} is unknown; allowed are {', '.join(Split)}"
        ) from None


def _hashed_split(asked: tuple[str, ...]) -> Split:
    """90% train, 5% router, 5% test; duplicates share a split, the same on every machine."""
    return {0: Split.ROUTER, 1: Split.TEST}.get(_digest(asked) % 20, Split.TRAIN)


def _digest(asked: tuple[str, ...]) -> int:
    content = "\n".join(asked).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def _held_out(examples: Sequence[Example]) -> Iterator[Example]:
    """A held-out file in halves, where its lines name no split of their own."""
    for number, example in enumerate(examples):
        half = Split.ROUTER if number % 2 else Split.TEST
        yield example if example.split is not Split.TRAIN else replace(example, split=half)


def _with_every_split(examples: Iterable[Example]) -> list[Example]:
    """Of few documents the hash may hold none out; then those with the least hashes are."""
    examples = list(examples)
    for split in (Split.TEST, Split.ROUTER):
        texts = [e for e in examples if e.text is not None and e.split is Split.TRAIN]
        if len(texts) > 1 and not any(example.split is split for example in examples):
            least = min(texts, key=lambda example: _digest(example.asked))
            at = next(i for i, example in enumerate(examples) if example is least)
            examples[at] = replace(least, split=split)
    return examples


def without_copies(
    examples: Iterable[Example], left_out: Counter[str], of: Iterable[Example] = ()
) -> list[Example]:
    """`examples` without the texts that are copies of others, or of those in `of`.

    Of two copies the one that is held out stays.
    """
    examples, copies = list(examples), Copies()
    for other in of:
        if other.text is not None:
            copies.meet(other.text)
    kept: list[int] = []
    held_out_first = [Split.TEST, Split.ROUTER, Split.TRAIN].index
    for at in sorted(range(len(examples)), key=lambda at: held_out_first(examples[at].split)):
        text = examples[at].text
        kind = None if text is None else copies.meet(text)
        if kind is None:
            kept.append(at)
        else:
            left_out[f"{kind} copies"] += 1
    return [examples[at] for at in sorted(kept)]


def without_leaks(examples: Iterable[Example], left_out: Counter[str]) -> Iterator[Example]:
    """Drop from training what is held out, and from the router's split what is tested."""
    examples = list(examples)
    split_of: dict[tuple[str, ...], Split] = {}
    for split in (Split.TEST, Split.ROUTER):
        for example in examples:
            if example.split is split:
                split_of.setdefault(example.asked, split)
    held_out = held_out_questions(examples)
    for example in examples:
        asked = example.asked
        if split_of.get(asked, example.split) is example.split and not (
            example.split is Split.TRAIN and gives_away(asked, held_out)
        ):
            yield example
        else:
            left_out["examples that give away what is held out"] += 1


def held_out_questions(examples: Iterable[Example]) -> set[str]:
    """What the held-out conversations of one question ask."""
    asked = (e.asked for e in examples if e.split is not Split.TRAIN and e.text is None)
    return {parts[0] for parts in asked if len(parts) == 1} - {""}


def gives_away(asked: tuple[str, ...], held_out: set[str]) -> bool:
    """Whether an example tells a held-out question, in whatever form: as a record with an answer,
    as any turn of a conversation, as a line of a text."""
    return not held_out.isdisjoint(asked)


def _check_size(corpus: Corpus, settings: CorpusSettings) -> None:
    where = f"{corpus.name}: {settings.corpus}"
    if not corpus.examples:
        raise CorpusError(f"{where}: the corpus is empty")
    num_train = sum(
        1 if example.text is None else -(-len(example.text) // _EXAMPLE_CHARACTERS)
        for example in corpus.of(Split.TRAIN)
    )
    if num_train < MIN_TRAIN_EXAMPLES:
        raise CorpusError(
            f"{where}: {num_train} training examples; at least {MIN_TRAIN_EXAMPLES} are needed"
        )
    for split in (Split.ROUTER, Split.TEST):
        if not corpus.of(split):
            raise CorpusError(
                f"{where}: no example fell into the held-out split {split!s} "
                f"({len(corpus.examples)} in all); give more, or a held_out file"
            )
