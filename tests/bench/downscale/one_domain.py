"""Several chunks of one domain, trained alike in orders of their own, fused: a deep ensemble.

    python -m tests.bench.downscale.one_domain OUT [--domain NAME] [--members N] [--tokens N]

The setting that the ensemble law comes from (Lobacheva et al. 2020), with the shipped pool's cuts
and recipe. Loss (nats per answer token) and greedy accuracy of n fused uniformly, on the questions
of the pool's report, with 95% intervals by bootstrap over questions, paired: beside one of them,
and beside the pool's base, trained on everything, whose answers the report keeps. The law is
fitted on the losses of 1 to n members, each the mean over subsets. What is trained is kept in OUT
and not trained again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from models.downscale.adapt import adapt
from models.downscale.answers import ask
from models.downscale.chunks import load_model, save_model, untrained
from models.downscale.corpora import corpus
from models.downscale.corpus import Example
from models.downscale.ensemble import explained
from models.downscale.examples import conversations, render
from models.downscale.pipeline import claimed
from models.downscale.recipe import AdaptSettings, Recipe
from models.downscale.stage import Run, read_json, write_json
from models.pool import DEFAULT_POOL
from models.tasks import DOMAINS
from models.tasks.base import Split, check
from models.training.data import Conversation
from models.training.forward import Scorer, target_log_probabilities
from policies.laws.scaling import EnsembleLaw
from policies.plan import Answer

RIVAL, ROW_TOKENS = "base", 64
NUM_RESAMPLES = 2000
LEAST_SIZES = 4  # the law has three constants


def recipe(num_examples: int, num_test: int) -> Recipe:
    """What corpus, cut and training are: the shipped pool's, with so few examples."""
    return Recipe.model_validate(
        {
            "name": "one-domain",
            "base": {"checkpoint": str(DEFAULT_POOL / "base")},
            "domains": {
                name: {"corpus": f"tasks:{name}", "examples": num_examples} for name in DOMAINS
            },
            "members": {"parameters": "1/8", "shape": {"hidden_size": 128, "num_layers": 3}},
            "adapt": {
                "general_share": 0.0,
                "rows_per_step": 32,
                "row_tokens": ROW_TOKENS,
                "question_weight": 0.2,
                "distill": {"weight": 0},
            },
            "measure": {"test_questions": num_test},
        }
    )


def train(run: Run, domain: str, folder: Path, *, seed: int, num_tokens: int) -> dict[str, Any]:
    """Train the domain's cut with an order of its own, as the shipped pool's recipe does."""
    if (folder / "facts.json").exists():
        found: dict[str, Any] = read_json(folder / "facts.json")
        return found
    model, examples = untrained(run, domain), conversations(run, domain, Split.TRAIN)
    settings = AdaptSettings.model_validate(run.recipe.adapt.model_dump())
    result = adapt(
        model,
        examples,
        examples,
        general_share=0.0,
        tokens=num_tokens,
        settings=settings,
        seed=seed,
        folder=folder / "training",
        report=lambda line: print(f"{folder.name}: {line}", file=sys.stderr, flush=True),
    )
    save_model(run, model, folder)
    facts = {"flops": result.flops, "tokens": result.tokens, "cpu_s": round(result.cpu_s, 1)}
    write_json(folder / "facts.json", facts)
    return facts


def recorded(domain: str, num_questions: int) -> tuple[NDArray[np.bool_], float]:
    """Which of the domain's questions the base of the shipped pool's report had right,
    and its loss on them."""
    told = read_json(DEFAULT_POOL / "results.json")
    counts = list(told["question_domains"].items())
    start = sum(count for _, count in counts[: [name for name, _ in counts].index(domain)])
    [system] = [one for one in told["systems"] if one["name"] == RIVAL]
    bits = system["right"][start : start + num_questions]
    return np.array([bit == "1" for bit in bits]), told["losses"][RIVAL][domain]


def answer_odds(
    model: PreTrainedModel, examples: Sequence[Conversation]
) -> list[NDArray[np.float64]]:
    """The log-probability of every token of each right answer."""
    scorer = Scorer(model, row_tokens=ROW_TOKENS)
    return [
        np.asarray(logs[:-1][np.asarray(one.is_answer[1:], bool)], np.float64)
        for one, (logs,) in zip(
            examples, scorer.map(examples, target_log_probabilities), strict=True
        )
    ]


def fused_losses(odds: Sequence[Sequence[NDArray[np.float64]]]) -> NDArray[np.float64]:
    """Per question, the summed loss of the uniform mixture of these models, and its tokens."""
    told = []
    for answers in zip(*odds, strict=True):
        mixture = np.logaddexp.reduce(np.stack(answers)) - np.log(len(answers))
        told.append((-mixture.sum(), len(mixture)))
    return np.array(told)


def per_token(losses: NDArray[np.float64]) -> float:
    """Nats per answer token over all questions."""
    return float(losses[:, 0].sum() / losses[:, 1].sum())


def interval(values: Callable[[NDArray[np.int64]], float], number: int) -> list[float]:
    """95% by bootstrap over `number` questions of what `values` says of resampled ones."""
    rng = np.random.default_rng(0)
    drawn = [values(rng.integers(number, size=number)) for _ in range(NUM_RESAMPLES)]
    return [round(float(edge), 4) for edge in np.quantile(drawn, (0.025, 0.975))]


def right(
    folders: dict[str, Path], plans: Sequence[Answer], tests: Sequence[Example]
) -> NDArray[np.bool_]:
    """Which answers are right, `[plans, questions]`, by the engine that serves."""
    asked = [(one.question or "", plan) for plan in plans for one in tests]
    written = ask(folders, asked, max_new_tokens=32)
    told = [
        check(tests[index % len(tests)].answer or "", answer.text)
        for index, answer in enumerate(written)
    ]
    return np.array(told).reshape(len(plans), len(tests))


def measure(run: Run, folders: dict[str, Path], domain: str, num_test: int) -> dict[str, Any]:
    """Losses and accuracies of one and of n fused, with paired differences."""
    tests = corpus(run, domain).questions(Split.TEST)[:num_test]
    held_out = render(run, tests)
    assert max(len(one.tokens) for one in held_out) <= ROW_TOKENS, "the report leaves none out"
    names = list(folders)
    odds = [answer_odds(load_model(folder), held_out) for folder in folders.values()]
    sizes = range(1, len(names) + 1)
    by_size = {n: np.mean([fused_losses(some) for some in combinations(odds, n)], 0) for n in sizes}
    fused = [Answer(members=tuple(names[:n])) for n in sizes]
    told = right(folders, [*fused, *(Answer(members=(name,)) for name in names)], tests)
    single = told[len(fused) :].mean(0)
    rival, rival_loss = recorded(domain, len(tests))
    curve = [per_token(by_size[n]) for n in sizes]
    law: dict[str, Any] | None = None
    if len(sizes) >= LEAST_SIZES:
        found = EnsembleLaw.fit(num_members=sizes, losses=curve, num_resamples=50).law
        law = asdict(found) | {"r2": explained(curve, [found.predict(float(n)) for n in sizes])}

    def accuracy(of: NDArray[Any], other: NDArray[Any]) -> list[float]:
        return interval(lambda drawn: float(of[drawn].mean() - other[drawn].mean()), len(tests))

    def loss(of: NDArray[np.float64], other: NDArray[np.float64]) -> list[float]:
        return interval(lambda drawn: per_token(of[drawn]) - per_token(other[drawn]), len(tests))

    return {
        "domain": domain,
        "questions": len(tests),
        "the base": {"nats": rival_loss, "accuracy": round(float(rival.mean()), 4)},
        "one": {"nats": round(curve[0], 4), "accuracy": round(float(single.mean()), 4)},
        "fused": {
            n: {
                "nats": round(curve[n - 1], 4),
                "nats beside one": loss(by_size[n], by_size[1]),
                "accuracy": round(float(told[n - 1].mean()), 4),
                "accuracy beside one": accuracy(told[n - 1], single),
                "accuracy beside the base": accuracy(told[n - 1], rival),
                "right": "".join("01"[int(one)] for one in told[n - 1]),
            }
            for n in sizes
        },
        "law": law,
    }


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.downscale.one_domain")
    parser.add_argument("out", type=Path)
    parser.add_argument("--domain", choices=sorted(DOMAINS), default="arithmetic")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2_860_000)
    parser.add_argument("--examples", type=int, default=60_000)
    parser.add_argument("--test", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    domain = arguments.domain
    with claimed(arguments.out, resume=arguments.out.exists()) as work:
        run = Run(recipe(arguments.examples, arguments.test), work, report=print)
        folders = {f"m{seed}": work / f"m{seed}" for seed in range(arguments.members)}
        facts = {
            name: train(run, domain, folder, seed=seed, num_tokens=arguments.tokens)
            for seed, (name, folder) in enumerate(folders.items())
        }
        told = measure(run, folders, domain, arguments.test) | {"training": facts}
    write_json(arguments.out / f"{domain}.json", told)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
