"""The x-ratelimit headers, as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import Iterable

from router.caps.limits import Limit


def rate_limit_headers(remaining: Iterable[tuple[Limit, int]], now_s: float) -> dict[str, str]:
    """Return x-ratelimit-{limit,remaining,reset}-{requests,tokens} of the tightest limits.

    Caps on money, energy and carbon have no such header; their errors say what is left.
    """
    headers = {}
    entries = list(remaining)
    for resource in ("requests", "tokens"):
        found = [entry for entry in entries if entry[0].cap.resource == resource]
        if not found:
            continue
        limit, left = min(found, key=lambda entry: entry[1])
        headers[f"x-ratelimit-limit-{resource}"] = str(limit.cap.limit)
        headers[f"x-ratelimit-remaining-{resource}"] = str(left)
        headers[f"x-ratelimit-reset-{resource}"] = duration(limit.window.end_s - now_s)
    return headers


def duration(seconds: float) -> str:
    """Return a time as OpenAI writes it: "850ms", "12s", "6m0s", "3h0m12s"."""
    if seconds < 1:
        return f"{max(0, round(seconds * 1000))}ms"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours}h{minutes}m{rest}s"
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
