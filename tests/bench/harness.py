"""What every benchmark shares: paired measurements, the machine's ceiling, the table, the record.

A benchmark is a module in this folder with `run(quick)` that returns or yields rows, and is named
in `__main__`. A row is a dict: `name` and `measured` always; `unit`, `target`, `ceiling`, `ok`, and
for paired rows `ours`, `other` (medians) and what else is worth keeping. Figures of paired rows are
ratios of medians over interleaved runs (A B A B ...), so that other load on the machine hits both.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from policies.files import write_atomic

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "ray", "numpy")


def paired(
    ours: Callable[[], float], other: Callable[[], float], *, pairs: int
) -> tuple[list[float], list[float]]:
    """Run both in turn, after one unmeasured round; each returns its figure."""
    ours(), other()
    figures = [(ours(), other()) for _ in range(pairs)]
    return [one for one, _ in figures], [two for _, two in figures]


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def speedup_row(
    name: str,
    ours_per_s: list[float],
    other_per_s: list[float],
    *,
    target: float | None,
    ceiling_per_s: float | None = None,
    **details: Any,
) -> Row:
    """Return a row for two lists of rates: how many times `other` we are."""
    ours, other = statistics.median(ours_per_s), statistics.median(other_per_s)
    ratio = ours / other
    pairs = [one / two for one, two in zip(ours_per_s, other_per_s, strict=True)]
    return {
        "name": name,
        "unit": "tokens/s",
        "ours": round(ours, 1),
        "other": round(other, 1),
        "measured": round(ratio, 2),
        "median_of_paired_ratios": round(statistics.median(pairs), 2),
        "target": target,
        "ceiling": None if ceiling_per_s is None else round(ceiling_per_s, 1),
        "pairs": len(pairs),
        **({} if target is None else {"ok": ratio >= target}),
        **details,
    }


def read_bytes_per_s(num_bytes: int, device: str = "cpu") -> float:
    """Measure how fast so many bytes are read on a device again and again: the best of 10."""
    block = torch.ones(max(num_bytes // 4, 1), device=device)

    def read() -> None:
        block.sum().item()  # waits for the device

    read()
    return num_bytes / min(seconds(read) for _ in range(10))


def environment() -> Row:
    """Return what a reader needs to place the figures."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "cpu": cpu,
        "num_cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "commit": commit.stdout.strip() or None,
    }


def print_row(row: Row) -> None:
    """Print ours, other, the figure, its target and its ceiling."""
    mark = {True: "ok  ", False: "MISS"}.get(row.get("ok"), "    ")  # type: ignore[arg-type]
    sides = f"{row['ours']:>10} {row['other']:>10}" if "other" in row else " " * 21
    target, ceiling = (row.get(key) or "-" for key in ("target", "ceiling"))
    print(
        f"{mark} {row['name']:<72} {sides} {row['measured']!s:>9} "
        f"target {target!s:>7} ceiling {ceiling!s:>9} {row.get('unit', '')}",
        flush=True,
    )


def save(rows: list[Row], kind: str = "", **more: Any) -> None:
    """Print a run's record, `more` with it, as one line, and keep it by date, host and `kind`."""
    record = {"environment": environment(), **more, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    parts = (record["environment"]["date"][:10], record["environment"]["host"], kind)
    file = RESULTS / f"{'-'.join(filter(None, parts))}.json"
    write_atomic(file, json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
