"""Draws quality against training compute: the chunks of several runs, and their bases.

    python -m tests.bench.downscale.compute_plot OUT.png RESULTS.json ...

The files are `results.json` of pools that were cut from the same base and measured on the same
questions. Left: nats per answer token on each domain, the mean over domains; right: right answers.
Chunks answer their own domain, so their figure is that of one routed by domain.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from models.downscale.figures import ORACLE
from models.downscale.stage import read_json
from policies.pages import new_figure

Point: TypeAlias = tuple[float, float, float]
"""TFLOP of training after the cut, nats, percent right."""
BASES = ("base", "finetuned")


def bases(results: Mapping[str, Any]) -> list[Point]:
    """Return the base as the pool has it, and as it was trained on for comparison."""
    return [
        _point(results, name, flops=results["models"].get(name, {}).get("training", {}), own=name)
        for name in BASES
        if name in results["losses"]
    ]


def chunks(results: Mapping[str, Any]) -> Point:
    """Return all chunks together."""
    flops = sum(results["models"][name]["training"]["flops"] for name in results["domains"])
    return _point(results, ORACLE, flops={"flops": flops}, own=None)


def _point(
    results: Mapping[str, Any], system: str, *, flops: Mapping[str, Any], own: str | None
) -> Point:
    domains, losses = results["domains"], results["losses"]
    nats = sum(losses[own or domain][domain] for domain in domains) / len(domains)
    [accuracy] = [one["accuracy"] for one in results["systems"] if one["name"] == system]
    return flops.get("flops", 0.0) / 1e12, nats, 100 * accuracy["value"]


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.downscale.compute_plot")
    parser.add_argument("out", type=Path)
    parser.add_argument("results", type=Path, nargs="+")
    arguments = parser.parse_args()
    runs = [read_json(file) for file in arguments.results]
    lines = {
        "the base, 3.67 M parameters": sorted({point for run in runs for point in bases(run)}),
        "eight chunks, .45 M at work": sorted(chunks(run) for run in runs),
    }
    figure, axes = new_figure(2, width=10.0, height=3.8)
    for at, (ax, label) in enumerate(
        zip(axes, ("held-out loss (nats per answer token)", "right answers (%)"), strict=True), 1
    ):
        for (name, points), colour in zip(lines.items(), ("#444444", "#00798c"), strict=True):
            ax.plot([p[0] for p in points], [p[at] for p in points], "o-", color=colour, label=name)
        ax.set_xlabel("training after the cut (TFLOP)")
        ax.set_ylabel(label)
        ax.legend(frameon=False)
    figure.savefig(arguments.out, dpi=130)


if __name__ == "__main__":
    main()
