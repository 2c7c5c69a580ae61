"""Routers on published outcomes and on the default pool's: tables, plots under docs/routing.

`python -m tests.bench.routing_tables` (or `make bench-routing`) needs the data sets' folder,
`--data` (RouteLLM's MMLU answers, LLMRouter's preprocessed answers); without it only the default
pool is measured. `--encoder neural:FOLDER` adds rows with a sentence encoder; its vectors are kept
under build/.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np

from models.pool import DEFAULT_POOL, load_pool
from policies.encoders.base import Encoder, parse_encoder
from policies.encoders.ngrams import NGrams
from policies.encoders.transformer import SentenceVectors
from policies.evaluation.judge import Report
from policies.evaluation.report import draw_reliability, table
from policies.importers.benchmarks import import_llmrouter, import_routellm_mmlu
from policies.outcomes import Outcome, read_outcomes, score_table
from tests.bench.routing_harness import Protocol, draw_curves, evaluate, llmrouter_prices

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY.parent / "shared" / "data" / "routing"
PROTOCOLS: dict[Protocol, str] = {
    "folds": "5-fold",
    "tasks": "whole tasks left out",
    "split": "trained on train, tested on test",
}


Encoders: TypeAlias = Mapping[str, Callable[[], Encoder]]


class RememberingNGrams(NGrams):
    """Hashed n-grams that are counted once per query, not once per fold."""

    counted: ClassVar[dict[str, Any]] = {}

    def _count(self, text: str) -> Any:
        if text not in self.counted:
            self.counted[text] = super()._count(text)
        return self.counted[text]


class RememberingVectors:
    """A sentence encoder's vectors, all layers at once, kept by text in a file under build/."""

    def __init__(self, path: str) -> None:
        self.encode = SentenceVectors(path, max_tokens=256)
        name = hashlib.sha256(str(Path(path).resolve()).encode()).hexdigest()[:12]
        self.file = REPOSITORY / "build" / f"layers-{name}.npz"
        self.known: dict[str, Any] = {}
        if self.file.is_file():
            with np.load(self.file) as arrays:
                self.known = dict(zip(arrays["keys"].tolist(), arrays["vectors"], strict=True))

    def __call__(self, texts: Sequence[str], layers: Sequence[int]) -> Any:
        """Return the vectors; a single text is encoded anew, so that its time is real."""
        if len(texts) == 1:
            return self.encode.of_layers(texts, layers)
        every = range(1, self.encode.num_layers + 1)
        keys = [hashlib.sha256(text.encode("utf-8", "replace")).hexdigest() for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self.known}
        if new:
            vectors = self.encode.of_layers(list(new.values()), every).astype(np.float16)
            self.known.update(zip(new, vectors, strict=True))
            self.file.parent.mkdir(exist_ok=True)
            np.savez(
                self.file, keys=np.array(list(self.known)), vectors=np.stack([*self.known.values()])
            )
        taken = [layer - 1 for layer in layers]
        return np.stack([self.known[key][taken] for key in keys]).astype(np.float32)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print every table that the data at hand allows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "routing")
    parser.add_argument("--encoder", help="neural:FOLDER, beside the default")
    parser.add_argument("--only", choices=("mmlu", "llmrouter", "pool"), action="append")
    parser.add_argument("--protocol", choices=tuple(PROTOCOLS), action="append")
    parser.add_argument("--most", type=int, help="so many outcomes of each data set, drawn by lot")
    options = parser.parse_args(arguments)
    wanted = options.only or ["mmlu", "llmrouter", "pool"]
    options.out.mkdir(parents=True, exist_ok=True)

    encoders: dict[str, Callable[[], Encoder]] = {"n-grams": RememberingNGrams}
    if options.encoder:
        vectors = RememberingVectors(options.encoder.partition(":")[2])
        encoders["with sentence encoder"] = lambda: parse_encoder(
            options.encoder, {"vectors": vectors}
        )
    runs: list[tuple[str, Callable[[], Report]]] = []
    if not options.data.is_dir():
        print(f"skipped the published data sets: there is no folder {options.data}")
        wanted = [name for name in wanted if name == "pool"]
    if "mmlu" in wanted:
        runs += _mmlu(options.data, encoders, options.most)
    if "llmrouter" in wanted:
        runs += _llmrouter(options.data, encoders, options.most)
    if "pool" in wanted:
        runs += _pool(encoders, options.most)
    for name, run in runs:
        if options.protocol and name.rpartition("-")[2] not in options.protocol:
            continue
        start_s = time.perf_counter()
        report = run()
        print(f"\n{table(report)}\n\n({time.perf_counter() - start_s:.0f} s)", flush=True)
        draw_curves(report, options.out / f"{name}.png")
        for row in report.results:
            if row.method.startswith("Learned") and row.diagram is not None:
                part = "-sentence" if row.method.endswith("encoder") else ""
                file = options.out / f"{name}-reliability{part}.png"
                draw_reliability(row.diagram, report.title, file)


def _drawn(outcomes: Sequence[Outcome], most: int | None) -> list[Outcome]:
    rows = np.random.default_rng(0).permutation(len(outcomes))[:most]
    return [outcomes[row] for row in sorted(rows)]


def _mmlu(
    data: Path, encoders: Encoders, most: int | None
) -> list[tuple[str, Callable[[], Report]]]:
    outcomes = _drawn(import_routellm_mmlu(data / "RouteLLM" / "mmlu"), most)
    weak, strong = score_table(outcomes).models
    marked = _split_by_position(outcomes)

    def run(protocol: Protocol) -> Callable[[], Report]:
        return lambda: evaluate(
            marked,
            title=f"RouteLLM MMLU, {PROTOCOLS[protocol]}",
            protocol=protocol,
            encoders=encoders,
            models=(weak, strong),
            relative_cost=(0.0, 1.0),
        )

    return [(f"mmlu-{protocol}", run(protocol)) for protocol in PROTOCOLS]


def _llmrouter(
    data: Path, encoders: Encoders, most: int | None
) -> list[tuple[str, Callable[[], Report]]]:
    outcomes = [
        outcome
        for outcome in import_llmrouter(data / "LLMRouter")
        if outcome.split != "test-in-train"
    ]
    outcomes = _drawn(outcomes, most)
    models = score_table(outcomes).models
    prices = llmrouter_prices(data / "LLMRouter")

    def run(protocol: Protocol) -> Callable[[], Report]:
        return lambda: evaluate(
            outcomes,
            title=f"LLMRouter, nine models, {PROTOCOLS[protocol]}",
            protocol=protocol,
            encoders=encoders,
            models=models,
            relative_cost=[prices[name] for name in models],
        )

    return [(f"llmrouter-{protocol}", run(protocol)) for protocol in reversed(PROTOCOLS)]


def _pool(encoders: Encoders, most: int | None) -> list[tuple[str, Callable[[], Report]]]:
    file = DEFAULT_POOL / "outcomes.jsonl"
    outcomes = _drawn(read_outcomes(file), most)
    facts = load_pool(DEFAULT_POOL).facts()
    members = [name for name, fact in facts.items() if fact.domains]

    def run(protocol: Protocol) -> Callable[[], Report]:
        return lambda: evaluate(
            outcomes,
            title=f"Default pool, its chunks and their base, {PROTOCOLS[protocol]}",
            protocol=protocol,
            encoders=encoders,
            models=members,
            relative_cost=[facts[name].rates.usd_per_output_token for name in members],
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
