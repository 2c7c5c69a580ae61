"""Graders that run something: the answer as a program, or a program of the user's.

Answers are strangers' code. They run in a process of their own, without this one's environment, in
an empty folder, with limits on time, memory and file size, and what they start ends with them; that
is no sandbox against malice, so `code` works only where it was allowed.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from policies.errors import PolicyError
from policies.grading.base import Graded, GraderKind, GradingContext, Question, Ungradable

# Some models end without closing what they have opened.
_FENCE = re.compile(r"```(?:python|py)?\d?\s*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_SECONDS: Final = 10
_COMMAND_SECONDS: Final = 120
_JAIL: Final = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({_SECONDS}, {_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, ({1 << 30}, {1 << 30}))
resource.setrlimit(resource.RLIMIT_FSIZE, ({1 << 20}, {1 << 20}))
exec(compile(sys.stdin.read(), "answer", "exec"), {{"__name__": "__main__"}})
"""


class Code:
    """1 where the answer's program passes the question's `tests`, run after it."""

    async def grade(self, question: Question, answers: Mapping[str, str]) -> Graded:
        """Run every answer; raises `Ungradable` where the question has no tests."""
        if not question.tests:
            raise Ungradable("the question has no tests")
        passed = {}
        for name, text in answers.items():
            blocks = _FENCE.findall(text)
            passed[name] = float(await _passes("\n".join(blocks or [text]), question.tests))
        return Graded(scores=passed)


async def _passes(program: str, tests: str) -> bool:
    # An answer that ends the process early has not passed: only the last line knows the word.
    word = secrets.token_hex()
    told = f"{program}\n{tests}\nprint({word!r})"
    with TemporaryDirectory() as folder:
        # -I: no user's packages, no PYTHON* variables, not the current folder's modules.
        words = [sys.executable, "-I", "-c", _JAIL]
        code, said = await _run(words, told, seconds=_SECONDS, folder=folder, env={})
    return code == 0 and said.rstrip().endswith(word)


class Command:
    """Asks a program: `{"question": …, "answers": {MODEL: TEXT}}` in, `{MODEL: SCORE}` out."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        files = filter(os.path.isfile, [shutil.which(words[0]) or words[0], *words[1:]])
        told = [Path(file).read_bytes() for file in files]
        self.basis = hashlib.sha256(b"\0".join(told)).hexdigest()

    async def grade(self, question: Question, answers: Mapping[str, str]) -> Graded:
        """Run the program once; raises `Ungradable` where it fails or says no scores."""
        asked = {
            "query": question.query,
            "references": question.references,
            "choices": question.choices,
        }
        told = json.dumps({"question": asked, "answers": dict(answers)})
        try:
            code, said = await _run(self._words, told, seconds=_COMMAND_SECONDS)
        except OSError as error:
            raise Ungradable(f"{self._words[0]} cannot be run: {error.strerror}") from None
        if code != 0:
            raise Ungradable(f"{self._words[0]} ended with status {code}")
        try:
            scores = {name: float(score) for name, score in json.loads(said).items()}
        except (ValueError, AttributeError, TypeError):
            raise Ungradable(f"{self._words[0]} did not say {{MODEL: SCORE}} in JSON") from None
        for name, score in scores.items():
            if not 0 <= score <= 1:
                raise Ungradable(f"{self._words[0]}: the score {score} of {name} is not in [0, 1]")
        return Graded(scores={name: scores[name] for name in answers if name in scores})


async def _run(
    words: Sequence[str],
    told: str,
    *,
    seconds: float,
    folder: str | None = None,
    env: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Return the status (-9 where it took too long) and the output of a program."""
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=folder,
        env=env,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(seconds):
            said, _ = await process.communicate(told.encode())
    except TimeoutError:
        return -9, ""
    finally:
        with suppress(ProcessLookupError):  # with whatever it started
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
    assert process.returncode is not None
    return process.returncode, said.decode(errors="replace")


def _build_code(argument: str, context: GradingContext) -> Code:
    if argument:
        raise PolicyError(f"grade: code takes no argument, got {argument!r}")
    if not context.allow_code:
        raise PolicyError("grade: code runs what models wrote; allow it with --allow-code")
    return Code()


def _build_command(argument: str, _: GradingContext) -> Command:
    try:
        words = shlex.split(argument)
    except ValueError as error:
        raise PolicyError(f"grade: command:{argument}: {error}") from None
    if not words:
        raise PolicyError("grade: command needs a program, as in command:./grade.py")
    if shutil.which(words[0]) is None:
        raise PolicyError(f"grade: command:{argument}: {words[0]} is no program that can be run")
    return Command(words)


CODE = GraderKind(_build_code)
COMMAND = GraderKind(_build_command)
