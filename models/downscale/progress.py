"""Progress bars on a terminal; nothing where the output is not one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(total: int, name: str, *, unit: str) -> Iterator[Callable[[int], None]]:
    """Show a bar while the block runs; it yields the function that advances it."""
    with tqdm(total=total, desc=name, unit=f" {unit}", disable=None, leave=False) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance


def say(line: str) -> None:
    """Print a line above the bars that are being shown."""
    tqdm.write(line)
