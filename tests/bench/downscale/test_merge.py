"""Rivals of the pipeline: chunks merged back into one model, and cuts by the spectrum alone."""

import copy
from dataclasses import asdict

import pytest
import torch

from models.downscale.cut import activation_importance, cut
from models.downscale.recipe import MemberShape
from models.downscale.shape import shape_of, solve_shape
from tests.bench.downscale.merge import Descendant, merge
from tests.bench.downscale.spectrum import spectrum_importance
from tests.models.downscale.tiny_models import ARCHITECTURES, random_conversations, tiny_model


def _descendants(architecture: str, count: int = 2) -> tuple[object, list[Descendant]]:
    base = tiny_model(architecture)
    parameters = round(0.4 * sum(p.numel() for p in base.parameters()))
    shape = solve_shape(base.config, parameters, MemberShape())
    found = []
    for seed in range(count):
        importance = activation_importance(base, random_conversations(seed=seed))
        chunk, report = cut(base, importance, shape)
        found.append(Descendant(adapted=copy.deepcopy(chunk), cut=chunk, kept=asdict(report)))
    return base, found


@pytest.mark.parametrize("method", ["average", "ties"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_chunks_that_learnt_nothing_leave_the_base(architecture: str, method: str) -> None:
    """Untrained chunks merge to the base itself."""
    base, chunks = _descendants(architecture)
    merged = merge(base, chunks, method=method)
    for ours, theirs in zip(merged.parameters(), base.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_a_chunk_learnt_is_found_at_its_places(architecture: str) -> None:
    """Cutting the merged model in the same way finds the base's weights moved by the task vector.

    Everything moves by 0.1, and nothing else does.
    """
    base, [chunk] = _descendants(architecture, count=1)
    with torch.no_grad():
        for parameter in chunk.adapted.parameters():
            parameter.add_(0.1)
    merged = merge(base, [chunk], method="average")
    moved = [
        (ours - theirs) for ours, theirs in zip(merged.parameters(), base.parameters(), strict=True)
    ]
    values = torch.cat([move.flatten() for move in moved])
    held = values.abs() > 1e-6
    torch.testing.assert_close(values[held], torch.full_like(values[held], 0.1), atol=1e-5, rtol=0)
    kept = sum(p.numel() for p in chunk.cut.parameters())
    assert int(held.sum()) == kept
    embedding = dict(merged.named_parameters())["model.embed_tokens.weight"]
    before = dict(base.named_parameters())["model.embed_tokens.weight"]
    columns = (embedding - before).abs().sum(0).nonzero()[:, 0].tolist()
    assert columns == list(chunk.kept["hidden"])
    assert shape_of(merged.config) == shape_of(base.config)


def test_ties_elects_a_sign_and_drops_small_changes() -> None:
    """Of two opposite changes the larger one wins alone; entries below the top fifth are lost."""
    base, [one, other] = _descendants("llama")
    other = Descendant(adapted=copy.deepcopy(one.cut), cut=one.cut, kept=one.kept)
    name = "model.norm.weight"
    with torch.no_grad():
        for chunk, scale in ((one, 1.0), (other, -0.4)):
            norm = dict(chunk.adapted.named_parameters())[name]
            norm.add_(scale * torch.linspace(0.1, 1.0, len(norm)))
    merged = merge(base, [one, other], method="ties")
    move = dict(merged.named_parameters())[name] - dict(base.named_parameters())[name]
    there = move[move.abs() > 1e-6]
    assert len(there) == round(0.2 * len(one.kept["hidden"]))
    assert (there > 0.75).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_spectrum_needs_no_examples_and_cuts(architecture):
    """The calibration-free scores have the same shapes, and a cut by them works."""
    model = tiny_model(architecture)
    importance = spectrum_importance(model)
    shape = solve_shape(model.config, model.num_parameters() // 4, MemberShape())
    chunk, _ = cut(model, importance, shape)
    assert chunk.num_parameters() < model.num_parameters() / 3
    assert all(torch.isfinite(parameter).all() for parameter in chunk.parameters())
    assert importance.heads_LH.shape == (4, 8)
