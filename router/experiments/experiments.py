"""The experiments of one server process: arms for requests, and what changes while they run.

They and the shadows are read from the configuration and checked against the pool's policies.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy.exc import SQLAlchemyError

from models.pool import Pool, load_pool
from policies.base import Query
from policies.errors import ExperimentError
from policies.experiments.assignment import Assigner, Visit, adaptive_weights
from policies.experiments.experiment import Experiment
from policies.experiments.read import read_experiments
from policies.experiments.shadow import Shadow, read_shadows
from policies.files import content_sha256
from router.catalog.catalog import Catalog
from router.catalog.policies import DEFAULT_POLICY
from router.config import AppArgs
from router.exchange import Exchange
from router.experiments import store
from router.experiments.reporting import Summary, summarise
from router.ledger.database import Database
from router.openai_api.endpoint import Ask

logger = logging.getLogger(__name__)

# A replica learns of stopped arms and new weights after at most this.
_POLL_S = 2.0
# Guardrails and adaptive weights are looked at this often, but for at most 5% of the time.
_CHECK_S = 10.0
_CHECK_SHARE = 0.05
_CACHE_S = 1.0


class Experiments:
    """Puts requests into arms, reports, and acts on guardrails and adaptive weights.

    `clock` is Unix time. Every replica has one; the ledger's database keeps them together.
    """

    def __init__(
        self,
        definitions: Sequence[Experiment],
        *,
        args: AppArgs,
        pool: Pool,
        catalog: Catalog,
        database: Database,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Start or take up each experiment; blocks.

        Raises `ExperimentError` for one that changed while it has data.
        """
        self.definitions = tuple(definitions)
        self.catalog = catalog
        self.database = database
        self._clock = clock
        self._rng = np.random.default_rng()
        contents = policy_contents(args, pool)
        self._states = {
            experiment.name: store.register(
                database,
                experiment,
                fingerprint=experiment.fingerprint(contents),
                now_s=clock(),
            )
            for experiment in self.definitions
        }
        self._assigner = self._new_assigner()
        self._by_session = any(e.unit == "session" for e in self.definitions)
        self._by_domain = any(e.target.domains for e in self.definitions)
        self._expecting = {e.name for e in self.definitions if "expected_quality" in e.covariates}
        self._by_language = {e.name for e in self.definitions if "language" in e.segments}
        self._language = load_language_of() if self._by_language else None
        self._summaries: dict[str, tuple[float, Summary]] = {}
        self._summarising = asyncio.Lock()

    def place(self, exchange: Exchange, ask: Ask, query: Query) -> str | None:
        """Put the request into an arm, noted in `exchange`; return the policy that answers it.

        None where no experiment takes it. Costs a few microseconds, plus the default policy's
        decision where an experiment targets domains or uses its prediction as a covariate, and
        what it takes to tell the language where it compares languages.
        """
        if not self.definitions:
            return None
        visit = Visit(
            request_id=exchange.id,
            model=ask.model,
            user=query.user,
            session=query.session or (conversation(ask) if self._by_session else None),
            key_id=query.key_id,
            domain=self._domain(query) if self._by_domain else None,
        )
        enrolment = self._assigner.assign(visit, now_s=exchange.record.time_s)
        if enrolment is None:
            return None
        if enrolment.arm is not None:
            record = exchange.record
            record.experiment, record.arm = enrolment.experiment, enrolment.arm
            record.unit, record.propensity = enrolment.unit, enrolment.propensity
            if enrolment.experiment in self._expecting:
                scores = self.catalog.policies.default.predict(query)
                record.expected_quality = max(scores.values(), default=None)
            if self._language is not None and enrolment.experiment in self._by_language:
                record.language = self._language(query.text)
        return enrolment.policy

    async def summary(self, name: str) -> Summary | None:
        """Return the report on the experiment `name`, at most a second old; None if unknown."""
        experiment = next((e for e in self.definitions if e.name == name), None)
        if experiment is None:
            return None
        async with self._summarising:
            made_s, cached = self._summaries.get(name, (-1.0, None))
            if cached is not None and self._clock() - made_s < _CACHE_S:
                return cached
            found = await self.database.reports.run(
                summarise, self.database, experiment, now_s=self._clock()
            )
            self._summaries[name] = (self._clock(), found)
            return found

    async def summaries(self) -> list[Summary]:
        """Return the report on every experiment."""
        found = [await self.summary(experiment.name) for experiment in self.definitions]
        return [summary for summary in found if summary is not None]

    async def check(self, experiment: Experiment) -> None:
        """Stop arms that breach a guardrail, and move adaptive weights, by what is there now."""
        self._summaries.pop(experiment.name, None)
        summary = await self.summary(experiment.name)
        if summary is None or summary.state is None:
            return
        name, now_s = experiment.name, self._clock()
        for found in summary.report.guardrails:
            if found.breached and found.treatment not in summary.state.stopped:
                logger.warning(
                    "experiment %s: arm %s is stopped: %s is worse by at least %.4g, allowed %.4g",
                    name, found.treatment, found.metric, found.harm_low, found.limit,
                )  # fmt: skip
                reason = {
                    "metric": found.metric,
                    "harm_low": found.harm_low,
                    "limit": found.limit,
                }
                await self.database.reports.run(
                    store.stop_arm, self.database, name, found.treatment,
                    reason=reason, now_s=now_s,
                )  # fmt: skip
        if experiment.allocation.kind != "fixed":
            metric = experiment.primary.metric
            means = {
                arm.name: arm.means[metric] for arm in summary.report.arms if metric in arm.means
            }
            weights = adaptive_weights(experiment, means, rng=self._rng)
            await self.database.reports.run(
                store.move_weights, self.database, name, weights, now_s=now_s
            )
        self._summaries.pop(name, None)
        await self.reload()

    async def reload(self) -> None:
        """Take over what this or another replica changed."""
        states = await self.database.reports.run(self._load)
        if states != self._states:
            self._states = states
            self._assigner = self._new_assigner()

    async def run(self) -> None:
        """Watch until cancelled; an experiment needs somebody who does."""
        checked = dict.fromkeys((e.name for e in self.definitions), 0.0)
        while self.definitions:
            await asyncio.sleep(_POLL_S)
            try:
                await self.reload()
                for experiment in self.definitions:
                    if self._idle(experiment) or self._clock() < checked[experiment.name]:
                        continue
                    began_s = time.monotonic()
                    if await self.database.reports.run(
                        store.claim_check, self.database, experiment.name,
                        now_s=self._clock(), interval_s=_CHECK_S,
                    ):  # fmt: skip
                        await self.check(experiment)
                    pause_s = (time.monotonic() - began_s) / _CHECK_SHARE
                    checked[experiment.name] = self._clock() + pause_s
            except SQLAlchemyError as error:
                # The database may be away for a while; assignment goes on with what is known.
                logger.warning("experiments: cannot check now: %s", error)

    def _idle(self, experiment: Experiment) -> bool:
        """Whether there is nothing to act on: no guardrails, fixed weights, or not its time."""
        acts = experiment.guardrails or experiment.allocation.kind != "fixed"
        return not acts or not experiment.start_s <= self._clock() < experiment.stop_s

    def _load(self) -> dict[str, store.State]:
        found = {e.name: store.load(self.database, e.name) for e in self.definitions}
        return {
            name: self._states[name] if state is None else state for name, state in found.items()
        }

    def _new_assigner(self) -> Assigner:
        return Assigner(
            self.definitions,
            weights={name: state.weights for name, state in self._states.items()},
            stopped={name: tuple(state.stopped) for name, state in self._states.items()},
        )

    def _domain(self, query: Query) -> str | None:
        """Return the first domain of the model that the default policy thinks best."""
        scores = self.catalog.policies.default.predict(query)
        if not scores:
            return None
        best = max(scores, key=lambda name: scores[name])
        return next(iter(self.catalog.prices.facts[best].domains), None)


def conversation(ask: Ask) -> str | None:
    """Return a name for the conversation, for clients that give none: a hash of how it began.

    Chat clients send the whole conversation every time, so all of its turns begin alike.
    """
    messages = ask.prompts[0].messages
    if messages is None:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for message in messages:
        digest.update(f"{message['role']}\x1f{message['content']}\x1e".encode())
        if message["role"] == "user":
            return digest.hexdigest()
    return None


# A language shows in so many characters as well as in more.
_MOST_CHARACTERS = 500


def load_language_of() -> Callable[[str], str | None]:
    """Return what tells a text's language (ISO 639-1); None where it has no letters.

    py3langid (Lui & Baldwin 2012): byte n-grams, 97 languages. Raises `ExperimentError` without it.
    """
    try:
        classify = import_module("py3langid").classify
    except ImportError:
        raise ExperimentError(
            "experiments: segments by language need the package py3langid: "
            "pip install 'shoal[language]'"
        ) from None
    classify("")  # its model is read now, not at the first request

    def language_of(text: str) -> str | None:
        begin = text[:_MOST_CHARACTERS]
        return str(classify(begin)[0]) if any(map(str.isalpha, begin)) else None

    return language_of


def read_definitions(
    args: AppArgs, pool: Pool | None = None
) -> tuple[tuple[Experiment, ...], tuple[Shadow, ...]]:
    """Return the configured experiments and shadows, of `pool` or of what its file says.

    Raises `ExperimentError`, also for a policy, model or judge that nobody has.
    """
    pool = pool or load_pool(args.pool)
    names = policy_specs(args, pool)
    shadows = read_shadows(
        args.shadows, policies=names, models={model.name for model in pool.models}
    )
    judges = [shadow.name for shadow in shadows if shadow.judge is not None]
    experiments = read_experiments(args.experiments, policies=names)
    models = {model.name: model.spec.domains for model in pool.models}
    served = (DEFAULT_POLICY, *(f"policy/{name}" for name in names), *models)
    domains = tuple(dict.fromkeys(domain for known in models.values() for domain in known))
    for experiment in experiments:
        target = experiment.target
        for key, wanted, known in (
            ("models", target.models, served),
            ("domains", target.domains, domains),
        ):
            for name in set(wanted) - set(known):
                raise ExperimentError(
                    f"experiments.{experiment.name}.target.{key}: {name!r} is unknown; "
                    f"allowed are {', '.join(known)}"
                )
        if experiment.judge not in (None, *judges):
            raise ExperimentError(
                f"experiments.{experiment.name}.judge: {experiment.judge!r} is no shadow with a "
                f"judge; allowed are {', '.join(judges) or '-'}"
            )
    return experiments, shadows


def policy_specs(args: AppArgs, pool: Pool) -> Mapping[str, Mapping[str, Any]]:
    """Return every policy's specification by name; the default one exists without any."""
    return {DEFAULT_POLICY: {}, **pool.policies, **args.policies}


def policy_contents(args: AppArgs, pool: Pool) -> dict[str, str]:
    """Return a description of each policy that changes when its settings or files change."""
    return {
        name: json.dumps(spec, sort_keys=True, default=str) + _files_sha256(spec, pool.folder)
        for name, spec in policy_specs(args, pool).items()
    }


def _files_sha256(spec: Mapping[str, Any], folder: Path) -> str:
    """Hash the files and folders that `spec` names, and those that what it wraps names."""
    named = [_content(value, folder) for value in spec.values()]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def _content(value: object, folder: Path) -> str | None:
    if isinstance(value, Mapping):
        return _files_sha256(value, folder)
    return content_sha256(folder / value) if isinstance(value, str) else None
