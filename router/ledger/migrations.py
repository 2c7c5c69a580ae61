"""The schema's versions. Each step is plain SQL that SQLite and PostgreSQL both understand.

A released step never changes; a new version appends one. `migrate` runs inside the caller's
exclusive transaction, so a step happens wholly or not at all, and once, however many replicas
start together.
"""

from __future__ import annotations

import time

import sqlalchemy as sa

from router.ledger.errors import LedgerError

STEPS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE requests (
            request_id TEXT PRIMARY KEY,
            time_s DOUBLE PRECISION NOT NULL,
            endpoint TEXT NOT NULL,
            model TEXT NOT NULL,
            policy TEXT,
            answered_by TEXT,
            status INTEGER NOT NULL,
            error TEXT,
            stream BOOLEAN NOT NULL,
            latency_s DOUBLE PRECISION NOT NULL,
            ttft_s DOUBLE PRECISION,
            prompt_tokens BIGINT NOT NULL,
            output_tokens BIGINT NOT NULL,
            num_choices INTEGER NOT NULL,
            usd DOUBLE PRECISION NOT NULL,
            wh DOUBLE PRECISION NOT NULL,
            gco2e DOUBLE PRECISION NOT NULL,
            key_id TEXT,
            user_hash TEXT,
            session TEXT,
            experiment TEXT,
            arm TEXT,
            unit TEXT,
            client_request_id TEXT NOT NULL,
            propensity DOUBLE PRECISION,
            plan JSON,
            members JSON,
            scores JSON,
            stages JSON,
            query_text TEXT,
            answer_text TEXT
        )""",
        "CREATE INDEX requests_by_time ON requests (time_s)",
        "CREATE INDEX requests_by_key ON requests (key_id, time_s)",
        "CREATE INDEX requests_by_experiment ON requests (experiment, time_s)",
        """CREATE TABLE feedback (
            request_id TEXT PRIMARY KEY,
            time_s DOUBLE PRECISION NOT NULL,
            score DOUBLE PRECISION,
            label TEXT,
            key_id TEXT
        )""",
        """CREATE TABLE api_keys (
            key_id TEXT PRIMARY KEY,
            name TEXT NOT NULL UNIQUE,
            prefix TEXT NOT NULL,
            sha256 TEXT NOT NULL UNIQUE,
            scope TEXT NOT NULL,
            caps JSON,
            created_s DOUBLE PRECISION NOT NULL,
            revoked_s DOUBLE PRECISION
        )""",
        """CREATE TABLE budget_windows (
            window_id TEXT PRIMARY KEY,
            end_s BIGINT NOT NULL,
            spent_requests BIGINT NOT NULL,
            spent_tokens BIGINT NOT NULL,
            spent_nano_usd BIGINT NOT NULL,
            spent_nano_wh BIGINT NOT NULL,
            spent_nano_gco2e BIGINT NOT NULL,
            held_requests BIGINT NOT NULL,
            held_tokens BIGINT NOT NULL,
            held_nano_usd BIGINT NOT NULL,
            held_nano_wh BIGINT NOT NULL,
            held_nano_gco2e BIGINT NOT NULL,
            estimated_requests BIGINT NOT NULL,
            estimated_tokens BIGINT NOT NULL,
            estimated_nano_usd BIGINT NOT NULL,
            estimated_nano_wh BIGINT NOT NULL,
            estimated_nano_gco2e BIGINT NOT NULL
        )""",
        "CREATE INDEX budget_windows_by_end ON budget_windows (end_s)",
        """CREATE TABLE budget_holds (
            request_id TEXT PRIMARY KEY,
            holder TEXT NOT NULL,
            expires_s DOUBLE PRECISION NOT NULL,
            lapsed BOOLEAN NOT NULL,
            windows JSON,
            requests BIGINT NOT NULL,
            tokens BIGINT NOT NULL,
            nano_usd BIGINT NOT NULL,
            nano_wh BIGINT NOT NULL,
            nano_gco2e BIGINT NOT NULL
        )""",
        "CREATE INDEX budget_holds_by_expiry ON budget_holds (lapsed, expires_s)",
        "CREATE INDEX budget_holds_by_holder ON budget_holds (holder)",
    ),
    (
        "ALTER TABLE requests ADD COLUMN expected_quality DOUBLE PRECISION",
        "ALTER TABLE requests ADD COLUMN answer_digest TEXT",
        """CREATE TABLE experiments (
            name TEXT PRIMARY KEY,
            fingerprint TEXT NOT NULL,
            started_s DOUBLE PRECISION NOT NULL,
            checked_s DOUBLE PRECISION NOT NULL,
            allocations JSON,
            stopped JSON
        )""",
    ),
    (
        "ALTER TABLE requests ADD COLUMN costs JSON",
        "CREATE INDEX feedback_by_time ON feedback (time_s)",
        "CREATE TABLE metric_counters (series TEXT PRIMARY KEY, value DOUBLE PRECISION NOT NULL)",
        """CREATE TABLE metric_snapshots (
            holder TEXT PRIMARY KEY,
            time_s DOUBLE PRECISION NOT NULL,
            gauges TEXT NOT NULL
        )""",
    ),
    ("ALTER TABLE requests ADD COLUMN energy_method TEXT",),
)


def migrate(connection: sa.Connection) -> None:
    """Bring the schema to the newest version; nothing happens when it is there already.

    Raises `LedgerError` for a database that a newer Shoal has upgraded.
    """
    connection.exec_driver_sql(
        "CREATE TABLE IF NOT EXISTS schema_version "
        "(version INTEGER PRIMARY KEY, time_s DOUBLE PRECISION NOT NULL)"
    )
    found = connection.exec_driver_sql("SELECT max(version) FROM schema_version").scalar() or 0
    if found > len(STEPS):
        raise LedgerError(
            f"ledger.url: the database has schema version {found}, this Shoal knows up to "
            f"{len(STEPS)}; use a newer Shoal, or another database"
        )
    for version, step in enumerate(STEPS[found:], start=found + 1):
        for statement in step:
            connection.exec_driver_sql(statement)
        connection.execute(
            sa.text("INSERT INTO schema_version (version, time_s) VALUES (:version, :time_s)"),
            {"version": version, "time_s": time.time()},
        )
