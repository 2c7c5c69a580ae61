"""The routes of experiments: reports, what shadows found, and what users thought of an answer.

Feedback is joined to its answer's row whenever it comes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import sqlalchemy as sa
from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import JSONResponse

from policies.experiments.metrics import METRIC_NAME
from policies.experiments.report import Report
from router.access.authentication import Identify
from router.bodies import Bodies
from router.errors import ApiError
from router.exchange import answer_digest
from router.experiments.experiments import Experiments
from router.experiments.reporting import Status
from router.experiments.shadows import Mirror, shadow_report
from router.ledger.database import Database
from router.ledger.feedback import Feedback, add_feedback
from router.ledger.schema import REQUESTS
from router.ledger.writer import Ledger
from router.openai_api.fields import read_fields, read_json
from router.openapi import Listing, described
from router.record import SHADOW, mirrored_request_id

_MAX_FEEDBACK_BYTES = 2**20
# Another replica may hold a row that is not written yet: for its flush interval, or longer where
# the machine is busy.
_FLUSH_S = 2.0
_LATER_TRIES_S = (0.25, 0.75, 2.0)


def add_feedback_route(
    api: FastAPI,
    ledger: Ledger,
    *,
    identify: Identify,
    bodies: Bodies,
    shadows: Sequence[str] = (),
    keep_text: bool = False,
) -> None:
    """Add `POST /v1/feedback`; labels also score the answers of `shadows`, by name.

    A label is text: it is kept with `keep_text` only, its score always.
    """

    async def feedback(request: Request) -> JSONResponse:
        key_id = await identify(request)
        rating = await bodies.take(request, read_feedback, key_id, _MAX_FEEDBACK_BYTES)
        taken = await take_feedback(
            ledger, rating, key_id=key_id, shadows=shadows, keep_text=keep_text
        )
        return JSONResponse(taken)

    extra = described(FeedbackTold, takes=FeedbackBody)
    api.add_api_route("/v1/feedback", feedback, methods=["POST"], openapi_extra=extra)


def add_experiment_routes(
    api: FastAPI, experiments: Experiments, mirror: Mirror, *, identify: Identify
) -> None:
    """Add `GET /v1/experiments`, `/v1/experiments/{name}` and `/v1/shadows`."""

    async def every(request: Request) -> JSONResponse:
        await identify(request)
        data = [summary.to_json() for summary in await experiments.summaries()]
        return JSONResponse({"object": "list", "data": data})

    async def one(request: Request, name: str) -> JSONResponse:
        await identify(request)
        summary = await experiments.summary(name)
        if summary is None:
            known = ", ".join(e.name for e in experiments.definitions) or "none"
            raise ApiError(
                404,
                f"There is no experiment {name!r}; configured: {known}.",
                param="name",
                code="experiment_not_found",
            )
        return JSONResponse(summary.to_json())

    async def shadows(request: Request) -> JSONResponse:
        await identify(request)
        data = await experiments.database.reports.run(
            shadow_report, experiments.database, mirror.shadows, now_s=time.time()
        )
        return JSONResponse({"object": "list", "data": data})

    for path, answer, answers in (
        ("/v1/experiments", every, ExperimentList),
        ("/v1/experiments/{name}", one, ExperimentFacts),
        ("/v1/shadows", shadows, ShadowList),
    ):
        api.add_api_route(path, answer, methods=["GET"], openapi_extra=described(answers))


MetricName = Annotated[str, Field(pattern=f"^{METRIC_NAME.pattern}$")]
# Squares of such numbers, and sums of these, are finite.
MetricValue = Annotated[float, Field(ge=-1e100, le=1e100, allow_inf_nan=False)]


class FeedbackBody(BaseModel):
    """At most one of thumb, score and label, and `metrics`, about the response `id`.

    `score` is in [0, 1]; `label` is the right answer: the score is then 1 if the answer equals it
    but for case, spacing and closing marks, else 0. `metrics` are numbers by names of one's own,
    which experiments compare.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str = Field(min_length=1, max_length=256)
    thumb: Literal["up", "down"] | None = None
    score: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    label: str | None = Field(None, max_length=65_536)
    metrics: dict[MetricName, MetricValue] = Field(default_factory=dict, max_length=50)

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = sum(part is not None for part in (self.thumb, self.score, self.label))
        if given > 1 or (not given and not self.metrics):
            raise ValueError("give exactly one of thumb, score and label, or metrics")
        return self


class FeedbackTold(BaseModel):
    """What is now known of a response."""

    object: Literal["feedback"]
    id: str
    score: float | None


@dataclass(frozen=True, kw_only=True)
class SampleRatioFacts:
    """Units seen and expected per arm, and whether they differ by more than chance."""

    arms: list[str]
    observed: list[int]
    expected: list[float]
    p: float
    alarm: bool


@dataclass(frozen=True, kw_only=True)
class ExperimentFacts(Report):
    """An experiment's report, and where it stands."""

    object: Literal["experiment"]
    status: Status
    started_s: float | None
    weights: dict[str, float] | None
    stopped: dict[str, dict[str, Any]]
    judging_usd: float
    sample_ratio: SampleRatioFacts  # type: ignore[assignment] # as told


@dataclass(frozen=True, kw_only=True)
class ExperimentList:
    """All configured experiments."""

    object: Literal["list"]
    data: list[ExperimentFacts]


class ShadowFacts(BaseModel):
    """What one shadow found, over all its rows; a judge's `quality` are its grades."""

    object: Literal["shadow"]
    name: str
    policy: str | None
    judge: str | None
    usd_per_day: float
    num_mirrored: int
    answered: float | None
    usd: float
    usd_today: float
    latency_s: float | None
    agreement: float | None
    quality: float | None
    served_quality: float | None
    num_labelled: int | None


class ShadowList(Listing):
    """All configured shadows."""

    data: list[ShadowFacts]


def read_feedback(body: bytes) -> FeedbackBody:
    """Read a request's body; raises `ApiError` 400 that names the field."""
    return read_fields(FeedbackBody, read_json(body), {})


async def take_feedback(
    ledger: Ledger,
    feedback: FeedbackBody,
    *,
    key_id: str | None,
    shadows: Sequence[str] = (),
    keep_text: bool = False,
) -> dict[str, Any]:
    """Keep `feedback` and return what is now known; the same again changes nothing.

    A label also scores what the `shadows`, by name, answered to the same request. Only the key
    that asked may rate. Raises `ApiError` 404 where nobody got such a response (or another key
    did), 409 where the request got no answer.
    """
    row = await _find(ledger, feedback.id)
    if row is None or row["endpoint"] == SHADOW or row["key_id"] not in (None, key_id):
        raise ApiError(
            404,
            f"There is no response {feedback.id!r}; give the id of a response, as in its body.",
            param="id",
            code="response_not_found",
        )
    if row["status"] >= 400:
        raise ApiError(
            409, f"The request {feedback.id!r} got no answer.", param="id", code="not_answered"
        )
    score = _score(feedback, feedback.id, row["answer_digest"])
    kept = Feedback(
        request_id=feedback.id,
        time_s=time.time(),
        score=score,
        label=feedback.label if keep_text else None,
        metrics=feedback.metrics or None,
        key_id=key_id,
    )
    calls = ledger.database.calls
    await calls.run(add_feedback, ledger.database, kept)
    if feedback.label is not None:
        for shadow in shadows:
            mirrored_id = mirrored_request_id(shadow, feedback.id)
            mirrored = await calls.run(_row, ledger.database, mirrored_id)
            if mirrored is not None and mirrored["status"] < 400:
                right = _score(feedback, feedback.id, mirrored["answer_digest"])
                await calls.run(
                    add_feedback,
                    ledger.database,
                    replace(kept, request_id=mirrored_id, score=right, metrics=None, key_id=None),
                )
    return {"object": "feedback", "id": feedback.id, "score": score}


def _score(feedback: FeedbackBody, request_id: str, digest: str | None) -> float | None:
    if feedback.thumb is not None:
        return float(feedback.thumb == "up")
    if feedback.score is not None:
        return feedback.score
    if feedback.label is None:
        return None
    return float(answer_digest(request_id, feedback.label) == digest)


async def _find(ledger: Ledger, request_id: str) -> dict[str, Any] | None:
    row = await ledger.database.calls.run(_row, ledger.database, request_id)
    if row is None:
        await ledger.flush(within_s=_FLUSH_S)
        row = await ledger.database.calls.run(_row, ledger.database, request_id)
    for wait_s in _LATER_TRIES_S:
        if row is not None:
            break
        await asyncio.sleep(wait_s)
        row = await ledger.database.calls.run(_row, ledger.database, request_id)
    return row


def _row(database: Database, request_id: str) -> dict[str, Any] | None:
    columns = (REQUESTS.c.status, REQUESTS.c.endpoint, REQUESTS.c.key_id, REQUESTS.c.answer_digest)
    return database.row(sa.select(*columns).where(REQUESTS.c.request_id == request_id))
