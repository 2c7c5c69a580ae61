"""A prompt's ids and text are made where they hold nobody up, and once for each tokenizer."""

import asyncio
import threading
from collections.abc import Sequence

from models.tokenizer import ByteTokenizer
from router.executor.task import Prompt


class Watched(ByteTokenizer):
    """Notes on which threads it decodes."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of the bytes."""
        self.threads.append(threading.current_thread())
        return super().decode(token_ids)


def _texts(num_tokens: int, tokenizer: Watched) -> list[str]:
    prompt = Prompt(token_ids=(ord("w"),) * num_tokens)

    async def read() -> list[str]:
        return [await prompt.query(tokenizer), await prompt.text(tokenizer)]

    return asyncio.run(read())


def test_many_ids_are_read_on_another_thread() -> None:
    """What policies read and what is echoed is one text, which the event loop does not wait for."""
    tokenizer = Watched()
    assert _texts(100_000, tokenizer) == ["w" * 100_000] * 2
    [thread] = tokenizer.threads
    assert thread is not threading.current_thread()


def test_few_ids_are_read_at_once() -> None:
    """A thread would take longer than they do."""
    tokenizer = Watched()
    assert _texts(10, tokenizer) == ["w" * 10] * 2
    assert tokenizer.threads == [threading.current_thread()]
