"""Steps that are recorded for fixed shapes give what other steps give."""

import dataclasses
import random
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from models.card import read_card
from models.engines.stacked.architecture import read_architecture
from models.engines.stacked.cache import Arena
from models.engines.stacked.graphs import DecodeGraphs
from models.engines.stacked.layout import Part, Run, build_step
from models.engines.stacked.matrices import Pack, as_int8, as_they_are
from models.engines.stacked.model import StackedModel
from models.engines.stacked.runner import Runner
from models.engines.stacked.scheduler import Scheduler
from models.engines.stacked.weights import load_weights
from tests.models.engines.stacked.tiny import ARCHITECTURES, make_sequence, save_checkpoint

Launch = Callable[[], Tensor]


def save_school(folder: Path, kind: str, size: int) -> list[Path]:
    """Random checkpoints of one shape (seeds 0, 1, ...)."""
    return [save_checkpoint(folder / f"{seed}", kind, seed=seed) for seed in range(size)]


def answers(
    folders: list[Path],
    record: Callable[[Launch], Launch] | None,
    pack: Pack[Any] = as_they_are,
) -> list[list[int]]:
    """The tokens of ten requests that come and go (seed 0): all lengths and sets of members."""
    runner = Runner(
        [read_card(folder) for folder in folders],
        kv_memory_bytes=2**22,
        device=torch.device("cpu"),
        dtype=torch.float32,
        pack=pack,
        num_threads=1,
        record=record,
    )
    scheduler, rng = Scheduler(runner.arena, step_rows=64), random.Random(0)
    sequences = []
    for _ in range(10):
        members = sorted(rng.sample(range(len(folders)), rng.randint(1, len(folders))))
        prompt = [rng.randrange(300) for _ in range(rng.randint(1, 90))]
        sequences.append(make_sequence(prompt, tuple(members)))
    late = list(sequences)
    with torch.inference_mode():
        for step in range(60):
            if step % 2 == 0 and late:
                scheduler.add(late.pop())
            parts = scheduler.next_step()
            if not parts:
                continue
            drawn = runner.step(parts).drawn
            sampling = [part.sequence for part in parts if part.drafts]
            for part in parts:
                part.sequence.num_cached += part.num_tokens
            for sequence, token in zip(sampling, drawn.token_ids if drawn else [], strict=True):
                sequence.tokens.append(token)
                if sequence.num_generated == sequence.max_new_tokens:
                    scheduler.remove(sequence)
    assert not scheduler.running
    return [sequence.tokens for sequence in sequences]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_recorded_steps_change_no_token(kind: str, tmp_path: Path) -> None:
    """A graph that is loaded again and again, with other members, lengths and padding, gives the
    tokens of steps that are laid out for each batch."""
    recorded = []

    def record(step: Launch) -> Launch:
        # A recording holds addresses, not the tensors there.
        reference = weakref.ref(step)
        recorded.append(reference)

        def replay() -> Tensor:
            kept = reference()
            assert kept is not None
            return kept()

        return replay

    folders = save_school(tmp_path, kind, 3)
    assert answers(folders, record) == answers(folders, None)
    assert 3 <= len(recorded) <= 10  # shapes recur


@pytest.fixture
def nothing_in_new_memory() -> Iterator[None]:
    """What was never written is no number: whoever reads it, is found out."""
    torch.use_deterministic_algorithms(True)  # of which this is a part
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nothing_in_new_memory")
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("pack", [as_they_are, as_int8])
def test_nobody_reads_what_was_never_written(
    tmp_path: Path, pack: Pack[Any], *, recorded: bool
) -> None:
    """Not even times nothing, as a weight of 0 would: 0 times what is no number is none."""
    folders = save_school(tmp_path, "llama", 1 if pack is as_int8 else 3)
    record = (lambda step: step) if recorded else None
    told = answers(folders, record, pack)
    torch.use_deterministic_algorithms(False)
    assert told == answers(folders, record, pack)


def test_recorded_steps_of_integers_change_no_answer(tmp_path: Path) -> None:
    """One checkpoint in int8, whose rows come without their members' runs, as on CUDA. Its products
    are rounded to bfloat16, so that where two tokens are as likely one of ten answers may turn: a
    sum in float32 differs in its last place by where its numbers lie in memory."""
    folders = save_school(tmp_path, "llama", 1)
    recorded, plain = (answers(folders, how, as_int8) for how in (lambda step: step, None))
    assert sum(one == other for one, other in zip(recorded, plain, strict=True)) >= 9


def test_a_device_that_records_nothing_still_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where recording fails, once, steps run as they would without."""
    tries = []

    def fail(step: Launch) -> Launch:
        tries.append(step)
        raise RuntimeError("operation not permitted when stream is capturing")

    folders = save_school(tmp_path, "llama", 2)
    assert answers(folders, fail) == answers(folders, None)
    assert len(tries) == 1
    assert "records no graphs" in caplog.text


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_recorded_step_waits_for_no_value(kind: str, tmp_path: Path) -> None:
    """In bfloat16, as on CUDA, a recorded step asks for no tensor's value, which no graph could
    hold. (It runs on tensors without data: any value asked for raises.)"""
    cards = [read_card(folder) for folder in save_school(tmp_path, kind, 3)]
    architecture, cpu = read_architecture(cards[0]), torch.device("cpu")
    weights = load_weights(cards, architecture, cpu, torch.bfloat16, pack=as_they_are)
    sequences = [make_sequence([5] * length, (0, 2)) for length in (3, 70)]
    for start, sequence in enumerate(sequences):
        sequence.region_start, sequence.num_cached = 500 * start, len(sequence.tokens) - 1
    parts = [Part(sequence=sequence, num_tokens=1) for sequence in sequences]
    step = build_step(parts, num_members=3, row_bytes=512, device=cpu)
    steps = []

    def record(step: Launch) -> Launch:
        steps.append(step)
        return step

    with FakeTensorMode(), torch.inference_mode():
        model = StackedModel(architecture, without_data(weights))
        arena = Arena(architecture.shape, 2**20, cpu, torch.bfloat16)
        graphs = DecodeGraphs(model, arena, num_members=3, record=record)
        logits = graphs.logits(without_data(step))
    assert logits is not None
    assert (logits.shape, logits.dtype) == ((4, 320), torch.float32)
    assert len(steps) == 1


def without_data(value: Any) -> Any:
    """Return `value` with tensors of the same shapes and types in it, in a mode without data."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype)
    if isinstance(value, tuple | list):
        return type(value)(without_data(each) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, Part | Run):
        fields = (field.name for field in dataclasses.fields(value))
        return dataclasses.replace(
            value, **{name: without_data(getattr(value, name)) for name in fields}
        )
    return value
