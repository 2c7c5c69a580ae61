"""The pool's README: what the models are, how they were trained and what they get right."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from models.tasks import DOMAINS, Split
from models.training.export import TRAINING_FACTS
from models.training.outcomes import RESULTS, SAMPLE_SEED, SAMPLE_SIZES

_INTRODUCTION: Final = """# The default pool

Small Llama models that share one tokenizer: `base`, trained on all task domains, and chunks of
one shape with less than a quarter of its parameters each, trained mainly on one domain each.
They were trained from scratch on generated questions (`models/tasks`) by `models/training`, and
on nothing else.

**They are toys, and meant to be.** They answer the kinds of questions below, in the wordings
that the generators use, in a few tokens. They know no facts, hold no conversation, and answer
anything else with confident nonsense. Beyond the trained ranges (two-digit sums, one-digit by
two-digit products, words of up to six letters, lists of up to five numbers) expect wrong answers.
They exist so that routing, cascades and fusion can be tried and measured on real generations on
any laptop.
"""

_EXAMPLES: Final = """## What they can be asked

| domain | question | answer |
|---|---|---|
"""

_EVALUATION: Final = """## Held-out exact match

Greedy decoding of {size} questions per domain of the `test` split (seed {seed}), with 95% Wilson
intervals. Instances (operands, words, lists) are split by a hash: no test instance occurs in
training under any wording. Times tables up to 10 x 10 and their quotients are taught as facts
and are not in the test.

"""

_TRAINING: Final = """## Training

Each conversation is rendered with the chat template that ships in the tokenizer. The loss counts
answer tokens with weight 1 and question tokens with weight 0.2, since fusion weighs members by
how likely they find the question. Muon trains the hidden matrices, AdamW the rest; warm-up,
stable, decay. The base is trained at half its depth first and then grown. A chunk sees 85% its
own domain and 5% of each other. Wall-clock is that of one thread at the lowest priority of a busy
machine (two cores of an Intel Xeon with AMX, bf16, about a third of a core each); on an
idle core it is several times shorter.

"""

_CLOSING: Final = """Exact match by skill stands in `results.json`, all answers in `outcomes.jsonl`.

Reproduce: `python -m models.training.default_pool --out DIR`. Seeds are fixed; the weights differ
in their last bits between processors.

Licence: Apache-2.0, as the repository.
"""


def write_card(names: Sequence[str], out: Path) -> None:
    """Write `README.md` into the pool `out` from its training facts and results."""
    results = json.loads((out / RESULTS).read_text())["exact_match"]
    evaluation = _EVALUATION.format(size=SAMPLE_SIZES[Split.TEST], seed=SAMPLE_SEED)
    parts = [
        _INTRODUCTION,
        _EXAMPLES + "".join(_example_rows()),
        evaluation + "".join(_accuracy_rows(names, results)),
        _TRAINING + "".join(_training_rows(names, out)),
        _CLOSING,
    ]
    (out / "README.md").write_text("\n".join(parts))


def _row(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |\n"


def _example_rows() -> list[str]:
    rows = []
    for domain in DOMAINS.values():
        by_skill = {t.skill: t for t in domain.distinct(Split.TEST, 60, seed=SAMPLE_SEED)}
        some = list(by_skill.values())[:4]
        rows += [_row((domain.name, f"`{task.question}`", f"`{task.answer}`")) for task in some]
    return rows


def _accuracy_rows(names: Sequence[str], results: Mapping[str, Any]) -> list[str]:
    rows = [_row(("model", *DOMAINS)), _row(("---",) * (1 + len(DOMAINS)))]
    for name in names:
        cells = []
        for domain in DOMAINS:
            share = results[name][domain]
            low, high = share["interval_95"]
            cells.append(f"{100 * share['exact_match']:.1f}% [{100 * low:.1f}, {100 * high:.1f}]")
        rows.append(_row((name, *cells)))
    return rows


def _training_rows(names: Sequence[str], out: Path) -> list[str]:
    header = ("model", "parameters", "layers x width", "steps", "tokens", "minutes", "seed", "MB")
    rows = [_row(header), _row(("---",) * len(header))]
    for name in names:
        folder = out / name
        facts = json.loads((folder / TRAINING_FACTS).read_text())
        config = json.loads((folder / "config.json").read_text())
        rows.append(
            _row(
                (
                    name,
                    f"{facts['num_parameters']:,}",
                    f"{config['num_hidden_layers']} x {config['hidden_size']}",
                    facts["num_steps"],
                    f"{facts['num_tokens'] / 1e6:.1f} M",
                    f"{facts['wall_clock_s'] / 60:.0f}",
                    facts["recipe"]["seed"],
                    f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f}",
                )
            )
        )
    return rows
