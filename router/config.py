"""The application's arguments: what `shoal serve --config` reads and `router.app:build` takes."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from models.pool import DEFAULT_POOL
from models.spec import DeploymentSpec, Name
from policies.carbon.economics import EconomicsSettings
from policies.carbon.settings import CarbonSettings
from policies.kinds import Count, Strict, explain, load_yaml
from policies.plan import PlanBounds
from router.access.authentication import AuthConfig
from router.access.limits import BudgetsConfig
from router.dashboard.routes import LOOPBACK, DashboardConfig
from router.ledger.database import LedgerConfig
from router.logs import LogsConfig


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the file and the key."""


class ServingLimits(Strict):
    """Bounds on one request.

    A body has at most `max_body_bytes`, unpacked, and `max_body_values` lists, objects, commas and
    strings, which count as five each: while they are parsed all other requests wait. It arrives
    within `body_timeout_s`, or the request is ended. All bodies on their way to a replica, uploads
    too, take at most `max_arriving_mb` megabytes together, and those of one key or address half of
    what others leave. `default_max_tokens` is the most an answer takes where the client names no
    limit (never more than the context has room for). `request_timeout_s` ends a request, and is the
    most a client may ask for; `stage_timeout_s` ends a stage of a cascade, the last one excepted,
    so that the next one can run. A stream that has nothing to send for `first_comment_s` begins
    nonetheless, with a comment that clients skip, and sends another every `comment_interval_s`, so
    that no proxy cuts it: errors that come later stand in the stream. `plans` bounds how large a
    plan a client may send, and how many lanes any plan may take.
    """

    max_body_bytes: Count = 4 * 2**20
    max_body_values: Count = 250_000
    body_timeout_s: float = Field(60, gt=0, le=86_400)
    max_arriving_mb: float = Field(512, ge=1, le=1e6)
    first_comment_s: float = Field(1, gt=0, le=86_400)
    comment_interval_s: float = Field(10, gt=0, le=86_400)
    default_max_tokens: Count = 1024
    request_timeout_s: float = Field(600, gt=0, le=86_400)
    stage_timeout_s: float = Field(60, gt=0, le=86_400)
    plans: PlanBounds = Field(default_factory=PlanBounds)

    @property
    def max_arriving_bytes(self) -> int:
        """The most that all bodies on their way may take."""
        return int(self.max_arriving_mb * 1e6)


class HttpConfig(Strict):
    """How connections are kept, and which web pages may ask.

    An idle connection is closed after `keep_alive_s`: longer than the pools of clients and proxies
    keep theirs. Pages of `cors_origins` ("https://chat.example.org"; "*" for all; "loopback" for
    those that this machine itself serves, at any port) may ask and read answers. `shoal serve`
    takes "loopback" where it listens on loopback only and the file does not say; else none may.
    Administrators may load adapters from the folders `adapter_roots` and those below, by default
    from none.
    """

    keep_alive_s: Count = 75
    cors_origins: tuple[str, ...] = ()
    adapter_roots: tuple[Path, ...] = ()

    @field_validator("adapter_roots")
    @classmethod
    def _check_roots(cls, roots: tuple[Path, ...]) -> tuple[Path, ...]:
        for root in roots:
            if not root.is_absolute():
                raise ValueError(f"{str(root)!r} is not allowed; an absolute path is")
        return roots

    def listening_on(self, host: str) -> HttpConfig:
        """Return what holds for a server that listens on `host` and nowhere else."""
        if "cors_origins" in self.model_fields_set or host not in LOOPBACK:
            return self
        return self.model_copy(update={"cors_origins": ("loopback",)})


class ResponsesConfig(Strict):
    """Which responses of `/v1/responses` are kept, for who asks for them again or goes on.

    `store` is "never", "if_asked" (those whose request says `store: true`) or "unless_refused" (all
    but those whose request says false, as OpenAI has it). With the answers the conversations are
    kept that they belong to, for `keep_days`, and at most `max_gb` of them: then the oldest go.
    """

    store: Literal["never", "if_asked", "unless_refused"] = "never"
    keep_days: float = Field(30, gt=0, le=3650)
    max_gb: float = Field(1, gt=0)


class BatchesConfig(Strict):
    """Offline work over files, which the ledger's database holds.

    A file has at most `max_file_mb` megabytes and `max_requests` lines; all of them are kept for
    `keep_days`, and no more are taken once they take `max_gb` together. A replica works on
    `concurrency` lines at once while nobody waits for an answer, else on one. With `wait_for` a
    batch waits for hours that are better by "carbon" (as `carbon.grid_file` announces them) or by
    "price" (`tariff_file`: a CSV with the columns hour,usd_per_kwh or time,usd_per_kwh, from the
    pool's folder on), as long as it will be done in time.
    """

    max_file_mb: float = Field(100, gt=0)
    max_requests: Count = 50_000
    max_gb: float = Field(2, gt=0)
    keep_days: float = Field(30, gt=0, le=3650)
    concurrency: int = Field(8, ge=1, le=1024)
    wait_for: Literal["carbon", "price"] | None = None
    tariff_file: Path | None = None

    @model_validator(mode="after")
    def _tariff_is_there(self) -> BatchesConfig:
        if (self.wait_for == "price") != (self.tariff_file is not None):
            raise ValueError("wait_for: price and tariff_file go together")
        return self


class TracingConfig(Strict):
    """Where traces go: to an OTLP collector that takes HTTP, as http://localhost:4318/v1/traces.

    `sample_ratio` of the traces that begin here are kept; one that a client began is kept if the
    client keeps it.
    """

    endpoint: str = Field(pattern=r"^https?://")
    service_name: str = "shoal"
    sample_ratio: float = Field(1.0, ge=0, le=1)


# The sections that a running server takes up anew.
RELOADED = ("policies", "limits", "budgets")


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """Where arguments come from: a file with this `content`, and what was named beside it."""

    file: Path | None
    content: Mapping[str, Any]
    overrides: Mapping[str, object]


class AppArgs(Strict):
    """Everything the application needs to know.

    `pool` is a pool.yaml or its folder (default: the pool that comes with Shoal). `policies` adds
    to the pool's policies or replaces them by name; paths in them are relative to the pool's
    folder. `http` is about connections and browsers, `responses` about those that are kept,
    `batches` about offline work. `ingress` says how many replicas take HTTP requests. `num_threads`
    is the number of CPU threads of each engine replica whose options name none (default: all cores
    of the machine). `ledger` is the database of rows, keys and budgets. `carbon` says what hardware
    runs the models and on which grid; a relative `grid_file` starts at the pool's folder.
    `economics` says what that hardware costs (null: prices are those typed in the pool file).
    `logs` and `tracing` (null: off) say what the server tells of its requests while it runs.
    `dashboard` says who may see the built-in page, the metrics and the reports. `hosts` are the
    names by which clients address the server; others are refused (null: none is). `experiments` and
    `shadows` are read by `router.experiments`, which knows the policies they may name.
    """

    pool: Path = DEFAULT_POOL
    policies: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    limits: ServingLimits = Field(default_factory=ServingLimits)
    http: HttpConfig = Field(default_factory=HttpConfig)
    responses: ResponsesConfig = Field(default_factory=ResponsesConfig)
    batches: BatchesConfig = Field(default_factory=BatchesConfig)
    ingress: DeploymentSpec = Field(default_factory=DeploymentSpec)
    num_threads: int | None = Field(None, ge=1)
    ledger: LedgerConfig = Field(default_factory=LedgerConfig)
    auth: AuthConfig = Field(default_factory=AuthConfig)
    budgets: BudgetsConfig = Field(default_factory=BudgetsConfig)
    carbon: CarbonSettings = Field(default_factory=CarbonSettings)
    economics: EconomicsSettings | None = None
    dashboard: DashboardConfig = Field(default_factory=DashboardConfig)
    logs: LogsConfig = Field(default_factory=LogsConfig)
    tracing: TracingConfig | None = None
    experiments: dict[Name, Any] = Field(default_factory=dict)
    shadows: dict[Name, Any] = Field(default_factory=dict)
    hosts: tuple[str, ...] | None = None

    _origin: _Origin | None = PrivateAttr(None)
    _server: str = PrivateAttr("")

    @model_validator(mode="after")
    def _what_is_needed_is_there(self) -> AppArgs:
        if self.carbon.idle == "capacity" and self.economics is None:
            raise ValueError(
                'carbon.idle: "capacity" needs economics.utilisation; allowed without are '
                '"excluded" and "busy_time"'
            )
        if self.batches.wait_for == "carbon" and self.carbon.grid_file is None:
            raise ValueError(
                "batches.wait_for: carbon needs carbon.grid_file: nothing else announces hours"
            )
        return self

    @property
    def metering(self) -> CarbonSettings:
        """`carbon` as engines measure by it: a price from hardware needs the seconds at least."""
        if self.economics is None or self.carbon.meter != "auto":
            return self.carbon
        return self.carbon.model_copy(update={"meter": "always"})

    @property
    def server(self) -> str:
        """Names one start of one server, whose replicas share it; empty before `started`."""
        return self._server

    def started(self) -> AppArgs:
        """Return the arguments of a server that starts with them now."""
        if self._server:
            return self
        args = self.model_copy()
        args._server = secrets.token_hex(8)
        return args

    def read_again(self) -> AppArgs:
        """Return these arguments with what their file says now in the sections of `RELOADED`.

        Raises `ConfigError` for a file that cannot be used, and for any other change in it.
        """
        if self._origin is None or self._origin.file is None:
            return self
        origin, file = self._origin, self._origin.file
        fresh = load_args(file, **origin.overrides)
        assert fresh._origin is not None
        before, after = origin.content, fresh._origin.content
        for name in {**before, **after}:
            if name not in RELOADED and before.get(name) != after.get(name):
                raise ConfigError(
                    f"{file}: {name} cannot change while the server runs: start it again, or put "
                    f"it back; a reload takes {', '.join(RELOADED)}"
                )
        if fresh.budgets.lease_s != self.budgets.lease_s:
            raise ConfigError(f"{file}: budgets.lease_s cannot change while the server runs")
        return self.model_copy(update={name: getattr(fresh, name) for name in RELOADED})

    def with_sections(self, sections: Mapping[str, Any]) -> AppArgs:
        """Return these arguments with the `sections` of `RELOADED`, which are JSON."""
        read = AppArgs.model_validate(sections)
        return self.model_copy(update={name: getattr(read, name) for name in RELOADED})

    def listening_on(self, host: str) -> AppArgs:
        """Return what holds for a server that listens on `host` and nowhere else.

        Where nobody needs a key, pages that a person's browser loads from elsewhere must not reach
        a server on loopback by a name of their own.
        """
        hosts = self.hosts
        behind_proxy = self.auth.required or self.dashboard.access == "anyone"
        if hosts is None and host in LOOPBACK and not behind_proxy:
            hosts = tuple(sorted(LOOPBACK))
        dashboard, http = self.dashboard.listening_on(host), self.http.listening_on(host)
        return self.model_copy(update={"dashboard": dashboard, "http": http, "hosts": hosts})


def load_args(file: Path | None, **overrides: object) -> AppArgs:
    """Read arguments from a YAML file, if there is one; `overrides` that are not None win.

    A relative `pool` in the file is relative to the file. Raises `ConfigError`.
    """
    data: dict[str, Any] = {}
    if file is not None:
        file = file.absolute()
        try:
            content = load_yaml(file.read_text())
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not valid YAML: {error}") from None
        if not isinstance(content, dict | None):
            raise ConfigError(f"{file} does not hold a mapping of keys to values")
        data = dict(content or {})
        if isinstance(data.get("pool"), str):
            data["pool"] = file.parent / data["pool"]
    origin = _Origin(file=file, content=dict(data), overrides=overrides)
    data.update({key: value for key, value in overrides.items() if value is not None})
    try:
        args = AppArgs.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{file or 'arguments'}: {explain(error)}") from None
    args._origin = origin
    return args
