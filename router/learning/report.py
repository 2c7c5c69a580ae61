"""What was learned, told: a paragraph, tables, plots, a page; and its policies put into the pool.

The page needs nothing beside it; the plots lie there as PNG too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from models.pool import Pool, load_pool
from models.pool_text import write_policies
from policies.cascade.frontier import pareto
from policies.errors import ExperimentError
from policies.evaluation.metrics import bootstrap
from policies.experiments.replay import ReplayedPolicy, replay_log
from policies.files import write_atomic
from policies.pages import Table, new_figure, page, png
from policies.routing.router import load_router
from router.catalog.catalog import load_catalog
from router.catalog.policies import DEFAULT_POLICY
from router.config import AppArgs
from router.editions import catalog_of
from router.experiments.experiments import read_definitions
from router.experiments.reporting import read_log
from router.learning.exam import Measured
from router.learning.learn import Lesson
from router.ledger.database import Database

if TYPE_CHECKING:
    from matplotlib.lines import Line2D

_COLOURS: Final = {
    "model": "#8fb8de",
    "policy": "#00798c",
    "serving": "#444444",
    "reference": "#aaaaaa",
}


def verdict(lesson: Lesson) -> str:
    """Return one paragraph for whoever decides: what routing gains here, and how sure that is."""
    best, auto = lesson.row(lesson.best_single), lesson.row(lesson.auto)
    oracle = lesson.row("oracle of each question")
    num_tests = len(auto.quality_Q)
    difference_Q = auto.quality_Q - best.quality_Q
    low, high = bootstrap(lambda rows: float(difference_Q[rows].mean()), num_tests)
    told = [
        f"On {num_tests:,} questions that nothing was learned from, {best.name}, the best single "
        f"model, scores {best.quality:.1%}{_per_1000(best)}; the learned router {auto.name} scores "
        f"{auto.quality:.1%}{_per_1000(auto)}."
    ]
    if best.usd and auto.usd is not None:
        told.append(f"That is {auto.usd / best.usd:.0%} of the cost.")
    told.append(
        f"Whoever knew the best model of every question would score {oracle.quality:.1%}, so "
        f"choosing could gain {100 * (oracle.quality - best.quality):.1f} points at most."
    )
    gain = f"{100 * difference_Q.mean():+.1f} points [{100 * low:.1f}, {100 * high:.1f}]"
    if low <= 0 <= high:
        told.append(
            f"The router's difference in quality, {gain}, may be chance; {_wanted(difference_Q)}"
        )
    else:
        told.append(f"The router's difference in quality, {gain}, is more than chance.")
    return " ".join(told)


def _per_1000(row: Measured) -> str:
    return "" if row.usd is None else f" at {1000 * row.usd:.4g} USD per 1,000 questions"


def _wanted(difference_Q: np.ndarray) -> str:
    """Return how many test questions would tell such a difference from none."""
    mean, deviation = float(difference_Q.mean()), float(difference_Q.std(ddof=1))
    if mean == 0:
        return "both chose alike or as well."
    number = round((1.96 * deviation / abs(mean)) ** 2)
    return f"to be sure of one that small takes about {number:,} test questions."


def advice(lesson: Lesson) -> str:
    """Return what the learning curve says: whether more questions would help."""
    if len(lesson.curve) < 2:
        return (
            f"{lesson.num_train:,} questions to learn from are too few for a learning curve; "
            "give at least three times as many."
        )
    *_, (half, before), (whole, after) = lesson.curve
    gained = 100 * (after - before)
    told = f"From {half:,} to {whole:,} questions the router's choice gained {gained:+.1f} points: "
    if gained > 1:
        return told + f"it is still learning; about {whole:,} more should help again."
    return told + "more questions like these would change little."


def table(lesson: Lesson) -> list[tuple[str, ...]]:
    """Return the rows of everything measured, the head first."""
    rows: list[tuple[str, ...]] = [
        ("who answers", "kind", "quality", "95% interval", "USD / 1,000")
    ]
    for row in lesson.measured:
        low, high = row.interval
        usd = "–" if row.usd is None else f"{1000 * row.usd:.4g}"
        rows.append((row.name, row.kind, f"{row.quality:.3f}", f"[{low:.3f}, {high:.3f}]", usd))
    return rows


def write_report(lesson: Lesson, pool: Pool) -> Path:
    """Write `report.html` and its plots beside the lesson's files; return the page."""
    folder = pool.folder / "learned" / f"v{lesson.version}"
    plot = folder / "report.png"
    _draw(lesson, plot)
    head, *rows = table(lesson)
    parts: list[Table | Path | str] = [
        verdict(lesson),
        advice(lesson),
        *lesson.notes,
        plot,
        Table(
            title="Everything on the same questions",
            text=(
                f"{len(lesson.measured[0].quality_Q):,} test questions; {lesson.num_train:,} "
                "others were learned from. “auto (serving)” is the pool's default policy. Oracles "
                "know the scores and cannot be had."
            ),
            columns=head,
            rows=tuple(rows),
        ),
        Table(
            title="What a question like yours would get",
            text=(
                "The test questions by what they are like, the most frequent first: one of each "
                "kind, who answers most of them, what the router expects of its choices, and what "
                "these scored."
            ),
            columns=("a question of the kind", "questions", "who answers", "expected", "scored"),
            rows=tuple(
                (
                    one.example[:200],
                    str(one.num_questions),
                    f"{one.chosen} ({one.share:.0%})",
                    f"{one.expected:.2f}",
                    f"{one.scored:.2f}",
                )
                for one in lesson.kinds
            ),
        ),
        Table(
            title="Where the router is wrong",
            text=(
                "Questions whose favourite did worse than another model, the surest first. "
                f"{lesson.unfamiliar:.1%} of the test questions are unlike the training's; these "
                "get the safe plan whatever is expected."
            ),
            columns=("question", "chosen", "expected quality", "better"),
            rows=tuple(
                (one.query[:200], one.chosen, f"{one.expected:.2f}", one.better)
                for one in lesson.mistakes
            ),
        ),
    ]
    file = folder / "report.html"
    write_atomic(file, page(f"What {pool.name} learned, version {lesson.version}", parts))
    return file


def _draw(lesson: Lesson, file: Path) -> None:
    """Draw who scores what, at what cost, and the learning curve; names stand once, in rows."""
    rows = sorted(lesson.measured, key=lambda row: row.quality)
    figure, [who, trade, learning] = new_figure(3, width=14, height=1.6 + 0.26 * len(rows))
    intervals = [row.interval for row in rows]
    for at, (row, (low, high)) in enumerate(zip(rows, intervals, strict=True)):
        colour = _COLOURS[row.kind]
        below, above = row.quality - low, high - row.quality
        who.errorbar(row.quality, at, xerr=[[below], [above]], fmt="o", capsize=3, color=colour)
        if row.usd is not None:
            trade.errorbar(
                1000 * row.usd, row.quality, yerr=[[below], [above]], fmt="o", capsize=3,
                color=colour, alpha=0.8,
            )  # fmt: skip
    who.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    who.set(xlabel="mean score, 95% interval", title="Who scores what")
    for at, row in enumerate(_frontier(lesson)):  # above and below in turn, as they lie close
        point, beside = (1000 * (row.usd or 0.0), row.quality), (6, -13 if at % 2 else 6)
        trade.annotate(row.name, point, xytext=beside, textcoords="offset points", fontsize=8)
    trade.set(xlabel="USD per 1,000 questions", ylabel="mean score", title="Quality and cost")
    trade.margins(x=0.2, y=0.1)
    trade.locator_params(axis="x", nbins=4)
    learning.plot(*zip(*lesson.curve, strict=True), "o-", color=_COLOURS["policy"], label="router")
    learning.axhline(
        lesson.row(lesson.best_single).quality, color=_COLOURS["serving"], ls=":",
        label=lesson.best_single,
    )  # fmt: skip
    learning.set(xlabel="questions learned from", ylabel="mean score", title="Learning curve")
    who.legend(handles=_legend(rows), frameon=False, fontsize=8, loc="lower right")
    learning.legend(frameon=False, fontsize=8, loc="center right")
    write_atomic(file, png(figure))


def _frontier(lesson: Lesson) -> list[Measured]:
    """Return what can be had, and nothing else scores as much for less: the dearest last."""
    had = [row for row in lesson.measured if row.kind != "reference" and row.usd is not None]
    usd, quality = np.array([row.usd for row in had]), np.array([row.quality for row in had])
    return [had[at] for at in pareto(usd, quality)]


def _legend(rows: Sequence[Measured]) -> list[Line2D]:
    from matplotlib.lines import Line2D  # noqa: PLC0415 - only a report needs it

    kinds = [kind for kind in _COLOURS if any(row.kind == kind for row in rows)]
    return [Line2D([], [], marker="o", ls="", color=_COLOURS[k], label=k) for k in kinds]


def install(lesson: Lesson, file: Path) -> None:
    """Add the lesson's policies to the pool file, whose text stays as it is otherwise.

    Raises `ValueError`, and leaves the file alone, where the pool could not be served then.
    """
    before = file.read_text(encoding="utf-8")
    write_policies(file, lesson.specs)
    try:
        load_catalog(load_pool(file))
    except ValueError:
        write_atomic(file, before)
        raise


def is_worse(lesson: Lesson) -> str:
    """Return why the new router should not take the serving one's place; empty where it may."""
    serving = [row for row in lesson.measured if row.kind == "serving"]
    if not serving:
        return "the serving policy could not be played on these questions"
    difference_Q = lesson.row(lesson.auto).quality_Q - serving[0].quality_Q
    low, high = bootstrap(lambda rows: float(difference_Q[rows].mean()), len(difference_Q))
    if difference_Q.mean() < 0:
        return (
            f"it scores {100 * difference_Q.mean():.1f} points [{100 * low:.1f}, {100 * high:.1f}] "
            "less than the serving policy"
        )
    return ""


def off_policy(lesson: Lesson, pool: Pool, args: AppArgs, database: Database) -> Iterator[str]:
    """Yield a sentence per experiment of `args`, and per policy: the serving and the learned one.

    Arms answered with known probabilities, so the estimate is off-policy (see `replay` of
    experiments), and needs nobody's other answers. Requests whose question the router was trained
    on are left out: it would look better than it is.

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
