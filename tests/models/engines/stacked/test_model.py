"""Each lane computes what transformers computes for that member alone."""

import random
from collections.abc import Sequence as Seq
from pathlib import Path

import pytest
import torch

from models.card import Shape, read_card
from models.engines.stacked import attention, matrices
from models.engines.stacked.architecture import read_architecture
from models.engines.stacked.cache import Arena
from models.engines.stacked.layout import Part, build_step, order_parts
from models.engines.stacked.matrices import fastest
from models.engines.stacked.model import StackedModel
from models.engines.stacked.sequence import Sequence
from models.engines.stacked.weights import load_weights
from tests.models.engines.stacked.tiny import (
    ARCHITECTURES,
    answer,
    build_engine,
    load_reference,
    make_sequence,
    request,
    save_checkpoint,
    token_ids,
)

PROMPT = [17, 250, 3, 99, 99, 301, 8, 45, 120, 77]
CPU = torch.device("cpu")


class Bench:
    """Members, a cache, and steps over them without engine or sampling."""

    def __init__(self, folders: Seq[Path], dtype: torch.dtype = torch.float32) -> None:
        cards = [read_card(folder) for folder in folders]
        architecture = read_architecture(cards[0])
        self.num_members = len(cards)
        self.arena = Arena(architecture.shape, 2**20, CPU, dtype)
        self.model = StackedModel(
            architecture,
            load_weights(
                cards, architecture, CPU, dtype, pack=fastest(CPU, dtype, several_rows=True)
            ),
        )

    def sequence(self, tokens: Seq[int], members: tuple[int, ...]) -> Sequence:
        """A request with room for 8 more tokens, admitted."""
        sequence = make_sequence(tokens, members)
        sequence.region_start = self.arena.allocate(sequence.num_rows)
        return sequence

    def step(self, *parts: tuple[Sequence, int]) -> dict[Sequence, torch.Tensor]:
        """Run a step; return every sequence's logits, [lanes, tokens, V]."""
        ordered = order_parts([Part(sequence=s, num_tokens=n) for s, n in parts])
        step = build_step(ordered, num_members=self.num_members, row_bytes=512, device=CPU)
        with torch.inference_mode():
            hidden = self.model.forward(step.layout, self.arena)
            logits = self.model.logits(hidden, step.layout.rows)
        if step.layout.order is not None:
            logits = logits[step.layout.order.to_requests_N]
        split = logits.split([part.num_rows for part in ordered])
        for part in ordered:
            part.sequence.num_cached += part.num_tokens
        return {
            part.sequence: rows.view(part.sequence.num_lanes, part.num_tokens, -1)
            for part, rows in zip(ordered, split, strict=True)
        }


@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_are_those_of_transformers(
    kind: str, reordered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every position's logits match to 1e-4 in fp32, prefilled whole, in chunks, and decoded; with
    matrices as they are, and in oneDNN's order as large ones are kept."""
    if reordered:
        monkeypatch.setattr(matrices, "_MOST_AS_THEY_ARE", 0)
    folders = [save_checkpoint(tmp_path / f"{seed}", kind, seed=seed) for seed in range(2)]
    bench = Bench(folders)
    for chunks in ([10], [4, 1, 5], [7, 1, 1, 1]):
        sequence = bench.sequence(PROMPT, (0, 1))
        logits = torch.cat([bench.step((sequence, n))[sequence] for n in chunks], dim=1)
        for member, folder in enumerate(folders):
            with torch.inference_mode():
                theirs = load_reference(folder)(torch.tensor([PROMPT])).logits[0]
            torch.testing.assert_close(logits[member], theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_greedy_tokens_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    """64 greedy tokens per member are identical, all members answering in one batch."""
    folders = [save_checkpoint(tmp_path / f"{seed}", kind, seed=seed) for seed in range(3)]
    prompts = [PROMPT, PROMPT[:3], PROMPT * 4]
    answers = answer(
        build_engine(folders),
        *(
            request(prompt, [f"m{i}"], max_tokens=64, ignore_eos=True)
            for i, prompt in enumerate(prompts)
        ),
    )
    for folder, prompt, chunks in zip(folders, prompts, answers, strict=True):
        reference = load_reference(folder)
        reference.generation_config.eos_token_id = None
        tokens = reference.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, pad_token_id=0
        )
        assert token_ids(chunks) == tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("together", [True, False])
def test_mixed_batches(tmp_path: Path, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Different member sets, lengths and phases in one step, attended together or one by one,
    give what each gives alone."""
    monkeypatch.setattr(attention, "_BYTES_PER_CALL", 1e9 if together else 0)
    bench = Bench([save_checkpoint(tmp_path / f"{seed}", seed=seed) for seed in range(4)])
    wanted = [([5, 6, 7], (0, 2)), (PROMPT, (1,)), (PROMPT[:6], (0, 1, 2, 3)), ([9], (3,))]
    alone = []
    for tokens, members in wanted:
        sequence = bench.sequence(tokens, members)
        alone.append(bench.step((sequence, len(tokens)))[sequence][:, -1])
    sequences = [bench.sequence(tokens, members) for tokens, members in wanted]
    for sequence in sequences[:3]:
        bench.step((sequence, len(sequence.tokens) - 1 - (sequence is sequences[2])))
    mixed = bench.step(*((s, s.num_pending) for s in sequences))
    for sequence, expected in zip(sequences, alone, strict=True):
        torch.testing.assert_close(mixed[sequence][:, -1], expected, atol=1e-5, rtol=1e-4)


def test_bfloat16_is_close(tmp_path: Path) -> None:
    """In bfloat16 the distributions are those of transformers in bfloat16 within its precision."""
    folders = [save_checkpoint(tmp_path / "m", initializer_range=0.05)]
    bench = Bench(folders, torch.bfloat16)
    sequence = bench.sequence(PROMPT, (0,))
    ours = bench.step((sequence, len(PROMPT)))[sequence][0].softmax(-1)
    with torch.inference_mode():
        theirs = load_reference(folders[0])(torch.tensor([PROMPT])).logits[0].softmax(-1)
    assert 0.5 * (ours - theirs).abs().sum(-1).max() < 0.02


def test_cache_regions_never_overlap() -> None:
    """Random allocation (seed 0): regions are disjoint, and all rows come back."""
    shape = Shape(
        architecture="llama",
        num_layers=2,
        hidden_size=8,
        intermediate_size=8,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        vocab_size=8,
    )
    arena = Arena(shape, 64 * 1024, CPU, torch.float32)
    rng, taken = random.Random(0), dict[int, int]()
    for _ in range(500):
        if taken and rng.random() < 0.5:
            start = rng.choice(sorted(taken))
            arena.release(start, taken.pop(start))
        else:
            size = rng.randint(1, arena.num_rows // 4)
            start_or_none = arena.allocate(size)
            if start_or_none is not None:
                taken[start_or_none] = size
        rows = [row for start, size in taken.items() for row in range(start, start + size)]
        assert len(rows) == len(set(rows)) == arena.num_rows_used
        assert not rows or max(rows) < arena.num_rows
    for start, size in taken.items():
        arena.release(start, size)
    assert arena.allocate(arena.num_rows) == 0
