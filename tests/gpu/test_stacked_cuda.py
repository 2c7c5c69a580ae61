"""The stacked engine on CUDA gives what it gives on CPU."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from models.card import read_card
from models.engines.stacked.layout import Part, build_step, order_parts
from models.engines.stacked.matrices import Pack, as_int8, as_they_are
from models.engines.stacked.runner import Runner
from models.engines.stacked.scheduler import Scheduler
from tests.models.engines.stacked.tiny import ARCHITECTURES, make_sequence, save_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    ("kind", "pack", "members"),
    [*((kind, as_they_are, 3) for kind in ARCHITECTURES), ("llama", as_int8, 1)],
)
def test_logits_are_those_of_the_cpu(
    kind: str, pack: Pack[Any], members: int, tmp_path: Path
) -> None:
    """Mixed prefill and decode of different member sets (seed 0): distributions in bfloat16 on
    CUDA are within 2% total variation of float32 on CPU, with matrices of one kind."""
    folders = [
        save_checkpoint(tmp_path / f"{s}", kind, seed=s, initializer_range=0.05)
        for s in range(members)
    ]
    probabilities = []
    for name, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        device, rng = torch.device(name), random.Random(0)
        runner = Runner(
            [read_card(folder) for folder in folders],
            kv_memory_bytes=2**22,
            device=device,
            dtype=dtype,
            pack=pack,
        )
        sequences = [
            make_sequence([rng.randrange(300) for _ in range(length)], lanes)
            for length, lanes in ((5, (0,)), (9, (0, 1, 2)), (30, (1, 2)), (7, (2,)))
            if members > max(lanes)
        ]
        for sequence in sequences:
            sequence.region_start = runner.arena.allocate(sequence.num_rows)
        with torch.inference_mode():
            for leave in (1, 0):  # first all but the last token of some, then a mixed step
                parts = order_parts(
                    Part(sequence=sequence, num_tokens=sequence.num_pending - leave)
                    for sequence in (sequences[:2] if leave else sequences)
                )
                step = build_step(parts, num_members=members, row_bytes=1, device=device)
                hidden = runner._model.forward(step.layout, runner.arena)
                logits = runner._model.logits(hidden, step.layout.rows)
                for part in parts:
                    part.sequence.num_cached += part.num_tokens
        probabilities.append(logits.cpu().softmax(-1))
    assert 0.5 * (probabilities[0] - probabilities[1]).abs().sum(-1).max() < 0.02


def test_answers_stream(tmp_path: Path) -> None:
    """Requests of every kind finish on CUDA through the public interface."""
    from models.engines.registry import create_engine
    from models.spec import EngineSpec, Model, ModelSpec
    from tests.models.engines.stacked.tiny import answer, request, token_ids

    folders = [save_checkpoint(tmp_path / f"{seed}", seed=seed) for seed in range(2)]
    engine = create_engine(
        EngineSpec(name="cuda", kind="stacked", device="cuda", kv_memory_bytes=2**22),
        [
            Model(
                spec=ModelSpec(name=f"m{i}", engine="cuda", checkpoint=str(folder)),
                card=read_card(folder),
            )
            for i, folder in enumerate(folders)
        ],
    )
    wanted = [
        request([5, 6, 7], ["m0", "m1"][: 1 + i % 2], seed=i, ignore_eos=True, **options)
        for i, options in enumerate(
            [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}, {"top_logprobs": 3}]
        )
    ]
    assert [len(token_ids(chunks)) for chunks in answer(engine, *wanted)] == [16] * 4


def test_graphs_change_no_answer(tmp_path: Path) -> None:
    """Requests that come and go get the tokens on recorded steps that they get without (greedy)."""
    folders = [
        save_checkpoint(tmp_path / f"{seed}", seed=seed, initializer_range=0.08)
        for seed in range(3)
    ]
    answers = []
    for records in (True, False):
        runner = Runner(
            [read_card(folder) for folder in folders],
            kv_memory_bytes=2**22,
            device=torch.device("cuda"),
            dtype=torch.bfloat16,
            pack=as_they_are,
        )
        assert runner._graphs is not None
        if not records:
            runner._graphs = None
        rng, scheduler = random.Random(0), Scheduler(runner.arena, step_rows=64)
        sequences = [
            make_sequence([rng.randrange(300) for _ in range(length)], members)
            for length, members in ((5, (0,)), (9, (0, 1, 2)), (70, (1, 2)), (7, (2,)))
        ]
        late = list(sequences)
        with torch.inference_mode():
            while late or scheduler.running:
                if late:
                    scheduler.add(late.pop())
                parts = scheduler.next_step()
                drawn = runner.step(parts).drawn
                sampling = [part.sequence for part in parts if part.samples]
                for part in parts:
                    part.sequence.num_cached += part.num_tokens
                tokens = drawn.token_ids if drawn else []
                for sequence, token in zip(sampling, tokens, strict=True):
                    sequence.tokens.append(token)
                    if sequence.num_generated == sequence.max_new_tokens:
                        scheduler.remove(sequence)
        if records:
            assert runner._graphs is not None
            assert runner._graphs._graphs, "nothing was recorded"
        answers.append([sequence.tokens for sequence in sequences])
    assert answers[0] == answers[1]
