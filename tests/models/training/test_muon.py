"""Muon against torch's own and against the iteration in double precision."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from models.training import muon
from models.training.muon import Muon, orthogonal

_SHAPES = ((24, 24), (40, 16), (16, 40), (24, 24), (40, 16))


def _train(optimizer: torch.optim.Optimizer, matrices: list[Parameter], num_steps: int) -> None:
    """Steps down a different bowl for every matrix."""
    torch.manual_seed(1)
    goals = [torch.randn(matrix.shape) for matrix in matrices]
    for _ in range(num_steps):
        optimizer.zero_grad()
        losses = [((m - g) ** 2).sum() for m, g in zip(matrices, goals, strict=True)]
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def test_it_moves_matrices_as_torch_does() -> None:
    """After 30 steps all matrices, of three shapes, are where torch's Muon brings them, as nearly
    as bfloat16 tells (torch iterates in that)."""
    torch.manual_seed(0)
    starts = [torch.randn(shape) for shape in _SHAPES]
    ours, theirs = ([Parameter(start.clone()) for start in starts] for _ in range(2))
    _train(Muon(ours, lr=0.05, weight_decay=0.1), ours, 30)
    other = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    _train(other, theirs, 30)
    for start, one, their in zip(starts, ours, theirs, strict=True):
        moved = (their - start).norm()
        assert moved > 1
        assert (one - their).norm() < 0.02 * moved


@pytest.mark.parametrize("shape", [(3, 20, 20), (2, 40, 16), (2, 16, 40)])
def test_orthogonal_is_the_quintic_of_each_singular_value(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32: singular vectors stay, and singular values go through the polynomial (NumPy)."""
    monkeypatch.setattr(muon, "fast_bfloat16", lambda _: False)
    torch.manual_seed(2)
    matrices = torch.randn(shape)
    for matrix, found in zip(matrices.double().numpy(), orthogonal(matrices), strict=True):
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        values /= np.linalg.norm(values)
        for _ in range(5):
            values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
        np.testing.assert_allclose(found.numpy(), left * values @ right, atol=2e-4)


def test_a_matrix_without_a_gradient_stays() -> None:
    """Neither its momentum nor weight decay touches what a step does not train."""
    trained, left = Parameter(torch.ones(4, 4)), Parameter(torch.ones(4, 4))
    optimizer = Muon([trained, left], lr=0.1, weight_decay=0.5)
    loss: Tensor = (trained**2).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert not trained.equal(torch.ones(4, 4))
    assert left.equal(torch.ones(4, 4))
