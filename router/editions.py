"""What new requests are answered by, and how the next edition of it comes without a restart.

A reload reads the pool's policies and adapters and the configuration's `policies`, `limits` and
`budgets` anew, checks all of it, every plan included, and only then puts it in force: running
requests finish with the edition that they began with. Anything else that changed is refused by
name, and then nothing changes at all. Adapters also come and go one by one (`router.adapters`);
those that came so stay through a reload.

What is in force is a row in the ledger's database. The replica (or command) that was asked writes
it, the others look for it every second and take it from there, and so does a replica that starts
later. Policies' own files (routers, cascades, laws) are read where each replica runs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from models.pool import Pool, load_pool, with_adapters
from models.spec import Model, ModelSpec
from router.access.audit import note
from router.access.limits import Cap
from router.catalog.catalog import Catalog, load_catalog
from router.config import RELOADED, AppArgs, ConfigError
from router.experiments.experiments import Experiments, read_definitions
from router.ledger.database import Database, writing
from router.ledger.schema import EDITIONS

logger = logging.getLogger(__name__)

_POLL_S = 1.0

Change: TypeAlias = Callable[[dict[str, ModelSpec], Pool], None]
"""Changes the adapters of a pool, by name, in place. Raises `ValueError`."""


@dataclass(frozen=True, kw_only=True)
class Edition:
    """What a request is answered by from its beginning to its end.

    `number` counts from 1, the server's start; `loaded_s` is the Unix time at which it was put in
    force. `args` are the whole configuration. The adapters `loaded` are not the pool file's.
    """

    number: int
    loaded_s: float
    args: AppArgs
    catalog: Catalog
    loaded: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what people are told of it."""
        return {
            "object": "edition",
            "number": self.number,
            "loaded_s": self.loaded_s,
            "policies": list(self.catalog.policies),
        }


def catalog_of(args: AppArgs, pool: Pool, *, beside: Catalog | None = None) -> Catalog:
    """Return what can be asked of `pool` as configured; see `load_catalog`, whose errors it has.

    Raises `ConfigError` for engines in the configuration that the pool lacks.
    """
    engines = [engine.name for engine in pool.engines]
    for section in ("carbon", "economics"):
        for name in getattr(getattr(args, section), "engines", ()):
            if name not in engines:
                raise ConfigError(
                    f"{section}.engines: {name!r} is no engine of the pool; "
                    f"allowed are {', '.join(engines)}"
                )
    return load_catalog(
        pool,
        policies=args.policies,
        carbon=args.carbon,
        economics=args.economics,
        beside=beside,
    )


class Editions:
    """The edition in force in this process; it changes on one event loop.

    Those in `followers` are told of every new one, before the first request of it.
    """

    def __init__(self, first: Edition, database: Database) -> None:
        """Begin with `first`, or with what is in force already for this server; blocks."""
        self._database = database
        self.followers: list[Callable[[Edition], None]] = []
        self._reloading = asyncio.Lock()
        self._failed = 0
        self.current = first
        row = _latest(database, first.args.server, after=first.number)
        if row is not None:
            self.current = self._taken_up(row) or first

    def server_caps(self) -> tuple[Cap, ...]:
        """Return the caps of all requests together that hold now."""
        return self.current.args.budgets.server_caps()

    async def reload(self, *, actor: str | None = None) -> Edition:
        """Read the files anew, and put in force what they say.

        Raises `ValueError` where something in them cannot be used or cannot change.
        """
        return await self._next(next_edition, actor)

    async def change(self, change: Change, *, actor: str | None = None) -> Edition:
        """Put in force what is in force now, but with the adapters changed.

        Raises `ValueError` where an adapter cannot be used, or a policy needs one that is gone.
        """
        return await self._next(partial(_changed, change=change), actor)

    async def _next(
        self, make: Callable[[Edition, Database], Edition], actor: str | None
    ) -> Edition:
        async with self._reloading:
            checked = await asyncio.to_thread(make, self.current, self._database)
            edition = await asyncio.to_thread(publish, checked, self._database, actor=actor)
            self._put_in_force(edition)
            return edition

    async def run(self) -> None:
        """Take up what others put in force until cancelled."""
        while True:
            await asyncio.sleep(_POLL_S)
            try:
                await self.follow()
            except SQLAlchemyError:
                continue  # it is away; who needs it says so

    async def follow(self) -> None:
        """Take up the latest edition, if it is not this one; say once why it cannot be."""
        async with self._reloading:
            row = await self._database.calls.run(
                _latest, self._database, self.current.args.server, after=self.current.number
            )
            taken = None if row is None else await asyncio.to_thread(self._taken_up, row)
            if taken is not None:
                self._put_in_force(taken)

    def _taken_up(self, row: Mapping[str, Any]) -> Edition | None:
        """Return the edition of a row; None where this machine cannot have it, say."""
        try:
            return _from_row(row, self.current)
        except (ValueError, OSError) as error:
            if self._failed != row["number"]:
                logger.error(
                    "reload: edition %d cannot be taken up here, %d goes on: %s",
                    row["number"], self.current.number, error,
                )  # fmt: skip
            self._failed = row["number"]
            return None

    def _put_in_force(self, edition: Edition) -> None:
        for follower in self.followers:
            follower(edition)
        self.current = edition
        logger.warning("reload: edition %d is in force", edition.number)


def next_edition(current: Edition, database: Database) -> Edition:
    """Return what the files say now, checked completely; it has no number yet. Blocks.

    Raises `ValueError` (`ConfigError`, `PoolError`, `PolicyError`, `ExperimentError`) that names
    the file, the key, the value and what is allowed.
    """
    args, pool = current.args.read_again(), load_pool(current.args.pool)
    running = current.catalog.pool
    for what, old, new in (
        ("engines", running.engines, pool.engines),
        ("models", _without_adapters(running), _without_adapters(pool)),
    ):
        before = {one.name: one for one in old}
        after = {one.name: one for one in new}
        changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
        if changed:
            raise ConfigError(
                f"{pool.folder / 'pool.yaml'}: {what}.{changed[0]} cannot change while the server "
                "runs: start it again, or put it back; a reload takes policies, scorers and "
                "adapters"
            )
    adapters, loaded = _adapters_in_force(current, database)
    kept = {name: adapters[name] for name in loaded if name not in pool.adapters}
    if kept:
        pool = with_adapters(pool, [*pool.adapters.values(), *kept.values()])
    return _checked(args, pool, replace(current, loaded=tuple(kept)), database)


def publish(edition: Edition, database: Database, *, actor: str | None = None) -> Edition:
    """Put a checked `edition` in force for all replicas; return it with its number. Blocks."""
    server, pool = edition.args.server, edition.catalog.pool
    contents = {
        "args": edition.args.model_dump(mode="json", include=set(RELOADED)),
        "pool": {"policies": pool.policies, "scorers": pool.scorers},
        "adapters": [spec.model_dump(mode="json") for spec in pool.adapters.values()],
        "loaded": edition.loaded,
    }
    now_s = time.time()
    with writing(database) as connection:
        latest = sa.select(sa.func.max(EDITIONS.c.number)).where(EDITIONS.c.server == server)
        number = max(connection.scalar(latest) or 1, edition.number) + 1
        try:
            connection.execute(
                sa.insert(EDITIONS).values(
                    server=server, number=number, time_s=now_s, contents=contents
                )
            )
        except IntegrityError:
            raise ConfigError("another reload was quicker; try again") from None
        told = {"id": f"edition {number}", "pool": pool.name, **contents}
        note(connection, "reload", after=told, actor=actor)
    return replace(edition, number=number, loaded_s=now_s)


def _changed(current: Edition, database: Database, *, change: Change) -> Edition:
    row = _latest(database, current.args.server, after=current.number)
    if row is not None:  # another replica was quicker
        current = _from_row(row, current)
    pool, before = current.catalog.pool, current.catalog.pool.adapters
    adapters = dict(before)
    change(adapters, pool)
    new = [name for name, spec in adapters.items() if before.get(name) is not spec]
    loaded = dict.fromkeys(name for name in (*current.loaded, *new) if name in adapters)
    current = replace(current, loaded=tuple(loaded))
    return _checked(current.args, with_adapters(pool, list(adapters.values())), current, database)


def _adapters_in_force(
    current: Edition, database: Database
) -> tuple[dict[str, ModelSpec], Sequence[str]]:
    """Return the adapters of the latest edition, and the names of those that are no file's."""
    row = _latest(database, current.args.server, after=current.number)
    if row is None:
        return current.catalog.pool.adapters, current.loaded
    specs = map(ModelSpec.model_validate, row["contents"]["adapters"])
    return {spec.name: spec for spec in specs}, row["contents"]["loaded"]


def _without_adapters(pool: Pool) -> tuple[Model, ...]:
    return tuple(model for model in pool.models if model.adapter is None)


def _checked(args: AppArgs, pool: Pool, current: Edition, database: Database) -> Edition:
    catalog = catalog_of(args, pool, beside=current.catalog)
    definitions, _ = read_definitions(args, pool)
    # Refuses a policy that changed while an experiment has data of it.
    Experiments(definitions, args=args, pool=pool, catalog=catalog, database=database)
    return replace(current, args=args, catalog=catalog)


def _latest(database: Database, server: str, *, after: int) -> Mapping[str, Any] | None:
    query = (
        sa.select(EDITIONS)
        .where(EDITIONS.c.server == server, EDITIONS.c.number > after)
        .order_by(EDITIONS.c.number.desc())
        .limit(1)
    )
    return database.row(query)


def _from_row(row: Mapping[str, Any], current: Edition) -> Edition:
    """Return the edition that a row describes. Raises `ValueError` where it cannot be here."""
    args = current.args.with_sections(row["contents"]["args"])
    pool = replace(current.catalog.pool, **row["contents"]["pool"])
    adapters = [ModelSpec.model_validate(spec) for spec in row["contents"]["adapters"]]
    if adapters or pool.adapters:
        pool = with_adapters(pool, adapters)
    catalog = catalog_of(args, pool, beside=current.catalog)
    return Edition(
        number=row["number"],
        loaded_s=row["time_s"],
        args=args,
        catalog=catalog,
        loaded=tuple(row["contents"]["loaded"]),
    )
