"""What the training tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

_POOL = Path(__file__).parents[3] / "models" / "pools" / "default"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices are slower on many threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The pool's tokenizer as shipped; a test builds it anew and compares."""
    loaded = PreTrainedTokenizerFast.from_pretrained(_POOL / "base")
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded
