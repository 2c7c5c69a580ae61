"""`shoal outcomes`: what outcomes hold, and outcomes brought together and divided."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

import typer

from policies.errors import OutcomesError
from router.cli.console import OutcomesOption, SeedOption, refusing

if TYPE_CHECKING:
    from policies.outcome_sets import ModelStats

app = typer.Typer(help="Collect, read and arrange outcomes.", no_args_is_help=True)

# Less than a point between the best model and an oracle is not worth a router.
_LEAST_GAP: Final = 0.01
_MOST_SHOWN: Final = 60

FileArgument: TypeAlias = Annotated[
    Path, typer.Argument(help="Outcomes: a file, or a folder or log that Shoal can read.")
]


@app.command()
def stats(file: FileArgument) -> None:
    """Say what outcomes hold, what is missing, and whether routing can pay at all."""
    from policies.importers.load import load_outcomes
    from policies.outcome_sets import agreements, summarise
    from policies.tables import text_table

    with refusing("outcomes stats"):
        rows = load_outcomes(file)
        found = summarise(rows)
    head = ("model", "scored", "missing", "score", "USD / 1,000", "tokens", "seconds")
    print(text_table([head, *map(_cells, found.models)]))
    tasks = ", ".join(f"{name} {count:,}" for name, count in sorted(found.tasks.items()))
    print(f"\n{found.num_queries:,} queries" + (f": {tasks}" if tasks else ""))
    for pair in agreements(rows):
        print(
            f"Where {pair.one} tells two answers apart, {pair.other} prefers the same one in "
            f"{pair.share:.0%} of {pair.num_pairs:,}."
        )
    if not found.num_complete:
        print("No query has every model's score, so nothing can be said of choosing between them.")
        return
    print(f"{found.num_complete:,} have every model's score. Of these:")
    print(f"  all models score alike     {found.ties:.1%}")
    print(f"  the best single model      {found.best_single:.3f}")
    if found.task_oracle is not None:
        print(f"  the best of each task      {found.task_oracle:.3f}")
    print(f"  the best of each query     {found.oracle:.3f}")
    gap = found.oracle - found.best_single
    if gap < _LEAST_GAP:
        print(f"Routing can gain {100 * gap:.1f} points at most: it can only pay by costs.")
    else:
        print(f"Routing can gain {100 * gap:.1f} points at most.")


def _cells(one: ModelStats) -> tuple[str, ...]:
    return (
        one.name,
        f"{one.num_scored:,}",
        f"{one.num_missing:,}",
        f"{one.score:.3f}",
        "–" if one.usd is None else f"{1000 * one.usd:.4g}",
        "–" if one.output_tokens is None else f"{one.output_tokens:.0f}",
        "–" if one.latency_s is None else f"{one.latency_s:.2f}",
    )


@app.command("show")
def show_one(
    file: FileArgument,
    *,
    first: Annotated[int, typer.Option(min=1, help="Which to begin with.")] = 1,
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 5,
) -> None:
    """Show queries, and each model's answer and score."""
    from policies.importers.load import load_outcomes
    from policies.tables import text_table

    with refusing("outcomes show"):
        found = load_outcomes(file)
        if first > len(found):
            raise OutcomesError(f"--first {first}: {file} holds {len(found):,} outcomes")
    for number, row in enumerate(found[first - 1 : first - 1 + count], start=first):
        right = "" if row.answer is None else f"  (right: {row.answer})"
        print(f"{number}. {row.query}{right}")
        cells = [("  model", "answer", "score")]
        for name, score in row.scores.items():
            answer = " ".join(row.outputs.get(name, "–").split())
            cells.append((f"  {name}", answer[:_MOST_SHOWN], f"{score:.2f}"))
        print(text_table(cells, num_left=2))
        print()


@app.command("merge")
def merge_files(
    files: Annotated[list[Path], typer.Argument(help="Outcomes; the last word on a query counts.")],
    *,
    out: OutcomesOption,
) -> None:
    """Bring outcomes together: one per query, with all models that any of the files knows.

    Of a single file that is another format (a published data set, an evaluation's log) this is
    also how to import it.
    """
    from policies.importers.load import load_outcomes
    from policies.outcome_sets import merge
    from policies.outcomes import write_outcomes

    with refusing("outcomes merge"):
        found = merge(load_outcomes(file) for file in files)
        write_outcomes(out, found)
    print(f"{out}: {len(found):,} outcomes")


@app.command("export")
def export_file(
    file: FileArgument,
    *,
    out: Annotated[
        Path, typer.Option(help="A file (mixinstruct, routerbench) or a folder (the others).")
    ],
    format: Annotated[
        str,
        typer.Option(
            help="evals, llmrouter, lm-eval, mixinstruct, routellm, routerarena or routerbench."
        ),
    ],
) -> None:
    """Write outcomes as another router's or evaluation's program reads them."""
    from policies.exporters import export_outcomes
    from policies.importers.load import load_outcomes

    with refusing("outcomes export"):
        rows = load_outcomes(file)
        number = export_outcomes(rows, out, format=format)
    print(f"{out}: {number:,} of {len(rows):,} outcomes, as {format}")


@app.command("split")
def split_file(
    file: FileArgument,
    *,
    out: OutcomesOption,
    test_share: Annotated[float, typer.Option(help="Share that is marked test.")] = 0.3,
    seed: SeedOption = 0,
) -> None:
    """Mark each outcome train or test, by a hash of its query; near duplicates stay together."""
    from policies.importers.load import load_outcomes
    from policies.outcome_sets import TEST, divide
    from policies.outcomes import write_outcomes

    with refusing("outcomes split"):
        found = divide(load_outcomes(file), test_share=test_share, seed=seed)
        write_outcomes(out, found)
    tests = sum(row.split == TEST for row in found)
    print(f"{out}: {len(found) - tests:,} train, {tests:,} test")


@app.command("dedupe")
def dedupe_file(file: FileArgument, *, out: OutcomesOption) -> None:
    """Leave out queries that (nearly) repeat an earlier one."""
    from policies.importers.load import load_outcomes
    from policies.outcome_sets import dedupe
    from policies.outcomes import write_outcomes

    with refusing("outcomes dedupe"):
        before = load_outcomes(file)
        found = dedupe(before)
        write_outcomes(out, found)
    print(f"{out}: {len(found):,} of {len(before):,} outcomes")
