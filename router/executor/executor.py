"""Interprets plans.

`Executor.run` streams the chunks of the answer that the plan accepts; everything else that ran is
in the `Trace`. Closing the stream, or cancelling its reader, cancels whatever still runs. It knows
nothing of HTTP, and of policies only their plans.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping

from models.engines.base import Chunk
from models.errors import EngineError, RequestError
from policies.plan import Answer, Cascade, Plan
from router.catalog import Catalog
from router.config import ServingLimits
from router.engines.base import EngineClient
from router.executor.answer import run_answer
from router.executor.best import run_best
from router.executor.cascade import run_cascade
from router.executor.task import Task
from router.executor.trace import Run, Trace
from router.executor.union import run_union


class Executor:
    """Runs plans on engine clients, given by engine name."""

    def __init__(
        self, *, engines: Mapping[str, EngineClient], catalog: Catalog, limits: ServingLimits
    ) -> None:
        self.engines = engines
        self.catalog = catalog
        self.limits = limits

    async def run(
        self, plan: Plan, task: Task, trace: Trace, path: str = ""
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the accepted answer of `plan`, which `Catalog.check` has passed.

        Raises what engines raise, when no part of the plan could answer. The run's outcome is in
        `trace`; one that its reader closed or cancelled is left "running" there.
        """
        run = trace.begin(path, plan)
        chunks = self._chunks(plan, task, trace, run)
        try:
            async for chunk in chunks:
                if chunk.finish_reason is not None:
                    trace.end(run, "ok")
                yield chunk
        except (EngineError, RequestError) as error:
            trace.end(run, "failed", str(error))
            raise
        finally:
            await chunks.aclose()

    def _chunks(
        self, plan: Plan, task: Task, trace: Trace, run: Run
    ) -> AsyncGenerator[Chunk, None]:
        if isinstance(plan, Answer):
            answer = run_union if self.catalog.spans_engines(plan) else run_answer
            return answer(self, plan, task, run)
        if isinstance(plan, Cascade):
            return run_cascade(self, plan, task, trace, run.path)
        return run_best(self, plan, task, trace, run.path)
