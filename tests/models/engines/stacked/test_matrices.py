"""How matrices are kept: what was rounded, and by how much."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.engines.stacked.matrices import (
    Int8,
    Int8Rows,
    Reordered,
    as_int4,
    as_int8,
    outputs_first,
    reordered,
)
from models.errors import PoolError
from tests.models.engines.stacked.tiny import (
    answer,
    build_engine,
    load_reference,
    request,
    save_checkpoint,
    token_ids,
)

PROMPT = [17, 250, 3, 99, 99, 301, 8, 45, 120, 77]


def random_matrices(seed: int, scale: float, *shape: int) -> torch.Tensor:
    """[M, I, O], normal, of some scale."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


needs_vnni = pytest.mark.skipif(
    not torch.cpu._is_vnni_supported(), reason="without VNNI its kernel's sums of 16 bits overflow"
)


def int8(_name: str, matrices: torch.Tensor) -> Int8:
    """Integers times rows in bfloat16, whatever the processor."""
    return Int8(matrices)


def int8_rows(_name: str, matrices: torch.Tensor) -> Int8Rows:
    """Integers times rows of integers."""
    return Int8Rows(matrices)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-4, 0.05, 30.0]),
    num_inputs=st.sampled_from([32, 96]),
    num_rows=st.sampled_from([1, 5, 17, 100]),
)
@pytest.mark.parametrize(
    ("pack", "steps"),
    [(int8, 127), pytest.param(int8_rows, 127, marks=needs_vnni), (as_int4, 7.5)],
)
def test_products_are_those_of_rounded_numbers(
    pack: Any, steps: float, seed: int, scale: float, num_inputs: int, num_rows: int
) -> None:
    """Every weight is within half a step (and bfloat16's rounding of the step) of what it was, and
    the product is numpy's with these numbers.
    """
    matrices = random_matrices(seed, scale, 2, num_inputs, 48)
    packed = pack("qkv", matrices)
    x = random_matrices(seed + 1, 1.0, num_rows, num_inputs).bfloat16()
    for member, matrix in enumerate(matrices):
        numbers = packed.member(member)
        step = matrix.abs().amax() / steps
        assert (numbers - matrix).abs().amax() <= 0.5 * step * 1.05
        exact = x.double().numpy() @ numbers.double().numpy()
        largest = np.abs(x.double().numpy()) @ np.abs(numbers.double().numpy())
        assert (np.abs(packed.times(x, member).double().numpy() - exact) <= largest / 100).all()


@needs_vnni
def test_a_row_is_rounded_as_it_would_be_alone() -> None:
    """Whatever stands beside it: rows a million times as large, zeros, outliers; and its product is
    that of 16 bits, not of 8.
    """
    matrices = random_matrices(0, 0.05, 1, 96, 48)
    packed = Int8Rows(matrices)
    x = random_matrices(1, 1.0, 4, 96) * torch.tensor([[1.0], [1e6], [0.0], [1e-6]])
    x[0, 5] = 300.0
    together = packed.times(x, 0)
    assert torch.equal(together, torch.cat([packed.times(row[None], 0) for row in x]))
    exact = x.double() @ packed.member(0).double()
    largest = x.abs().amax(1, keepdim=True) * packed.member(0).abs().sum(0)
    assert ((together - exact).abs() <= largest / 2**15).all()


def test_a_column_of_zeros_stays_zero() -> None:
    """No scale divides by zero."""
    matrices = torch.zeros(1, 32, 16)
    for pack in (int8, as_int8, as_int4):
        assert (pack("down", matrices).member(0).abs() < 1e-20).all()


def test_int4_refuses_what_its_kernel_cannot_group() -> None:
    """By the matrix's name, its sizes and what works."""
    with pytest.raises(PoolError, match=r"int4 needs .* 32 .*; down has 100 and 64; use int8"):
        as_int4("down", torch.zeros(1, 100, 64))


def test_outputs_first_changes_no_number() -> None:
    """Only the order in memory, which bfloat16's products want."""
    matrices = random_matrices(0, 1.0, 2, 8, 4)
    assert torch.equal(outputs_first("out", matrices), matrices)
    assert outputs_first("out", matrices).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 2, 9])
def test_the_order_of_one_kernel_changes_no_product(dtype: torch.dtype, num_rows: int) -> None:
    """Large matrices are multiplied as they are in any order, rounded once to their type."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN knows no bfloat16 on this processor")
    matrices = random_matrices(0, 1.0, 2, 768, 512).to(dtype)
    packed = reordered("down", matrices)
    assert isinstance(packed, Reordered)
    rows = random_matrices(1, 1.0, num_rows, 768).to(dtype)
    for member in range(2):
        found = packed.times(rows, member)
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.double(), rows.double() @ matrices[member].double(), rtol=1e-2, atol=1e-2
        )
        assert torch.equal(packed.member(member), matrices[member])


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.03), ("int8", 0.04), ("int4", 0.3)])
@pytest.mark.parametrize("tied", [True, False])
def test_answers_are_near_those_of_the_checkpoint(
    tmp_path: Path, dtype: str, most: float, tied: bool
) -> None:
    """The prompt's log-probabilities under two members against transformers in float32; the same
    whether a prompt goes through at once (more rows than integers multiply) or piece by piece.
    """
    folders = [
        save_checkpoint(tmp_path / f"{s}", seed=s, initializer_range=0.15, tie_word_embeddings=tied)
        for s in range(2)
    ]
    prompt = PROMPT * 8
    told = []
    for step_rows in (2048, 16):
        wanted = [
            request(prompt, [f"m{i}"], max_tokens=4, prompt_logprobs=0, ignore_eos=True)
            for i in range(2)
        ]
        answers = answer(build_engine(folders, dtype=dtype, step_rows=step_rows), *wanted)
        assert [len(token_ids(chunks)) for chunks in answers] == [4, 4]
        told.append([[t.logprob for c in chunks for t in c.prompt][1:] for chunks in answers])
    for member, folder in enumerate(folders):
        with torch.inference_mode():
            logits = load_reference(folder)(torch.tensor([prompt])).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].numpy()
        for values in told:
            error = np.array(values[member]) - expected
            assert error.std() < most * expected.std()
