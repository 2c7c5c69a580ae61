"""The engine's thread: take what came in, step, send what came out, again.

The thread owns the runner, the scheduler and every sequence. The event loop reaches it only
through `submit` and `cancel`, and is reached only by one call per `stream_interval_s`, or sooner
where somebody waits for a first token or an end: while it handles tokens, the interpreter's lock
keeps this thread from stepping.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from asyncio import AbstractEventLoop
from collections import defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from itertools import zip_longest
from queue import Empty, SimpleQueue

import torch

from models.engines.base import EngineStats
from models.engines.stacked.drafts import Drafts
from models.engines.stacked.layout import Part
from models.engines.stacked.lead import MOST_AHEAD, heard, run_ahead
from models.engines.stacked.runner import Runner, Stepped
from models.engines.stacked.sampler import Draw
from models.engines.stacked.scheduler import Scheduler
from models.engines.stacked.sequence import Outcome, Said, Sequence
from models.engines.text import Vocabulary
from models.errors import EngineFailed, EngineOverloaded

logger = logging.getLogger(__name__)

# After so many requests that failed one by one, a step of the engine's own tells whose fault it is.
_SUSPICIOUS_FAILURES = 3


class Loop(threading.Thread):
    """See the module's docstring. `failure` is set once the loop has given up."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        *,
        vocabulary: Vocabulary,
        drafts: Drafts | None = None,
        scouts: Runner | None = None,
        max_queued_requests: int,
        stream_interval_s: float,
        event_loop: AbstractEventLoop,
    ) -> None:
        """`scouts` runs leads of another shape."""
        super().__init__(name="stacked-engine", daemon=True)
        self.failure: EngineFailed | None = None
        self._runner = runner
        self._scheduler = scheduler
        self._vocabulary = vocabulary
        self._drafts = drafts
        self._scouts = scouts
        self._max_queued_requests = max_queued_requests
        self._stream_interval_s = stream_interval_s
        self._event_loop = event_loop
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._ready: dict[Sequence, None] = {}  # in order
        self._outbox: deque[tuple[Sequence, Outcome]] = deque()
        self._delivering = False
        self._urgent = False
        self._delivered_s = 0.0
        self._stopping = False
        self._ended = False
        self._num_failures = 0  # in a row
        self._num_finished = 0
        self._num_tokens = 0
        self._num_gated = 0
        self._num_fused = 0
        self._busy_s = 0.0
        self._step_began_s: float | None = None

    def submit(self, sequence: Sequence) -> None:
        """Queue a request; its outcomes come through `sequence.send`."""
        self._inbox.put(partial(self._add, sequence))
        if self._ended:  # perhaps too late to be taken
            sequence.send(self._why_ended)

    def cancel(self, sequence: Sequence) -> None:
        """Drop a request before the next step; nothing happens if it has finished."""
        self._inbox.put(partial(self._drop, sequence))

    def between_steps(self, change: Callable[[], None]) -> Future[None]:
        """Have the thread call `change` between two steps; the future ends when it has."""
        done: Future[None] = Future()

        def run() -> None:
            if done.done():
                return
            try:
                change()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        self._inbox.put(run)
        if self._ended and not done.done():  # perhaps too late to be taken
            done.set_exception(self._why_ended)
        return done

    def request_stop(self) -> None:
        """End the thread after the step it is in; what is left then fails."""
        self._inbox.put(self._halt)

    @property
    def step_s(self) -> float:
        """How long the step at hand has taken; 0 between steps. May be read from another thread."""
        began_s = self._step_began_s
        return 0.0 if began_s is None else time.perf_counter() - began_s

    def stats(self) -> EngineStats:
        """Return a snapshot; may be called from another thread."""
        running, arena = list(self._scheduler.running), self._runner.arena
        prefixes = self._scheduler.prefixes
        return EngineStats(
            running_requests=len(running),
            queued_requests=self._scheduler.num_waiting,
            active_lanes=sum(sequence.num_lanes for sequence in running),
            kv_bytes_used=prefixes.num_rows_held * arena.row_bytes,
            kv_bytes_total=arena.num_rows * arena.row_bytes,
            generated_tokens_total=self._num_tokens,
            gated_tokens_total=self._num_gated,
            fused_tokens_total=self._num_fused,
            drafted_tokens_total=self._drafts.num_drafted if self._drafts else 0,
            accepted_tokens_total=self._drafts.num_accepted if self._drafts else 0,
            busy_seconds_total=self._busy_s,
        )

    def run(self) -> None:
        """Step until stopped, or until steps fail whatever is in them; then fail what is left."""
        try:
            with torch.inference_mode():
                while self._take_inbox():
                    self._turn()
        except Exception as error:
            logger.exception("the engine's thread failed")
            self.failure = EngineFailed(f"the engine's thread failed: {error!r}")
        self._ended = True
        while not self._inbox.empty():
            self._inbox.get()()
        for sequence in list(self._scheduler.sequences):
            self._fail(sequence, self._why_ended)
        self._deliver()

    def _turn(self) -> None:
        """Run one step and hand over what is due."""
        if self._scouts is not None:
            for _ in range(MOST_AHEAD):
                leading = self._scheduler.lead_step()
                if not leading:
                    break
                self._timed(leading, self._scouts)
        parts = self._scheduler.next_step()
        if self._drafts is not None:
            parts = self._drafts.extend(parts)
        if parts:
            if any(part.num_tokens > 1 + len(part.draft) for part in parts):
                self._deliver()  # what is ready doesn't wait for a prompt
            self._timed(parts, self._runner)
        if self._urgent:
            self._deliver()

    def _timed(self, parts: list[Part], runner: Runner) -> None:
        self._step_began_s = started_s = time.perf_counter()
        self._step(parts, runner)
        self._step_began_s, ended_s = None, time.perf_counter()
        self._busy_s += ended_s - started_s
        # Due if another step as long as this one would make it late.
        due_s = self._delivered_s + self._stream_interval_s
        self._urgent |= 2 * ended_s - started_s >= due_s

    @property
    def _why_ended(self) -> EngineFailed:
        return self.failure or EngineFailed("the engine was stopped")

    def _take_inbox(self) -> bool:
        """Handle what came in, waiting for something if nothing runs; return whether to go on."""
        idle = not self._scheduler.running
        while not self._stopping:
            try:
                self._inbox.get(block=idle)()
            except Empty:
                break
            idle = False
        return not self._stopping

    def _step(self, parts: list[Part], runner: Runner) -> None:
        """Run a step; where it raises run its halves, until only who causes that has failed."""
        if self._stopping:
            return
        try:
            stepped = runner.step(parts)
        except Exception as error:
            if len(parts) > 1:
                half = len(parts) // 2
                self._step(parts[:half], runner)
                self._step(parts[half:], runner)
            else:
                logger.exception("a request's step failed")
                failed = parts[0].sequence
                self._fail(failed.follows or failed, EngineFailed(f"a step failed: {error!r}"))
                self._suspect()
            return
        self._num_failures = 0
        for part in parts:
            part.sequence.score(vocabulary=self._vocabulary)
            part.sequence.advance(part.num_tokens - len(part.draft))
        for sequence, said_V in stepped.unsure.items():
            sequence.said = [Said(said_V, is_sure=False)]
        if stepped.drawn is None:
            return
        if runner is self._scouts:
            self._hear_scouts(stepped, stepped.drawn)
            return
        rows: defaultdict[Sequence, list[int]] = defaultdict(list)
        for row, sequence in enumerate(stepped.sequences):
            rows[sequence].append(row)
        for part in parts:
            self._accept_all(part, stepped.drawn, rows[part.sequence])

    def _hear_scouts(self, stepped: Stepped, drawn: Draw) -> None:
        """Take what leads of another shape are sure of, and keep the rest to be checked."""
        for row, (sequence, said) in enumerate(heard(stepped.sequences, stepped.logp_RV, drawn)):
            unread = sequence.reads_prompt and not sequence.num_generated
            if said.is_sure and not sequence.said and not unread:
                self._accept(sequence, drawn, row, said)
            else:
                run_ahead(sequence, said, drawn.token_ids[row])

    def _accept_all(self, part: Part, drawn: Draw, rows: list[int]) -> None:
        """Take what was drawn for a part, as far as its draft was right."""
        num_right, said = 0, list(part.sequence.said)
        for row, guess, lead in zip_longest(rows, part.draft, said[: len(rows)]):
            part.sequence.num_cached = len(part.sequence.tokens)
            self._accept(part.sequence, drawn, row, lead)
            if part.sequence.finished or guess != drawn.token_ids[row]:
                break
            num_right += 1
        if part.draft and self._drafts is not None and part.sequence.scout is None:
            self._drafts.learn(part, num_right)

    def _accept(self, sequence: Sequence, drawn: Draw, row: int, lead: Said | None) -> None:
        """Take a token, of which a `lead` may have said something."""
        is_asked = lead is not None and not lead.is_sure
        self._num_gated += sequence.lead_alone or sequence.scout is not None
        self._num_fused += is_asked
        sequence.num_asked += is_asked
        try:
            if not math.isfinite(drawn.entropies[row]):
                raise ArithmeticError("the next token's distribution is not finite")
            sequence.accept(drawn, row, vocabulary=self._vocabulary)
        except Exception as error:
            logger.exception("a request's token failed")
            sequence.finished = False  # it may have come so far
            self._fail(sequence, EngineFailed(f"a step failed: {error!r}"))
            return
        self._ready[sequence] = None
        self._urgent |= sequence.num_generated == 1 or sequence.finished
        self._num_tokens += 1
        if sequence.finished:
            self._remove(sequence)
            self._num_finished += 1

    def _suspect(self) -> None:
        """Give up if not only requests fail but also a step that is none's."""
        self._num_failures += 1
        if self._num_failures < _SUSPICIOUS_FAILURES:
            return
        self._num_failures = 0
        try:
            self._runner.try_out()
        except Exception as error:
            self.failure = EngineFailed(f"every step fails, whatever is in it: {error!r}")
            self._stopping = True

    def _add(self, sequence: Sequence) -> None:
        self._scheduler.add(sequence)
        if self._scheduler.num_waiting > self._max_queued_requests:
            num_waiting = self._scheduler.num_waiting - 1
            retry_after_s = num_waiting * self._busy_s / max(self._num_finished, 1)
            message = f"{num_waiting} requests wait already"
            self._fail(self._scheduler.surplus, EngineOverloaded(message, max(retry_after_s, 1.0)))

    def _drop(self, sequence: Sequence) -> None:
        if not sequence.finished:
            sequence.finished = True
            self._remove(sequence)
            self._ready.pop(sequence, None)

    def _remove(self, sequence: Sequence) -> None:
        if self._drafts is not None:
            self._drafts.forget(sequence)
        self._scheduler.remove(sequence)

    def _fail(self, sequence: Sequence, error: EngineFailed | EngineOverloaded) -> None:
        if not sequence.finished:
            self._drop(sequence)
            if isinstance(error, EngineFailed):
                self._scheduler.forget_prefixes()
            self._outbox.append((sequence, error))
            self._urgent = True

    def _halt(self) -> None:
        self._stopping = True

    def _deliver(self) -> None:
        """Have the event loop empty the outbox, unless it is about to anyway."""
        self._urgent, self._delivered_s = False, time.perf_counter()
        self._outbox.extend((sequence, sequence.take()) for sequence in self._ready)
        self._ready.clear()
        if self._outbox and not self._delivering:
            self._delivering = True
            try:
                self._event_loop.call_soon_threadsafe(self._send_all)
            except RuntimeError:  # the event loop is closed: nobody is left to read
                self._stopping = True

    def _send_all(self) -> None:
        """Runs on the event loop. The flag falls first, so that nothing added later is left."""
        self._delivering = False
        while self._outbox:
            sequence, outcome = self._outbox.popleft()
            sequence.send(outcome)
