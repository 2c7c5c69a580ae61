"""Threads by work."""

from __future__ import annotations

import threading

import pytest
import torch

from models.engines.stacked.threads import StepThreads, in_own_thread

MB = 2**20


def test_threads_grow_with_work_up_to_the_limit() -> None:
    """A small member gets one thread, eight members or a long prompt several, up to the limit."""
    threads = StepThreads(4, 2 * MB)
    assert threads.deserved(1, 1) == 1
    assert threads.deserved(8, 8) == 4
    assert threads.deserved(1, 512) == 4
    assert StepThreads(2, 2 * MB).deserved(8, 8) == 2
    assert StepThreads(1, 2**30).deserved(8, 8) == 1


def test_a_step_leaves_the_number_as_it_was() -> None:
    """Inside, torch has what the step deserves; after an error, too, it has the limit again."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        threads = StepThreads(None, MB)
        with pytest.raises(RuntimeError), threads.step(1, 1):
            assert torch.get_num_threads() == 1
            raise RuntimeError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


async def test_what_computes_once_leaves_no_thread_behind() -> None:
    """Neither when it returns nor when it raises, so that OpenMP's helpers of it are gone."""

    def where(fails: bool) -> threading.Thread:
        if fails:
            raise ValueError("here")
        return threading.current_thread()

    thread = await in_own_thread(where, fails=False)
    thread.join(10)
    assert not thread.is_alive()
    before = threading.active_count()
    with pytest.raises(ValueError, match="here"):
        await in_own_thread(where, fails=True)
    assert threading.active_count() <= before + 1  # the last may be about to end
