"""The tables, as queries see them. `migrations` creates them; a test holds the two together."""

from __future__ import annotations

import sqlalchemy as sa

METADATA = sa.MetaData()


def _json(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.JSON(none_as_null=True))


REQUESTS = sa.Table(
    "requests",
    METADATA,
    sa.Column("request_id", sa.Text, primary_key=True),
    sa.Column("time_s", sa.Double, nullable=False),
    sa.Column("endpoint", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("policy", sa.Text),
    sa.Column("answered_by", sa.Text),  # the members that ran, sorted, joined by "+"
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("error", sa.Text),
    sa.Column("stream", sa.Boolean, nullable=False),
    sa.Column("latency_s", sa.Double, nullable=False),
    sa.Column("ttft_s", sa.Double),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("output_tokens", sa.BigInteger, nullable=False),
    sa.Column("num_choices", sa.Integer, nullable=False),
    sa.Column("usd", sa.Double, nullable=False),
    sa.Column("wh", sa.Double, nullable=False),
    sa.Column("gco2e", sa.Double, nullable=False),
    sa.Column("energy_method", sa.Text),  # of wh and gco2e, several joined by "+"
    sa.Column("key_id", sa.Text),
    sa.Column("user_hash", sa.Text),
    sa.Column("session", sa.Text),
    sa.Column("experiment", sa.Text),
    sa.Column("arm", sa.Text),
    sa.Column("unit", sa.Text),
    sa.Column("client_request_id", sa.Text, nullable=False),
    sa.Column("propensity", sa.Double),
    sa.Column("expected_quality", sa.Double),
    sa.Column("answer_digest", sa.Text),
    _json("plan"),
    _json("members"),
    _json("costs"),
    _json("scores"),
    _json("stages"),
    sa.Column("query_text", sa.Text),
    sa.Column("answer_text", sa.Text),
)

FEEDBACK = sa.Table(
    "feedback",
    METADATA,
    sa.Column("request_id", sa.Text, primary_key=True),
    sa.Column("time_s", sa.Double, nullable=False),
    sa.Column("score", sa.Double),
    sa.Column("label", sa.Text),
    sa.Column("key_id", sa.Text),
)

# One row per experiment that ever ran: what must not change, and what did.
EXPERIMENTS = sa.Table(
    "experiments",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("fingerprint", sa.Text, nullable=False),
    sa.Column("started_s", sa.Double, nullable=False),
    sa.Column("checked_s", sa.Double, nullable=False),
    _json("allocations"),
    _json("stopped"),
)

# What `GET /metrics` shows for all replicas together: sums per series, and published gauges.
METRIC_COUNTERS = sa.Table(
    "metric_counters",
    METADATA,
    sa.Column("series", sa.Text, primary_key=True),
    sa.Column("value", sa.Double, nullable=False),
)
METRIC_SNAPSHOTS = sa.Table(
    "metric_snapshots",
    METADATA,
    sa.Column("holder", sa.Text, primary_key=True),
    sa.Column("time_s", sa.Double, nullable=False),
    sa.Column("gauges", sa.Text, nullable=False),
)

API_KEYS = sa.Table(
    "api_keys",
    METADATA,
    sa.Column("key_id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    sa.Column("prefix", sa.Text, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False, unique=True),
    sa.Column("scope", sa.Text, nullable=False),
    _json("caps"),
    sa.Column("created_s", sa.Double, nullable=False),
    sa.Column("revoked_s", sa.Double),
)

# Amounts of budgets are integers (money, energy and carbon in billionths), so that sums are exact.
BUDGET_WINDOWS = sa.Table(
    "budget_windows",
    METADATA,
    sa.Column("window_id", sa.Text, primary_key=True),
    sa.Column("end_s", sa.BigInteger, nullable=False),
    *(
        sa.Column(f"{state}_{resource}", sa.BigInteger, nullable=False)
        for state in ("spent", "held", "estimated")
        for resource in ("requests", "tokens", "nano_usd", "nano_wh", "nano_gco2e")
    ),
)

BUDGET_HOLDS = sa.Table(
    "budget_holds",
    METADATA,
    sa.Column("request_id", sa.Text, primary_key=True),
    sa.Column("holder", sa.Text, nullable=False),
    sa.Column("expires_s", sa.Double, nullable=False),
    sa.Column("lapsed", sa.Boolean, nullable=False),
    _json("windows"),
    *(
        sa.Column(resource, sa.BigInteger, nullable=False)
        for resource in ("requests", "tokens", "nano_usd", "nano_wh", "nano_gco2e")
    ),
)
