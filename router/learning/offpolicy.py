"""What a lesson's router would have earned on an experiment's traffic, told from the ledger.

Its arms answered with known probabilities, so the estimate is off-policy (see `replay` of
experiments), and needs nobody's other answers. Requests whose question the router was trained on
are left out: it would look better than it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from models.pool import Pool
from policies.errors import ExperimentError
from policies.experiments.replay import ReplayedPolicy, replay_log
from policies.routing.router import load_router
from router.catalog.policies import DEFAULT_POLICY
from router.config import AppArgs
from router.editions import catalog_of
from router.experiments.experiments import read_definitions
from router.experiments.reporting import read_log
from router.learning.learn import Lesson
from router.ledger.database import Database


def off_policy(lesson: Lesson, pool: Pool, args: AppArgs, database: Database) -> Iterator[str]:
    """Yield a sentence per experiment of `args`, and per policy: the serving and the learned one.

    Raises `ExperimentError` or `PolicyError` where the configuration does not fit the pool.
    """
    with_lesson = replace(
        pool,
        policies={**{name: dict(spec) for name, spec in lesson.specs.items()}, **pool.policies},
    )
    catalog = catalog_of(args, with_lesson)
    router = load_router(pool.folder / str(lesson.specs[lesson.auto]["path"]))
    experiments, _ = read_definitions(args)
    for experiment in experiments:
        for name in (DEFAULT_POLICY, lesson.auto):
            told = f"By the log of the experiment {experiment.name}, {name}"
            try:
                log = read_log(database, experiment, catalog, target=name)
                seen_Q = router.has_seen([request.query.text for request in log])
                unseen = [one for one, seen in zip(log, seen_Q, strict=True) if not seen]
                policies = catalog.policies
                found = replay_log(unseen, policies[name], policies=policies)
            except ExperimentError as error:
                yield f"{told} cannot be judged: {error}."
            else:
                yield f"{told} would have scored {_cell(found)}."


def _cell(found: ReplayedPolicy) -> str:
    quality, off = found.quality, found.off_policy
    told = f"{quality.value:.3f} [{quality.low:.3f}, {quality.high:.3f}] (doubly robust"
    if off is not None:
        told += f"; IPS {off.ips.value:.3f}, SNIPS {off.snips.value:.3f}; "
        told += f"{off.num_requests:,} rated requests worth {off.num_effective:,.0f} of its own"
    return told + ")"
