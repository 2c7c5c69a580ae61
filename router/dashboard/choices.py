"""Who answered, and how good and dear it was: the answers of a window by policy.

Quality is users' feedback: a mean score in [0, 1] of the answers that were rated.
"""

from __future__ import annotations

import math
from typing import Any

import sqlalchemy as sa

from router.experiments.mirror import SHADOW_ENDPOINT
from router.ledger.schema import FEEDBACK, REQUESTS

# The rarest combinations of policy and members are left out beyond this many.
_MOST_KINDS = 64
_Z = 1.96  # 95%
OWN_PLAN = "plan in the request"

_R = REQUESTS.c


def choices(connection: sa.Connection, *, since_s: float) -> list[dict[str, Any]]:
    """Return what decided since the Unix time `since_s`: policies, then models asked for by name.

    Each has its requests, mean cost per 1,000 of them, mean latency, `quality` (None without
    feedback) and `answered_by`: how often which members had a hand in the answer.
    """
    chosen: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in connection.execute(_query(since_s)).mappings():
        if row["policy"] is not None:
            name = ("policy", row["policy"])
        elif row["model"] == row["answered_by"]:
            name = ("model", row["model"])
        else:
            name = ("plan", OWN_PLAN)
        chosen.setdefault(name, []).append(dict(row))
    found = [_choice(kind, name, rows) for (kind, name), rows in chosen.items()]
    return sorted(found, key=lambda choice: -choice["requests"])


def wilson(score: float, num_rated: int) -> tuple[float, float]:
    """Return the 95% interval of a mean score in [0, 1] from its sum (Wilson 1927).

    For scores between the two thumbs it is too wide, never too narrow: their variance is at most
    mean · (1 - mean).
    """
    mean = score / num_rated
    scale = 1 + _Z**2 / num_rated
    centre = (mean + _Z**2 / (2 * num_rated)) / scale
    spread = math.sqrt(mean * (1 - mean) / num_rated + _Z**2 / (4 * num_rated**2))
    return max(0.0, centre - _Z / scale * spread), min(1.0, centre + _Z / scale * spread)


def _query(since_s: float) -> sa.Select[Any]:
    sums = ("usd", "wh", "gco2e", "latency_s")
    return (
        sa.select(
            _R.policy,
            sa.case((_R.policy.is_(None), _R.model), else_=None).label("model"),
            _R.answered_by,
            sa.func.count().label("requests"),
            *(sa.func.sum(_R[name]).label(name) for name in sums),
            sa.func.count(FEEDBACK.c.score).label("rated"),
            sa.func.sum(FEEDBACK.c.score).label("score"),
        )
        .join_from(REQUESTS, FEEDBACK, _R.request_id == FEEDBACK.c.request_id, isouter=True)
        # Refused requests name whatever a client sent; answered ones only what the pool has.
        .where(_R.time_s >= since_s, _R.status < 400, _R.endpoint != SHADOW_ENDPOINT)
        .group_by(_R.policy, sa.case((_R.policy.is_(None), _R.model), else_=None), _R.answered_by)
        .order_by(sa.desc("requests"))
        .limit(_MOST_KINDS)
    )


def _choice(kind: str, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    num_requests = sum(int(row["requests"]) for row in rows)
    num_rated = sum(int(row["rated"]) for row in rows)
    score = float(sum(row["score"] or 0 for row in rows))
    quality = None
    if num_rated:
        low, high = wilson(score, num_rated)
        quality = {"mean": score / num_rated, "low": low, "high": high, "num_rated": num_rated}
    means = {
        key: float(sum(row[key] or 0 for row in rows)) / num_requests
        for key in ("usd", "wh", "gco2e", "latency_s")
    }
    return {
        "kind": kind,
        "name": name,
        "requests": num_requests,
        **{f"{key}_per_1000": means[key] * 1000 for key in ("usd", "wh", "gco2e")},
        "latency_s": means["latency_s"],
        "quality": quality,
        "answered_by": [
            {
                "members": row["answered_by"].split("+") if row["answered_by"] else [],
                "requests": int(row["requests"]),
            }
            for row in rows
        ],
    }
