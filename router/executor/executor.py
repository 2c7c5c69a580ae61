"""Interprets plans.

`Executor.run` streams the chunks of the answer that the plan accepts; everything else that ran is
in the `Trace`. Closing the stream, or cancelling its reader, cancels whatever still runs. It knows
nothing of HTTP, and of policies only their plans.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial

from models.engines.base import Chunk
from models.errors import (
    EngineError,
    EngineFailed,
    EngineOverloaded,
    RequestError,
    without_quotes,
)
from policies.best import rate
from policies.cascade.base import BatchScorer, PrefixScorer, PromptScorer, Scorer
from policies.plan import Answer, Best, Cascade, Plan
from router.catalog.members import Members
from router.config import ServingLimits
from router.energy import energy_of
from router.engines import EngineClient, merge
from router.executor.judging import answered, attempt, reading, scores, until_decided
from router.executor.task import Task, request_of
from router.executor.trace import Run, Trace, child_path, fallback_path
from router.executor.union import unite
from router.turns import Turns

# Shorter answers end before watching them, token by token, pays.
_LEAST_WATCHED_TOKENS = 16
# A bound's own rounding must not stop an answer that would just reach its threshold.
_ROUNDING = 1e-9


class Executor:
    """Runs one request's plans on engine clients, given by engine name; they take `turns`."""

    def __init__(
        self,
        *,
        engines: Mapping[str, EngineClient],
        members: Members,
        scorers: Mapping[str, Scorer],
        limits: ServingLimits,
    ) -> None:
        self.engines = engines
        self._members = members
        self._scorers = scorers
        self._limits = limits
        self.turns = Turns()

    async def run(
        self, plan: Plan, task: Task, trace: Trace, path: str = ""
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the accepted answer of `plan`, which `Policies.check` has passed.

        Raises what engines raise, when no part of the plan could answer. The run's outcome is in
        `trace`; one that its reader closed or cancelled is left "running" there.
        """
        run = trace.begin(path, plan)
        if isinstance(plan, Answer):
            chunks = self._answer(plan, task, run)
        elif isinstance(plan, Cascade):
            chunks = self._cascade(plan, task, trace, path)
        else:
            chunks = self._best(plan, task, trace, path)
        try:
            async for chunk in chunks:
                if chunk.finish_reason is not None:
                    trace.end(run, "ok")
                yield chunk
        except (EngineError, RequestError) as error:
            trace.end(run, "failed", _kept(error))
            raise
        finally:
            await chunks.aclose()

    async def first_of(
        self, plans: Sequence[Plan], task: Task, trace: Trace
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the answer of the first of `plans` that gives one.

        The next takes over where one fails, or is overloaded, before its first chunk. Raises the
        first one's error where all do.
        """
        first: EngineError | None = None
        for index, plan in enumerate(plans):
            started = False
            try:
                async with aclosing(self.run(plan, task, trace, fallback_path(index))) as chunks:
                    async for chunk in chunks:
                        started = True
                        yield chunk
                return
            except EngineError as error:
                if started:
                    raise
                first = first or error
        assert first is not None, "there is a plan"
        raise first

    async def whole(self, plan: Plan, task: Task, trace: Trace, path: str = "") -> Chunk:
        """Return the whole accepted answer of `plan` as one chunk."""
        async with aclosing(self.run(plan, replace(task, stream=False), trace, path)) as chunks:
            return _whole([chunk async for chunk in chunks])

    # -- Answer: one request to one engine

    async def _answer(self, answer: Answer, task: Task, run: Run) -> AsyncGenerator[Chunk, None]:
        """Yield the answer of `answer`'s members, fused if there are several."""
        media = task.prompt.media
        if media is not None:
            self._members.check_media(answer, media.kind, media.field)
        engine = self._members.engine_for(answer)
        if engine is None:
            async with aclosing(self._union(answer, task, run)) as united:
                async for chunk in united:
                    yield chunk
            return
        request = await request_of(
            answer, task, run.path, members=self._members, max_tokens=self._max_tokens(task)
        )
        run.engine, run.request_id = engine, request.request_id
        encodes = request.encoding is not None
        run.prompt_tokens = task.query.prompt_tokens if encodes else len(request.prompt_tokens)
        client = self.engines[engine]
        try:
            if not task.stream:
                yield _noted(run, task, await client.complete(request))
                return
            async with aclosing(client.stream(request)) as chunks:
                async for chunk in chunks:
                    yield _noted(run, task, chunk)
        except (EngineOverloaded, RequestError):
            run.prompt_tokens = 0  # the engine refused it unread: nobody pays for that
            raise

    def _union(self, answer: Answer, task: Task, run: Run) -> AsyncGenerator[Chunk, None]:
        return unite(
            answer,
            task,
            run,
            clients=[self.engines[self._members.engine_of(name)] for name in answer.members],
            tokenizers=[self._members.tokenizer_of(name) for name in answer.members],
            adapters=self._members.adapters(answer.members),
            max_tokens=self._max_tokens(task),
            context_tokens=self._members.context_tokens(answer),
        )

    def _max_tokens(self, task: Task) -> int:
        return self._limits.default_max_tokens if task.max_tokens is None else task.max_tokens

    # -- Cascade: stages in order, until an answer is good enough (FrugalGPT)

    async def _cascade(
        self, cascade: Cascade, task: Task, trace: Trace, path: str
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the accepted stage's answer; the last stage streams, as it is accepted unseen.

        A stage that fails or takes too long moves on to the next, and so does one whose score, by
        the answer's beginning, cannot reach the threshold any more. Where the scorer judges by the
        reading of the prompt, a stage that it accepts streams too. If the last one fails before
        its first chunk, the best rejected answer stands in; if there is none, its error is raised.
        """
        scorer = self._scorers[cascade.scorer]
        rejected: list[tuple[float, str, Chunk]] = []
        earlier: tuple[str, ...] = ()
        *early, last = cascade.stages
        timeouts_s = cascade.timeouts_s or (None,) * len(early)
        paths = [child_path(path, index) for index in range(len(cascade.stages))]
        for stage, stage_path, threshold, given_s in zip(
            early, paths[:-1], cascade.thresholds, timeouts_s, strict=True
        ):
            timeout_s = self._limits.stage_timeout_s if given_s is None else given_s
            if isinstance(scorer, PromptScorer):
                foreseen = self._foreseen(
                    stage, task, trace, stage_path,
                    scorer=scorer, threshold=threshold, timeout_s=timeout_s,
                )  # fmt: skip
                async with aclosing(foreseen) as chunks:
                    accepted = False
                    async for chunk in chunks:
                        accepted = True
                        yield chunk
                if accepted:
                    return
                continue
            hopeless = self._hopeless(scorer, stage, threshold, task)
            answer = await self._stage(
                stage, task, trace, stage_path, hopeless=hopeless, timeout_s=timeout_s
            )
            if answer is None:
                continue
            if answer.finish_reason is not None:
                run = trace.runs[stage_path]
                [run.score] = await scores(scorer, [attempt(task.query, stage, answer, earlier)])
                if run.score >= threshold:
                    yield answer
                    return
                run.outcome = "rejected"
                rejected.append((run.score, stage_path, answer))
            earlier = (*earlier, answer.text)
        started = False
        try:
            async with aclosing(self.run(last, task, trace, paths[-1])) as chunks:
                async for chunk in chunks:
                    started = True
                    yield chunk
        except (EngineError, RequestError):
            if started or not rejected:
                raise
            _, best_path, answer = max(rejected, key=lambda entry: entry[0])
            trace.runs[best_path].outcome = "ok"
            yield answer

    async def _foreseen(
        self,
        stage: Plan,
        task: Task,
        trace: Trace,
        path: str,
        *,
        scorer: PromptScorer,
        threshold: float,
        timeout_s: float,
    ) -> AsyncGenerator[Chunk, None]:
        """Yield a stage's answer as it comes if `scorer` expects enough of it, or else nothing.

        That is known with its first chunk, and until then it may take `timeout_s`. Whoever is not
        expected to do well has read the prompt, and is cancelled before it writes.
        """
        asked = task.sampling.prompt_logprobs
        sampling = replace(task.sampling, prompt_logprobs=asked or 0, logprobs=True)
        told = replace(task, sampling=sampling, stream=True)
        async with aclosing(self.run(stage, told, trace, path)) as chunks:
            try:
                async with asyncio.timeout(timeout_s):
                    first = await anext(chunks)
            except (EngineError, RequestError):
                return
            except TimeoutError:
                trace.end_below(path, "timeout", "the stage's time was up")
                return
            run = trace.runs[path]
            run.score = scorer.foresee(task.query.text, stage, reading(first))
            if run.score >= threshold:
                yield replace(first, prompt=() if asked is None else first.prompt, rows=None)
                async for chunk in chunks:
                    yield chunk
                return
        trace.end(run, "hopeless")

    async def _stage(
        self,
        stage: Plan,
        task: Task,
        trace: Trace,
        path: str,
        *,
        hopeless: Callable[[Chunk], bool] | None,
        timeout_s: float,
    ) -> Chunk | None:
        """Return a stage's answer, or None if it failed or took too long.

        It is whole, or, without a finish reason, the beginning that `hopeless` gave up.
        """
        end_s = asyncio.get_running_loop().time() + timeout_s
        task = replace(task.judged(), deadline_s=min(end_s, task.deadline_s or end_s))
        try:
            async with asyncio.timeout(timeout_s):
                if hopeless is not None:
                    return await self._watch(stage, task, trace, path, hopeless=hopeless)
                return await self.whole(stage, task, trace, path)
        except (EngineError, RequestError):
            return None
        except TimeoutError:
            trace.end_below(path, "timeout", "the stage's time was up")
            return None

    def _hopeless(
        self, scorer: Scorer, stage: Plan, threshold: float, task: Task
    ) -> Callable[[Chunk], bool] | None:
        """Return what tells from an answer's beginning that it will not reach `threshold`.

        None where the scorer cannot say, or the stage is no `Answer` whose tokens come in turn.
        """
        if not isinstance(scorer, PrefixScorer) or not isinstance(stage, Answer):
            return None
        # The engine may allow fewer, which only lowers the bound.
        max_tokens = self._max_tokens(task)
        if max_tokens < _LEAST_WATCHED_TOKENS:
            return None

        def hopeless(beginning: Chunk) -> bool:
            prefix = attempt(task.query, stage, beginning, finished=False)
            return scorer.ceiling(prefix, max_tokens) < threshold - _ROUNDING

        return hopeless

    async def _watch(
        self,
        stage: Plan,
        task: Task,
        trace: Trace,
        path: str,
        *,
        hopeless: Callable[[Chunk], bool],
    ) -> Chunk:
        """Return a stage's answer, cut off (its lanes cancelled) as soon as it is `hopeless`.

        It is judged whenever it has grown by a quarter, so that all judging together costs as much
        as reading the answer a few times.
        """
        chunks: list[Chunk] = []
        num_tokens = num_judged = 0
        async with aclosing(self.run(stage, replace(task, stream=True), trace, path)) as stream:
            async for chunk in stream:
                chunks.append(chunk)
                num_tokens += len(chunk.tokens)
                if chunk.finish_reason is None and num_tokens > num_judged + num_judged // 4:
                    num_judged = num_tokens
                    chunks = [merge(chunks)]
                    if hopeless(chunks[0]):
                        break
            else:
                return _whole(chunks)
        trace.end(trace.runs[path], "hopeless")
        return chunks[0]

    # -- Best: candidates side by side, one of them selected

    async def _best(
        self, best: Best, task: Task, trace: Trace, path: str
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the selected candidate's answer.

        A candidate that fails doesn't vote; if all fail, the first one's error is raised.
        Candidates that cannot change a majority any more are cancelled.
        """
        paths = [child_path(path, index) for index in range(len(best.candidates))]
        running = [
            self.turns.task(self.whole(candidate, task.judged(), trace, candidate_path))
            for candidate, candidate_path in zip(best.candidates, paths, strict=True)
        ]
        try:
            await until_decided(best, running)
        finally:
            for candidate in running:
                candidate.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        for child in paths:
            trace.end_below(child, "cancelled")
        answers = [one.result() if answered(one) else None for one in running]
        if not any(map(answered, running)):
            error = running[0].exception()
            assert error is not None
            raise error
        runs = [trace.runs[child] for child in paths]
        chosen = await self._select(best, task, answers, runs)
        for index, run in enumerate(runs):
            if index != chosen and answers[index] is not None:
                run.outcome = "rejected"
        answer = answers[chosen]
        assert answer is not None
        yield answer

    async def _select(
        self, best: Best, task: Task, answers: list[Chunk | None], runs: list[Run]
    ) -> int:
        """Return which of the answers is taken; every answer's score goes into its run."""
        given = {index: answer for index, answer in enumerate(answers) if answer is not None}
        attempts = [attempt(task.query, best.candidates[i], one) for i, one in given.items()]
        rated = partial(rate, best, attempts, self._scorers)
        slow = isinstance(self._scorers.get(best.scorer), BatchScorer)
        found = await asyncio.to_thread(rated) if slow else rated()
        for index, score in zip(given, found, strict=True):
            runs[index].score = score
        return max(given, key=lambda index: runs[index].score or 0.0)


def _whole(chunks: list[Chunk]) -> Chunk:
    answer = merge(chunks)
    if answer.finish_reason is None:
        raise EngineFailed("the engine's answer broke off")
    return answer


def _without_answer(chunk: Chunk) -> Chunk:
    """Return what `chunk` says of the prompt alone."""
    reason = chunk.finish_reason and "length"
    followed = chunk.followed and (chunk.followed[0], 0)
    plain = replace(chunk, text="", reasoning="", tokens=(), tool_calls=(), followed=followed)
    return replace(plain, finish_reason=reason)


def _noted(run: Run, task: Task, chunk: Chunk) -> Chunk:
    """Return what `task` wants of `chunk`, having noted in `run` what is paid for."""
    if task.max_tokens == 0:
        chunk = _without_answer(chunk)
    run.output_tokens += len(chunk.tokens)
    if chunk.output_tokens is not None:
        run.output_tokens = chunk.output_tokens
    run.weights, run.energy, run.followed = chunk.weights, energy_of(chunk), chunk.followed
    if chunk.prompt_tokens is not None:
        run.prompt_tokens = chunk.prompt_tokens
    return chunk


def _kept(error: EngineError | RequestError) -> str:
    """Return what a row may say of `error`: of a refusal not the value that was refused."""
    if isinstance(error, RequestError):
        return f"refused: {error.param or 'the request'}"
    return without_quotes(str(error))
