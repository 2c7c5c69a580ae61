"""`shoal outcomes collect`: what every model answers to your questions, graded; `shoal learn`: from
that to policies of the pool."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from models.errors import PoolError
from policies.errors import PolicyError
from router.cli.console import KeyOption, OutcomesOption, SeedOption, names_in, opened, refusing

if TYPE_CHECKING:
    from models.pool import Pool
    from policies.outcomes import Outcome
    from router.config import AppArgs
    from router.learning.collect import Line, Problems, Sampling
    from router.learning.learn import Lesson

PoolOption: TypeAlias = Annotated[
    Path | None, typer.Option(help="The pool whose models answer, a file or folder.")
]
QueriesOption: TypeAlias = Annotated[
    Path,
    typer.Option(
        help="Questions (JSON Lines): query or messages, and reference, choices, tags, tests, "
        "schema, tools as there are."
    ),
]
ServerOption: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Any OpenAI-compatible server that answers, instead of a pool."),
]
ModelsOption: TypeAlias = Annotated[
    str | None, typer.Option(help="The models to ask, with commas; default: all.")
]
GradeOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        help="[WEIGHT*]NAME[:ARGUMENT]: exact, contains, regex, numeric, choice, json, code, "
        "loss, similarity:ENCODER, reward:CLASSIFIER, judge:MODEL or command:PROGRAM. May be "
        "repeated. "
        "[default: exact]",
        show_default=False,
    ),
]
SamplesOption: TypeAlias = Annotated[int, typer.Option(min=1, help="Answers of each model.")]
TokensOption: TypeAlias = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
TemperatureOption: TypeAlias = Annotated[
    float, typer.Option(min=0, help="Where there are several samples; one is greedy.")
]
CodeOption: TypeAlias = Annotated[
    bool, typer.Option("--allow-code", help="Let the grader code run what models wrote.")
]
AtOnceOption: TypeAlias = Annotated[
    int,
    typer.Option(
        min=1,
        help="Questions at a time; no more than a judge's engine has slots, so that it finds there "
        "what it has read.",
    ),
]


def learn(
    *,
    pool: Annotated[Path, typer.Option(help="The pool to learn for, a file or folder.")],
    queries: Annotated[
        Path | None, typer.Option(help="Questions; see `shoal outcomes collect`.")
    ] = None,
    use: Annotated[
        list[Path] | None,
        typer.Option("--outcomes", help="Outcomes that are there already. May be repeated."),
    ] = None,
    from_ledger: Annotated[
        str | None,
        typer.Option(
            help="Also what users thought of real answers, from the ledger at this address, and "
            "without --queries a --sample of what they asked, answered by every model and judged "
            "(--grade judge:MODEL); nothing is installed that is worse than what serves."
        ),
    ] = None,
    sample: Annotated[
        int, typer.Option(min=1, help="So many of the ledger's questions are asked, by lot.")
    ] = 300,
    config: Annotated[
        Path | None,
        typer.Option(
            help="The server's configuration: what its experiments logged in the --from-ledger "
            "then says, off policy, what the new router would have scored."
        ),
    ] = None,
    budget: Annotated[
        str, typer.Option(help="Mean cost, as a share of always asking the dearest model.")
    ] = "40%",
    encoder: Annotated[
        str,
        typer.Option(
            help="ngrams, or neural:FOLDER, which may be package:DISTRIBUTION/FOLDER; see `shoal "
            "train router`."
        ),
    ] = "ngrams",
    test_share: Annotated[
        float, typer.Option(min=0.05, max=0.9, help="Share of the questions to measure on.")
    ] = 0.3,
    read: Annotated[
        bool | None,
        typer.Option(
            help="Whether the pool's models read the questions, for a policy that looks at what "
            "they make of them before one answers; default: where they are asked --queries."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Report, and leave the pool file as it is.")
    ] = False,
    models: ModelsOption = None,
    grade: GradeOption = None,
    max_tokens: TokensOption = 512,
    allow_code: CodeOption = False,
    at_once: AtOnceOption = 8,
    seed: SeedOption = 0,
) -> None:
    """Learn routing policies for a pool from your questions, and measure them on unseen ones.

    They go into the pool beside the old ones, with a version: auto-v1, probing-v1, cascade-v1,
    best-of-v1.
    """
    from models.pool import load_pool, pool_file
    from policies.importers.load import load_outcomes
    from policies.outcomes import write_outcomes
    from policies.tables import text_table
    from router.cli.train import readings_of
    from router.config import ConfigError
    from router.learning.collect import Problems, Sampling, read_lines
    from router.learning.learn import LearnSettings
    from router.learning.learn import learn as learn_from
    from router.learning.report import advice, install, is_worse, table, verdict, write_report

    problems = Problems()
    with refusing("learn", ConfigError):
        file = pool_file(pool)
        found, args = load_pool(file), _configured(config, from_ledger)
        settings = LearnSettings(
            budget_share=_share(budget),
            test_share=test_share,
            encoder=encoder,
            seed=seed,
            models=tuple(names_in(models) or ()),
        )
        parts = [load_outcomes(one) for one in use or []]
        lines = [] if queries is None else read_lines(queries, problems)
        if queries is None and from_ledger is not None and grade:
            lines = _asked(from_ledger, sample)
        if lines:
            kept = file.parent / "learned" / "outcomes.jsonl"
            kept.parent.mkdir(exist_ok=True)
            collected_now = collected(
                lines,
                kept,
                pool=pool,
                server=None,
                key=None,
                models=models,
                grade=grade or ["exact"],
                sampling=Sampling(max_tokens=max_tokens),
                allow_code=allow_code,
                at_once=at_once,
                problems=problems,
            )
            write_outcomes(kept, collected_now)
            parts.append(collected_now)
        rows = _with_feedback(parts, from_ledger)
        reads = bool(lines) if read is None else read
        readings = readings_of(file, rows, num_at_once=at_once) if reads else {}
        lesson = learn_from(rows, found, settings, readings)
        lesson.notes.extend(_off_policy(lesson, found, args, from_ledger))
        page = write_report(lesson, found)
        write_outcomes(page.with_name("outcomes.jsonl"), rows)
        why = is_worse(lesson) if from_ledger is not None else ""
        if not why and not dry_run:
            install(lesson, file)
    show_problems(problems)
    print(text_table(table(lesson), num_left=2))
    for note in lesson.notes:
        print(f"Note: {note}")
    print(f"\n{verdict(lesson)}\n\n{advice(lesson)}\n\nReport: {page}")
    if why:
        print(f"Not installed: {why}.")
    elif not dry_run:
        print(
            f"Installed in {file}: {', '.join(lesson.specs)}. A running server takes them up with "
            "POST /v1/admin/reload, or kill -HUP of `shoal serve`; then ask for "
            f"policy/{lesson.auto}. To make it the default, name its settings auto."
        )


def _configured(config: Path | None, ledger: str | None) -> AppArgs | None:
    """Return what a server's configuration says, whose experiments a ledger has."""
    from router.config import load_args
    from router.experiments.experiments import read_definitions

    if config is None:
        return None
    if ledger is None:
        raise PolicyError("--config: there is no --from-ledger with its experiments' requests")
    args = load_args(config)
    read_definitions(args)  # what is wrong with them is known before anything is asked
    return args


def _off_policy(lesson: Lesson, pool: Pool, args: AppArgs | None, ledger: str | None) -> list[str]:
    """Return what the ledger's experiments say of the lesson's router, in sentences."""
    from router.learning.report import off_policy

    if args is None:
        return []
    with opened(ledger, None, option="--from-ledger") as database:
        return list(off_policy(lesson, pool, args, database))


def _with_feedback(parts: Sequence[list[Outcome]], ledger: str | None) -> list[Outcome]:
    """Return the outcomes of `parts`, and of what users scored in the ledger at this address.

    Raises `PolicyError` where there is nothing to learn from.
    """
    from policies.outcome_sets import merge
    from router.cli.train import read_feedback

    rows = merge(parts)
    if ledger is not None:
        rows += read_feedback(ledger, option="--from-ledger")
        if not rows:
            raise PolicyError(
                "the ledger has no answer that a user scored and whose text was kept "
                "(ledger.keep_text): give --grade judge:MODEL, --queries or --outcomes"
            )
    if not rows:
        raise PolicyError("there is nothing to learn from: give --queries or --outcomes")
    if not parts:
        raise PolicyError(
            "the ledger has one model's answer to each question, and nothing can be compared "
            "by that: give --grade judge:MODEL, for which every model is asked a sample of "
            "them, or --queries or --outcomes"
        )
    return rows


def _asked(ledger: str, most: int) -> list[Line]:
    """Return questions from the ledger at this address, at most so many, drawn by their hashes."""
    from hashlib import sha256

    from router.learning.collect import Line
    from router.ledger.feedback import asked

    with opened(ledger, None, option="--from-ledger") as database:
        found = asked(database)
    drawn = sorted(found, key=lambda text: sha256(text.encode("utf-8", "replace")).digest())
    lines = (Line(query=text, reference=found[text]) for text in drawn if text.strip())
    return [line.model_copy(update={"id": str(n)}) for n, line in enumerate(lines, 1)][:most]


def _share(text: str) -> float:
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not text.endswith("%") or not 0 < share <= 1:
        raise PolicyError(f"--budget {text!r} is not a percentage up to 100%")
    return share


def collect(
    *,
    queries: QueriesOption,
    out: OutcomesOption,
    pool: PoolOption = None,
    server: ServerOption = None,
    key: KeyOption = None,
    models: ModelsOption = None,
    grade: GradeOption = None,
    samples: SamplesOption = 1,
    max_tokens: TokensOption = 512,
    temperature: TemperatureOption = 1.0,
    allow_code: CodeOption = False,
    at_once: AtOnceOption = 8,
) -> None:
    """Ask every model every question, and grade the answers.

    Interrupted, the same command goes on where it stopped: OUT.journal holds what is known.
    """
    from models.pool import pool_file
    from policies.outcomes import write_outcomes
    from router.learning.collect import Problems, Sampling, read_lines

    problems = Problems()
    with refusing("outcomes collect"):
        for option, read in (("--queries", queries), ("--pool", pool and pool_file(pool))):
            if read is not None and read.exists() and out.exists() and out.samefile(read):
                raise PolicyError(f"--out: {out} is what {option} names, and would be lost")
        found = collected(
            read_lines(queries, problems),
            out,
            pool=pool,
            server=server,
            key=key,
            models=models,
            grade=grade or ["exact"],
            sampling=Sampling(
                max_tokens=max_tokens,
                num_samples=samples,
                temperature=temperature if samples > 1 else 0.0,
            ),
            allow_code=allow_code,
            at_once=at_once,
            problems=problems,
        )
        write_outcomes(out, found)
    show_problems(problems)
    print(f"Outcomes: {out} ({len(found):,}); shoal outcomes stats {out} says what they hold")


def collected(
    lines: list[Line],
    out: Path,
    *,
    pool: Path | None,
    server: str | None,
    key: str | None,
    models: str | None,
    grade: list[str],
    sampling: Sampling,
    allow_code: bool,
    at_once: int,
    problems: Problems,
) -> list[Outcome]:
    """Return the outcomes, from the journal beside `out` as far as that goes.

    Raises `ValueError` where nothing can be collected.
    """
    from tqdm import tqdm

    from models.pool import load_pool
    from policies.files import check_target
    from policies.grading.base import GradingContext, Panel
    from router.learning.asking import AskError, ask_pool, ask_server
    from router.learning.collect import Collector, Journal, journal_of
    from router.learning.fusing import Likelihoods

    if (pool is None) == (server is None):
        raise PolicyError("give either --pool or --server")
    check_target(out, option="--out")

    likelihood = None if pool is None else Likelihoods(load_pool(pool))

    async def run() -> list[Outcome]:
        asking = (
            ask_server(server, key=key, num_at_once=at_once)
            if server is not None
            else ask_pool(pool or Path(), num_at_once=at_once)
        )
        async with asking as asker:
            askable = await asker.names()
            names = tuple(n for n in askable if n != "auto" and not n.startswith("policy/"))
            wanted = tuple(names_in(models) or names)
            for name in wanted:
                if name not in names:
                    raise PolicyError(f"--models: {name!r} is unknown; it has {', '.join(names)}")
            context = GradingContext(
                ask=asker.say,
                askable=askable,
                locate=located,
                allow_code=allow_code,
                likelihood=likelihood,
                models=wanted,
                place=asker.place,
            )
            panel = Panel(grade, context)
            with ExitStack() as stack:
                bar = stack.enter_context(
                    tqdm(total=len(lines) * sampling.num_samples, unit="questions", disable=None)
                )
                collector = Collector(
                    asker=asker,
                    panel=panel,
                    journal=stack.enter_context(Journal(journal_of(out))),
                    problems=problems,
                    sampling=sampling,
                    num_at_once=at_once,
                )
                return await collector.collect(lines, wanted, progress=bar.update)

    try:
        found = asyncio.run(run())
    except AskError as error:
        raise PolicyError(str(error)) from None
    except KeyboardInterrupt:
        typer.echo("Interrupted; the same command goes on where it stopped.", err=True)
        raise typer.Exit(130) from None
    if not found:
        show_problems(problems)
        raise PolicyError("no question was answered and graded")
    return found


def located(source: str) -> Path:
    """Return the folder that a grader's `source` stands for; `PolicyError` where there is none."""
    from models.sources.locate import locate

    try:
        return locate(source, folder=Path()).path
    except PoolError as error:
        raise PolicyError(f"grade: {error}") from None


def show_problems(problems: Problems) -> None:
    """Say on stderr what went wrong, and how often."""
    for text in problems.examples:
        typer.echo(f"  {text}", err=True)
    for kind, count in problems.counts.most_common():
        typer.echo(f"{kind}: {count:,}", err=True)
