"""Drafts, and leads that run alone, with SmolLM2 on the `stacked` engine: tokens/s, side by side.

    python -m tests.bench.real_drafts [--only KIND] [--gates G ...]

Answers of 200 greedy tokens. One engine is asked in two ways in turn, `--rounds` times after one
that does not count: as it comes, and so that nothing is spared (who wants the prompt's
log-probabilities gets no drafts, and everybody computes every token). Ratios are medians over
rounds; the tokens of both are compared. The members of a fused answer are SmolLM2-135M with noise
of their own on every matrix, an eighth of its standard deviation: alike enough to agree mostly, as
chunks of one base do. The chunk is SmolLM2 without half of its layers, which nobody trained to
agree: it shows that drafts which do not pay turn themselves off. A chunk that was trained is the
shipped school's for arithmetic, before its base: their answers are short, so questions are asked
one after another, and their steps are the interpreter's more than the weights'. The ceiling is how
often a second the weights of those who answer can be read, of a gated answer the lead's; drafts may
pass it, as they get several tokens out of one reading.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from models.downscale.dequantize import dequantize
from models.engines.base import GenerationRequest
from models.pool import DEFAULT_POOL, load_pool
from models.sources.locate import locate
from models.tokenizer import load_tokenizer
from policies.outcomes import read_outcomes
from tests.bench.harness import Row, print_row, read_bytes_per_s, save
from tests.bench.real import ROOT, SOURCE
from tests.bench.real_contenders import greedy, start_engine

NUM_TOKENS, NOISE, GATES = 200, 0.125, (0.3, 0.5, 0.9)
MEMBERS, WEIGHTS = ("m0", "m1", "m2", "m3"), (0.4, 0.2, 0.2, 0.2)
NUM_ASKED = 60
_ids = count()


class Running:
    """An engine that runs in a loop of its own, over folders named m0, m1, ..."""

    def __init__(
        self,
        stack: ExitStack,
        folders: list[Path],
        dtype: str,
        leads: tuple[str, ...] = (),
        **options: Any,
    ) -> None:
        self._runner, self.engine = start_engine("stacked", folders, stack, dtype, options, leads)

    def ask(self, request: GenerationRequest) -> tuple[float, list[int]]:
        """Return tokens per second after the first, and the tokens."""
        return self._runner.run(self._ask(request))

    async def _ask(self, request: GenerationRequest) -> tuple[float, list[int]]:
        first_s, tokens = 0.0, list[int]()
        request = replace(request, request_id=str(next(_ids)))
        async for chunk in self.engine.generate(request):
            first_s = first_s or time.perf_counter()
            tokens += [token.token_id for token in chunk.tokens]
        return (len(tokens) - 1) / (time.perf_counter() - first_s), tokens

    def told(self, request: GenerationRequest) -> list[float]:
        """Return the log-probabilities of the prompt's tokens."""

        async def read() -> list[float]:
            chunks = self.engine.generate(replace(request, request_id=str(next(_ids))))
            return [t.logprob async for c in chunks for t in c.prompt if t.logprob is not None]

        return self._runner.run(read())


def asked(
    tokens: list[int], members: tuple[str, ...] = ("m0",), **fields: Any
) -> GenerationRequest:
    """A greedy request of `NUM_TOKENS`."""
    return replace(greedy(tokens, NUM_TOKENS), members=members, **fields)


def plainly(request: GenerationRequest) -> GenerationRequest:
    """The same without drafts, and with everybody at every token."""
    return replace(request, sampling=replace(request.sampling, prompt_logprobs=0))


def compare(
    name: str,
    running: Running,
    ours: GenerationRequest,
    other: GenerationRequest | None = None,
    *,
    rounds: int,
    ceiling: float | None = None,
) -> Row:
    """Ask in two ways in turn; None: `ours` plainly. Return their rates and the median ratio."""
    rates: list[tuple[float, float]] = []
    same, before = True, running.engine.stats()
    for number in range(rounds + 1):
        (one, tokens), (two, others) = running.ask(ours), running.ask(other or plainly(ours))
        same &= tokens == others
        if number:
            rates.append((one, two))
            print(f"{name}: {one:.1f} {two:.1f}", file=sys.stderr, flush=True)
    after = running.engine.stats()
    done = {
        key: getattr(after, key) - getattr(before, key)
        for key in (
            "drafted_tokens_total",
            "accepted_tokens_total",
            "gated_tokens_total",
            "fused_tokens_total",
        )
    }
    return {
        "name": name,
        "unit": "times the tokens/s",
        "ours": round(statistics.median(one for one, _ in rates), 1),
        "other": round(statistics.median(two for _, two in rates), 1),
        "measured": round(statistics.median(one / two for one, two in rates), 2),
        "ceiling": None if ceiling is None else round(ceiling, 1),
        "same_tokens": same,
        **{key: value for key, value in done.items() if value},
    }


def siblings(folder: Path, into: Path, number: int) -> list[Path]:
    """Write `number` checkpoints like `folder`, each with noise of its own."""
    weights = load_file(folder / "model.safetensors")
    paths = []
    for seed in range(number):
        path = into / f"sibling{seed}"
        paths.append(path)
        if path.exists():
            continue
        _copied(folder, path)
        random = torch.Generator().manual_seed(seed)
        noisy = {
            name: matrix + NOISE * matrix.std() * torch.randn(matrix.shape, generator=random)
            if matrix.dim() == 2
            else matrix
            for name, matrix in weights.items()
        }
        save_file(noisy, path / "model.safetensors", {"format": "pt"})
    return paths


def shallow(folder: Path, into: Path) -> Path:
    """Write `folder` without every second layer."""
    path, weights = _copied(folder, into / "shallow"), load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    num_layers = config["num_hidden_layers"] // 2
    kept = {}
    for name, value in weights.items():
        before, layers, rest = name.partition(".layers.")
        if not layers:
            kept[name] = value
            continue
        layer, _, rest = rest.partition(".")
        if int(layer) % 2 == 0:
            kept[f"{before}{layers}{int(layer) // 2}.{rest}"] = value
    save_file(kept, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": num_layers}))
    return path


def _copied(folder: Path, path: Path) -> Path:
    path.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, path)
    return path


def base_rows(folder: Path, temporary: Path, dtype: str, rounds: int) -> Iterator[Row]:
    """One model: n-grams where the answer copies and where it does not, and a chunk."""
    ceiling = passes_per_s(folder, dtype)
    copies, writes = _prompts(folder)
    with ExitStack() as stack:
        grams = Running(stack, [folder], dtype, draft="ngram")
        for what, prompt in (("copies", copies), ("writes", writes)):
            name, request = f"n-grams, an answer that {what}", asked(prompt)
            yield compare(name, grams, request, rounds=rounds, ceiling=ceiling)
    with ExitStack() as stack:
        chunk = [folder, shallow(folder, temporary)]
        drafted = Running(stack, chunk, dtype, draft={"member": "m1"})
        name = "an untrained chunk of half the layers"
        yield compare(name, drafted, asked(writes), rounds=rounds, ceiling=ceiling)


def passes_per_s(folder: Path, dtype: str, *, number: int = 1) -> float:
    """How often the weights of so many such models can be read in a second."""
    num_bytes = (folder / "model.safetensors").stat().st_size // (2 if dtype == "bfloat16" else 1)
    return read_bytes_per_s(number * num_bytes) / (number * num_bytes)


def fused_rows(folder: Path, temporary: Path, dtype: str, rounds: int) -> Iterator[Row]:
    """Four fused: with drafts of the heaviest and without, and beside one."""
    _, prompt = _prompts(folder)
    with ExitStack() as stack:
        folders = siblings(folder, temporary, len(MEMBERS))
        running = Running(stack, folders, dtype, draft="heaviest")
        fused = asked(prompt, MEMBERS, weights=WEIGHTS)
        ceiling = passes_per_s(folder, dtype, number=len(MEMBERS))
        yield compare("four fused, with drafts", running, fused, rounds=rounds, ceiling=ceiling)
        one, every = plainly(asked(prompt)), plainly(fused)
        yield compare("four fused beside one", running, every, one, rounds=rounds, ceiling=ceiling)


def gated_rows(
    folder: Path, temporary: Path, dtype: str, rounds: int, gates: Seq[float]
) -> Iterator[Row]:
    """Four fused where the lead is unsure: the share of such tokens, and what that does to loss."""
    _, prompt = _prompts(folder)
    with ExitStack() as stack:
        running = Running(stack, siblings(folder, temporary, len(MEMBERS)), dtype)
        fused = asked(prompt, MEMBERS, weights=WEIGHTS)
        for gate in gates:
            lead = replace(fused, rule="gated", gate=gate)
            ceiling = passes_per_s(folder, dtype)  # where the lead is always sure
            yield compare(f"gated at {gate}", running, lead, rounds=rounds, ceiling=ceiling)
        yield from _losses(running, folder, gates)


def school_rows(rounds: int) -> Iterator[Row]:
    """The school's base beside its arithmetic chunk, which drafts for it or leads it."""
    told = read_outcomes(DEFAULT_POOL / "outcomes.jsonl")
    texts = [row.query for row in told if row.split == "test" and row.tags == ("arithmetic",)]
    tokenizer = load_tokenizer(load_pool(DEFAULT_POOL).model("base"))
    sampling = replace(asked([]).sampling, max_tokens=32, ignore_eos=False)
    prompts = [
        tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts[:NUM_ASKED]
    ]
    plain = [replace(asked(list(prompt)), sampling=sampling) for prompt in prompts]
    led = {"members": ("m1", "m0"), "weights": (0.0, 1.0), "rule": "gated"}
    with ExitStack() as stack:
        folders = [DEFAULT_POOL / "base", DEFAULT_POOL / "arithmetic"]
        running = Running(stack, folders, "float32", leads=("m1",), draft={"member": "m1"})
        ways = {"the school's base, its chunk drafts": plain} | {
            f"the school's base, its chunk leads at {gate}": [
                replace(request, gate=gate, **led) for request in plain
            ]
            for gate in GATES
        }
        alone = [plainly(request) for request in plain]
        for name, ours in ways.items():
            rates = []
            for number in range(rounds + 1):
                one, two = (_answers_per_s(running, way) for way in (ours, alone))
                if number:
                    rates.append((one, two))
            yield {
                "name": name,
                "unit": "times the answers/s",
                "ours": round(statistics.median(one for one, _ in rates), 1),
                "other": round(statistics.median(two for _, two in rates), 1),
                "measured": round(statistics.median(one / two for one, two in rates), 2),
            }


def _answers_per_s(running: Running, requests: Seq[GenerationRequest]) -> float:
    started_s = time.perf_counter()
    for request in requests:
        running.ask(request)
    return len(requests) / (time.perf_counter() - started_s)


def _losses(running: Running, folder: Path, gates: Seq[float]) -> Iterator[Row]:
    """What lead, mixture and gates say of the README, in nats per token."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode((ROOT / "README.md").read_text()).ids[: 4 * 256]
    fused = replace(asked([]), members=MEMBERS, weights=WEIGHTS)
    ways = {"the lead alone": asked([]), "the mixture": fused} | {
        f"gated at {gate}": replace(fused, rule="gated", gate=gate) for gate in gates
    }
    for name, way in ways.items():
        told = []
        for start in range(0, len(ids), 256):
            request = plainly(replace(way, prompt_tokens=tuple(ids[start : start + 256])))
            sampling = replace(request.sampling, max_tokens=1)
            told += running.told(replace(request, sampling=sampling))
        yield {
            "name": f"loss of {name}",
            "unit": "nats",
            "measured": round(-sum(told) / len(told), 4),
        }


def _prompts(folder: Path) -> tuple[list[int], list[int]]:
    """One prompt whose answer copies, one whose answer is new."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = (ROOT / "CHANGELOG.md").read_text()[100:1000]
    turns = (
        f"Repeat this text word by word, and nothing else:\n\n{text}",
        "Tell me a long story about a lighthouse keeper and a whale.",
    )
    copies, writes = (
        f"<|im_start|>user\n{turn}<|im_end|>\n<|im_start|>assistant\n" for turn in turns
    )
    return tokenizer.encode(copies).ids, tokenizer.encode(writes).ids


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.real_drafts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", choices=("base", "fused", "gated", "school"))
    parser.add_argument("--gates", type=float, nargs="+", default=GATES)
    parser.add_argument("--folder", type=Path, help="SmolLM2 as safetensors; made if not given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        into = Path(temporary)
        folder = arguments.folder or dequantize(locate(SOURCE, folder=Path()).path, into / "base")
        rows: list[Row] = []
        dtype, rounds = arguments.dtype, arguments.rounds
        kinds: dict[str, Iterator[Row]] = {
            "base": base_rows(folder, into, dtype, rounds),
            "fused": fused_rows(folder, into, dtype, rounds),
            "gated": gated_rows(folder, into, dtype, rounds, arguments.gates),
            "school": school_rows(rounds),
        }
        for kind, measured in kinds.items():
            if arguments.only in (None, kind):
                for row in measured:
                    print_row(row)
                    rows.append(row)
    save(rows, "real-drafts")


if __name__ == "__main__":
    main()
