"""Few data, many epochs: chunks on their own domain against the base on all, at equal FLOPs.

    python -m tests.bench.downscale.limited OUT [--examples N] [--epochs N]

Every domain has N examples and no more. The base goes through all of them so many times, each chunk
through its own as much more often as it is smaller, so that all chunks together cost what the base
does. Both are judged on held-out questions ten times on the way, and each is kept as it was where
it lost least (early stopping). Then they answer the shipped pool's test questions: accuracy
with 95% intervals by bootstrap over questions, paired, and nats per answer token. What is trained
is kept in OUT and not trained again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from models.downscale.adapt import adapt
from models.downscale.chunks import load_model, loss_on, save_model, untrained
from models.downscale.corpora import corpus
from models.downscale.corpus import Example
from models.downscale.examples import conversations, render
from models.downscale.pipeline import claimed
from models.downscale.recipe import AdaptSettings
from models.downscale.stage import Run, read_json, write_json
from models.downscale.vocabulary import base_model
from models.tasks import DOMAINS
from models.tasks.base import Split
from models.training.checkpoint import Progress
from models.training.data import Conversation
from policies.plan import Answer
from tests.bench.downscale.one_domain import interval, recipe, right

BASE = "base"
NUM_LOOKS, NUM_JUDGED = 10, 100
FACTS = "facts.json"


def train(run: Run, name: str, folder: Path, *, tokens: int) -> dict[str, Any]:
    """Train the base on all domains or a chunk on its own, and keep it as it was at its best."""
    if (folder / FACTS).exists():
        found: dict[str, Any] = read_json(folder / FACTS)
        return found
    domains = run.domains if name == BASE else (name,)
    model = load_base(run) if name == BASE else untrained(run, name)
    own = _all(run, domains, Split.TRAIN)
    judged = [
        one for domain in domains for one in conversations(run, domain, Split.ROUTER)[:NUM_JUDGED]
    ]
    settings = AdaptSettings.model_validate(
        run.recipe.adapt_of_base(tokens).model_dump()
        if name == BASE
        else run.recipe.adapt_of(name).model_dump()
    )
    looks: list[tuple[int, float]] = []
    best: dict[str, torch.Tensor] = {}

    def watch(progress: Progress) -> None:
        if progress.num_tokens < (len(looks) + 1) * tokens / (NUM_LOOKS + 1):
            return
        model.eval()  # type: ignore[no-untyped-call]
        looks.append((progress.num_tokens, loss_on(run, judged, model)))
        model.train()
        if looks[-1][1] == min(loss for _, loss in looks):
            best.update({key: one.clone() for key, one in model.state_dict().items()})

    result = adapt(
        model,
        own,
        (),
        general_share=0.0,
        tokens=tokens,
        settings=settings,
        seed=run.recipe.seed,
        watch=watch,
        report=lambda line: print(f"{name}: {line}", file=sys.stderr, flush=True),
    )
    looks.append((result.tokens, loss_on(run, judged, model)))
    if looks[-1][1] > min(loss for _, loss in looks):
        model.load_state_dict(best)
    save_model(run, model, folder)
    facts = {
        "flops": result.flops,
        "epochs": round(result.tokens / sum(len(one.tokens) for one in own), 1),
        "looks": [[at, round(loss, 4)] for at, loss in looks],
    }
    write_json(folder / FACTS, facts)
    return facts


def load_base(run: Run) -> PreTrainedModel:
    """A base of one's own to train."""
    return load_model(Path(str(run.recipe.base.checkpoint)))


def _all(run: Run, domains: Sequence[str], split: Split) -> list[Conversation]:
    return [one for domain in domains for one in conversations(run, domain, split)]


def measure(run: Run, folders: dict[str, Path], num_test: int) -> dict[str, Any]:
    """Every domain's questions, answered by its chunk and by the base."""
    tests: dict[str, list[Example]] = {
        domain: corpus(run, domain).questions(Split.TEST)[:num_test] for domain in run.domains
    }
    told: dict[str, Any] = {}
    pairs = []
    for domain, asked in tests.items():
        answered = {
            name: right({name: folders[name]}, [Answer(members=(name,))], asked)[0]
            for name in (domain, BASE)
        }
        judge = partial(loss_on, run, render(run, asked))
        pairs.append(np.stack([answered[domain], answered[BASE]]).astype(float))
        told[domain] = {
            "chunk": round(float(answered[domain].mean()), 4),
            "base": round(float(answered[BASE].mean()), 4),
            "nats": [round(judge(load_model(folders[name])), 4) for name in (domain, BASE)],
        }
    chunk, base = np.concatenate(pairs, 1)
    differences = interval(lambda drawn: float((chunk - base)[drawn].mean()), len(base))
    return {
        "chunk": round(float(chunk.mean()), 4),
        "base": round(float(base.mean()), 4),
        "difference": [round(float((chunk - base).mean()), 4), *differences],
        "domains": told,
    }


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.downscale.limited")
    parser.add_argument("out", type=Path)
    parser.add_argument("--examples", type=int, default=1_000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--test", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with claimed(arguments.out, resume=arguments.out.exists()) as work:
        run = Run(recipe(arguments.examples, arguments.test), work, report=print)
        size = base_model(run)[0].num_parameters()
        data = {
            domain: sum(len(one.tokens) for one in _all(run, (domain,), Split.TRAIN))
            for domain in DOMAINS
        }
        facts = {}
        folders = {name: work / "kept" / name for name in (*DOMAINS, BASE)}
        for name, folder in folders.items():
            if name == BASE:
                tokens = arguments.epochs * sum(data.values())
            else:
                times = size / untrained(run, name).num_parameters()
                tokens = round(arguments.epochs * data[name] * times)
            facts[name] = train(run, name, folder, tokens=tokens)
        told = measure(run, folders, arguments.test) | {"training": facts, "tokens": data}
    write_json(arguments.out / "limited.json", told)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
