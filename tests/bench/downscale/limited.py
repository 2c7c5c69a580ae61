"""The claim where data are scarce: small models of one domain fused against a large one.

    python -m tests.bench.downscale.limited OUT [--domain NAME] [--examples N] [--start cut]

Both sides learn from the same few examples, epoch after epoch, by the same rule: so many epochs,
and of these the one whose held-out loss is least. All small models see one domain, each in an order
of its own: the deep-ensemble law's own setting (Lobacheva et al. 2020), which starts from fresh
weights; with `--start cut` they are cut from the shipped base, and the large one is that base.
Eight of an eighth of the large one's size, fused uniformly, cost as much per token as it does, and
their training as much as its. Loss (nats per answer token) and greedy accuracy on questions that
nobody trained on, with 95% intervals by bootstrap over questions, paired; the law fitted on the
losses of 1 to 8 members, each the mean over subsets. What is trained is kept in OUT and not trained
again.
"""

from __future__ import annotations

import argparse
import copy
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
from transformers import AutoModelForCausalLM, PreTrainedModel

from models.downscale.adapt import adapt, mean_loss
from models.downscale.answers import ask
from models.downscale.base import base_model
from models.downscale.chunks import load_model, save_model, untrained
from models.downscale.corpus import Example
from models.downscale.ensemble import explained
from models.downscale.examples import conversations, corpus, render
from models.downscale.pipeline import claimed
from models.downscale.recipe import AdaptSettings, Recipe
from models.downscale.stage import Run, read_json, write_json
from models.pool import DEFAULT_POOL
from models.tasks import DOMAINS, Split, check
from models.training.checkpoint import Progress
from models.training.data import Conversation
from models.training.forward import Scorer, target_log_probabilities
from policies.laws.ensemble import EnsembleLaw
from policies.plan import Answer

LARGE, ROW_TOKENS, NUM_JUDGED = "large", 64, 400
NUM_RESAMPLES = 2000


def recipe(num_examples: int, num_test: int) -> Recipe:
    """What corpus, cut and training are: the shipped pool's, with so few examples."""
    return Recipe.model_validate(
        {
            "name": "limited",
            "base": {"checkpoint": str(DEFAULT_POOL / "base")},
            "domains": {
                name: {"corpus": f"tasks:{name}", "examples": num_examples} for name in DOMAINS
            },
            "members": {"parameters": "1/8", "shape": {"hidden_size": 128, "num_layers": 3}},
            "adapt": {"general_share": 0.0, "row_tokens": ROW_TOKENS, "distill": {"weight": 0}},
            "measure": {"router_questions": NUM_JUDGED, "test_questions": num_test},
        }
    )


def train(
    run: Run, model: PreTrainedModel, domain: str, folder: Path, *, seed: int, num_epochs: int
) -> dict[str, Any]:
    """Train for `num_epochs` and keep the epoch with the least held-out loss in `folder`."""
    if (folder / "facts.json").exists():
        found: dict[str, Any] = read_json(folder / "facts.json")
        return found
    examples = conversations(run, domain, Split.TRAIN)
    judged = conversations(run, domain, Split.ROUTER)[:NUM_JUDGED]
    epoch_tokens = sum(len(one.tokens) for one in examples)
    losses: list[float] = []
    best = copy.deepcopy(model.state_dict())

    def watch(progress: Progress) -> None:
        nonlocal best
        if progress.num_tokens < (len(losses) + 1) * epoch_tokens:
            return
        losses.append(round(mean_loss(model, judged, row_tokens=ROW_TOKENS), 5))
        if losses[-1] == min(losses):
            best = copy.deepcopy(model.state_dict())
        print(f"{folder.name}: epoch {len(losses)}, {losses[-1]:.4f} nats", file=sys.stderr)

    settings = AdaptSettings.model_validate(dict(run.recipe.adapt.model_dump()))
    # Rows are not quite full; the last epoch must end.
    num_tokens = int(1.1 * num_epochs * epoch_tokens)
    result = adapt(
        model,
        examples,
        examples,
        general_share=0.0,
        tokens=num_tokens,
        settings=settings,
        seed=seed,
        watch=watch,
    )
    model.load_state_dict(best)
    save_model(run, model, folder)
    facts = {
        "losses": losses,
        "best_epoch": 1 + int(np.argmin(losses)),
        "flops": result.flops,
        "tokens": result.tokens,
        "cpu_s": round(result.cpu_s, 1),
    }
    write_json(folder / "facts.json", facts)
    return facts


def fresh(like: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model of the same shape with weights of its own."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        like.config, dtype=torch.float32
    )
    return model


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
    """Losses and accuracies of the base, of one chunk and of n fused, with paired differences."""
    rendered = zip(
        corpus(run, domain).questions(Split.TEST),
        render(run, corpus(run, domain).questions(Split.TEST)),
        strict=True,
    )
    fitting = [pair for pair in rendered if len(pair[1].tokens) <= ROW_TOKENS][:num_test]
    tests, held_out = [one for one, _ in fitting], [told for _, told in fitting]
    small = [name for name in folders if name != LARGE]
    odds = {name: answer_odds(load_model(folder), held_out) for name, folder in folders.items()}
    sizes = [n for n in (1, 2, 3, 4, 6, 8) if n <= len(small)]
    by_size = {
        n: np.mean([fused_losses([odds[c] for c in some]) for some in combinations(small, n)], 0)
        for n in sizes
    }
    base = fused_losses([odds[LARGE]])
    plans = [Answer(members=tuple(small[:n])) for n in sizes]
    singles = [Answer(members=(name,)) for name in small]
    told = right({name: folders[name] for name in small}, [*plans, *singles], tests)
    alone = right({LARGE: folders[LARGE]}, [Answer(members=(LARGE,))], tests)[0]
    single = told[len(plans) :].mean(0)
    curve = [per_token(by_size[n]) for n in sizes]
    law = EnsembleLaw.fit(num_members=sizes, losses=curve, num_resamples=50).law
    number = len(tests)

    def beside(ours: NDArray[np.float64], other: NDArray[np.float64]) -> list[float]:
        return interval(lambda drawn: per_token(ours[drawn]) - per_token(other[drawn]), number)

    def accuracy(of: NDArray[Any], other: NDArray[Any]) -> list[float]:
        return interval(lambda drawn: float(of[drawn].mean() - other[drawn].mean()), number)

    return {
        "domain": domain,
        "questions": number,
        "the large one": {
            "nats": round(per_token(base), 4),
            "accuracy": round(float(alone.mean()), 4),
        },
        "a small one": {
            "nats": round(per_token(by_size[1]), 4),
            "accuracy": round(float(single.mean()), 4),
        },
        "fused": {
            n: {
                "nats": round(per_token(by_size[n]), 4),
                "nats beside the large one's": beside(by_size[n], base),
                "nats beside a small one's": beside(by_size[n], by_size[1]),
                "accuracy": round(float(told[row].mean()), 4),
                "accuracy beside the large one's": accuracy(told[row], alone),
                "accuracy beside a small one's": accuracy(told[row], single),
            }
            for row, n in enumerate(sizes)
        },
        "law": asdict(law) | {"r2": explained(curve, [law.predict(float(n)) for n in sizes])},
    }


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.downscale.limited")
    parser.add_argument("out", type=Path)
    parser.add_argument("--domain", choices=sorted(DOMAINS), default="arithmetic")
    parser.add_argument("--start", choices=("fresh", "cut"), default="fresh")
    parser.add_argument("--examples", type=int, default=3000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--test", type=int, default=800)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    domain = arguments.domain
    with claimed(arguments.out, resume=arguments.out.exists()) as work:
        run = Run(recipe(arguments.examples, arguments.test), work, report=print)
        folders = {}
        facts = {}
        for number in range(arguments.members + 1):
            name = f"small{number}" if number < arguments.members else LARGE
            folders[name] = work / name
            shape = untrained(run, domain) if number < arguments.members else base_model(run)[0]
            model = fresh(shape, number) if arguments.start == "fresh" else copy.deepcopy(shape)
            facts[name] = train(
                run, model, domain, work / name, seed=number, num_epochs=arguments.epochs
            )
        told = measure(run, folders, domain, arguments.test) | {"training": facts}
    write_json(arguments.out / "limited.json", told)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
