"""`shoal experiment`: what runs, and what may be concluded from it so far."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from policies.files import write_atomic
from router.cli.console import LedgerOption, opened, refusing

if TYPE_CHECKING:
    from policies.experiments.report import Comparison
    from router.experiments.reporting import Summary

app = typer.Typer(help="List A/B experiments, or report on one.", no_args_is_help=True)

ConfigOption = Annotated[
    Path, typer.Option("--config", help="The server's configuration, with its experiments.")
]


@app.command("list")
def list_experiments(*, config: ConfigOption, ledger: LedgerOption = None) -> None:
    """Print every configured experiment: status, arms, units and the advice of the moment."""
    with refusing():
        for summary in _summaries(config, ledger, None):
            report = summary.report
            arms = ", ".join(f"{arm.name} {arm.num_units:,}" for arm in report.arms)
            typer.echo(f"{report.name}  [{summary.status}]  {report.unit}s: {arms}")
            typer.echo(f"  {report.recommendation}")


@app.command("report")
def report_experiment(
    *,
    name: Annotated[str, typer.Argument(help="The experiment.")],
    config: ConfigOption,
    ledger: LedgerOption = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also draw the confidence sequence into this PNG.", show_default=False),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what GET /v1/experiments/NAME answers.")
    ] = False,
) -> None:
    """Print means per arm, lift with its always-valid interval and p, power, and what to do."""
    with refusing():
        [summary] = _summaries(config, ledger, name)
        if as_json:
            typer.echo(json.dumps(summary.to_json(), indent=2))
        else:
            typer.echo(render(summary))
        if plot is not None:
            write_atomic(plot, summary.plot())
            typer.echo(f"plot: {plot}", err=as_json)


def render(summary: Summary) -> str:
    """Return the report as text."""
    report = summary.report
    lines = [
        f"{report.name}: {summary.status}; {report.num_requests:,} requests of "
        f"{report.num_units:,} {report.unit}s"
        + (f"; {report.num_crossed:,} left out (moved arms)" if report.num_crossed else ""),
        "",
    ]
    metrics = [metric for metric in _METRICS if any(metric in arm.means for arm in report.arms)]
    lines += _table(
        ("arm", "policy", f"{report.unit}s", "requests", *metrics),
        [
            (
                arm.name + (" (stopped)" if arm.stopped else ""),
                arm.policy,
                f"{arm.num_units:,}",
                f"{arm.num_requests:,}",
                *(
                    f"{arm.means[metric].mean:.4g}" if metric in arm.means else "-"
                    for metric in metrics
                ),
            )
            for arm in report.arms
        ],
    )
    compared = (*report.primary, *report.secondary)
    lines += ["", *_table(_COMPARED, [_cells(found) for found in compared])]
    if report.guardrails:
        rows = [
            (
                guard.treatment,
                guard.metric,
                _number(guard.harm),
                _number(guard.harm_low),
                f"{guard.limit:.4g}",
                "BREACHED" if guard.breached else "ok",
            )
            for guard in report.guardrails
        ]
        lines += [
            "",
            *_table(("guardrail", "metric", "harm", "at least", "allowed", ""), rows),
        ]
    ratio = report.sample_ratio
    seen = ", ".join(
        f"{arm} {count:,} of {want:,.0f} expected"
        for arm, count, want in zip(ratio.arms, ratio.observed, ratio.expected, strict=True)
    )
    alarm = "MISMATCH" if ratio.alarm else "ok"
    lines += ["", f"sample ratio: {alarm} (p = {ratio.p:.3g}; {seen})"]
    kept = {found.variance_kept for found in report.primary if found.variance_kept < 1}
    if kept:
        lines.append(f"CUPED leaves {min(kept):.0%} of the variance of {report.primary_metric}")
    lines += [f"note: {note}" for note in report.notes]
    return "\n".join([*lines, "", report.recommendation])


_METRICS = (
    *("quality", "feedback_rate", "usd", "wh", "gco2e", "latency_s", "ttft_s", "tokens"),
    *("error_rate", "escalation_rate", "predicted_quality"),
)
_COMPARED = ("metric", "arm", "difference", "relative", "interval", "p", "power", "")


def _cells(found: Comparison) -> tuple[str, ...]:
    verdict = {True: "better", False: "worse", None: ""}[found.better]
    return (
        found.metric,
        found.treatment,
        _number(found.estimate),
        f"{found.relative:+.1%}" if math.isfinite(found.relative) else "-",
        f"[{_number(found.low)}, {_number(found.high)}]",
        f"{found.p:.3g}" if found.p else "<1e-300",
        f"{found.power:.0%}",
        verdict,
    )


def _number(value: float) -> str:
    return f"{value:+.4g}" if math.isfinite(value) else "-"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]


def _summaries(config: Path, ledger: str | None, name: str | None) -> list[Summary]:
    from policies.errors import ExperimentError
    from router.config import load_args
    from router.experiments.experiments import read_definitions
    from router.experiments.reporting import summarise

    definitions, _ = read_definitions(load_args(config))
    chosen = [one for one in definitions if name is None or one.name == name]
    if name is not None and not chosen:
        known = ", ".join(one.name for one in definitions) or "none"
        raise ExperimentError(f"there is no experiment {name!r} in {config}; it has {known}")
    with opened(ledger, config) as database:
        return [summarise(database, one, now_s=time.time()) for one in chosen]
