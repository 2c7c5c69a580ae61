"""Routers on published outcomes and on the default pool's: tables, plots under docs/routing.

`python -m tests.bench.routing_tables` (or `make bench-routing`) needs the data sets' folder,
`--data` (RouteLLM's MMLU answers, LLMRouter's preprocessed answers); without it only the default
pool is measured. `--encoder neural:FOLDER` adds runs with a sentence encoder.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from models.pool import DEFAULT_POOL, load_pool
from policies.encoders.base import Encoder
from policies.encoders.ngrams import NGrams
from policies.encoders.registry import parse_encoder
from policies.evaluation.harness import Report, evaluate
from policies.evaluation.protocols import Protocol
from policies.evaluation.report import draw_curves, draw_reliability, table
from policies.outcomes import Outcome, read_outcomes, score_table
from policies.outcomes.importers import (
    import_llmrouter,
    import_routellm_mmlu,
    read_llmrouter_prices,
)

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY.parent / "shared" / "data" / "routing"
PROTOCOLS: dict[Protocol, str] = {
    "folds": "5-fold",
    "tasks": "whole tasks left out",
    "split": "trained on train, tested on test",
}


class RememberingNGrams(NGrams):
    """Hashed n-grams that are counted once per query, not once per fold."""

    counted: ClassVar[dict[str, Any]] = {}

    def _count(self, text: str) -> Any:
        if text not in self.counted:
            self.counted[text] = super()._count(text)
        return self.counted[text]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print every table that the data at hand allows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "routing")
    parser.add_argument("--encoder", default="ngrams")
    parser.add_argument("--only", choices=("mmlu", "llmrouter", "pool"), action="append")
    parser.add_argument("--protocol", choices=tuple(PROTOCOLS), action="append")
    options = parser.parse_args(arguments)
    wanted = options.only or ["mmlu", "llmrouter", "pool"]
    options.out.mkdir(parents=True, exist_ok=True)

    def make_encoder() -> Encoder:
        if options.encoder == NGrams.kind:
            return RememberingNGrams()
        return parse_encoder(options.encoder, {})

    suffix = "" if options.encoder == "ngrams" else f"-{options.encoder.partition(':')[0]}"
    runs: list[tuple[str, Callable[[], Report]]] = []
    if not options.data.is_dir():
        print(f"skipped the published data sets: there is no folder {options.data}")
        wanted = [name for name in wanted if name == "pool"]
    if "mmlu" in wanted:
        runs += _mmlu(options.data, make_encoder)
    if "llmrouter" in wanted:
        runs += _llmrouter(options.data, make_encoder)
    if "pool" in wanted:
        runs += _pool(make_encoder)
    for name, run in runs:
        if options.protocol and name.rpartition("-")[2] not in options.protocol:
            continue
        start_s = time.perf_counter()
        report = run()
        print(f"\n{table(report)}\n\n({time.perf_counter() - start_s:.0f} s)", flush=True)
        draw_curves(report, options.out / f"{name}{suffix}.png")
        for row in report.results:
            if row.method == "Learned" and row.diagram is not None:
                file = options.out / f"{name}{suffix}-reliability.png"
                draw_reliability(row.diagram, report.title, file)


def _mmlu(
    data: Path, make_encoder: Callable[[], Encoder]
) -> list[tuple[str, Callable[[], Report]]]:
    outcomes = import_routellm_mmlu(data / "RouteLLM" / "mmlu")
    weak, strong = score_table(outcomes).models
    marked = _split_by_position(outcomes)

    def run(protocol: Protocol) -> Callable[[], Report]:
        return lambda: evaluate(
            marked,
            title=f"RouteLLM MMLU, {PROTOCOLS[protocol]}",
            protocol=protocol,
            make_encoder=make_encoder,
            models=(weak, strong),
            relative_cost=(0.0, 1.0),
        )

    return [(f"mmlu-{protocol}", run(protocol)) for protocol in PROTOCOLS]


def _llmrouter(
    data: Path, make_encoder: Callable[[], Encoder]
) -> list[tuple[str, Callable[[], Report]]]:
    outcomes = [
        outcome
        for outcome in import_llmrouter(data / "LLMRouter")
        if outcome.split != "test-in-train"
    ]
    models = score_table(outcomes).models
    prices = read_llmrouter_prices(
        data / "LLMRouter" / "example_data" / "llm_candidates" / "default_llm.json"
    )

    def run(protocol: Protocol) -> Callable[[], Report]:
        return lambda: evaluate(
            outcomes,
            title=f"LLMRouter, nine models, {PROTOCOLS[protocol]}",
            protocol=protocol,
            make_encoder=make_encoder,
            models=models,
            relative_cost=[prices[name] for name in models],
        )

    return [(f"llmrouter-{protocol}", run(protocol)) for protocol in reversed(PROTOCOLS)]


def _pool(make_encoder: Callable[[], Encoder]) -> list[tuple[str, Callable[[], Report]]]:
    file = DEFAULT_POOL / "outcomes.jsonl"
    outcomes = read_outcomes(file)
    facts = load_pool(DEFAULT_POOL).facts()
    chunks = [name for name in facts if name in outcomes[0].scores and name != "base"]

    def run(protocol: Protocol) -> Callable[[], Report]:
        return lambda: evaluate(
            outcomes,
            title=f"Default pool, single chunks, {PROTOCOLS[protocol]}",
            protocol=protocol,
            make_encoder=make_encoder,
            models=chunks,
            relative_cost=[facts[name].rates.usd_per_output_token for name in chunks],
            train="router",
        )

    return [(f"pool-{protocol}", run(protocol)) for protocol in reversed(PROTOCOLS)]


def _split_by_position(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Mark every fifth question of each subject as test: this data set comes without a split."""
    return [
        replace(outcome, split="test" if row % 5 == 0 else "train")
        for row, outcome in enumerate(outcomes)
    ]


if __name__ == "__main__":
    main()
