"""Clients that ask, repeat what fails and keep a diary; and the ledger's books to hold beside it.

Each try is sent with an id of its own, so that its row, its charge and its answer can be compared.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx
import sqlalchemy as sa

from router.ledger.database import Database
from router.ledger.schema import BUDGET_HOLDS, BUDGET_WINDOWS, REQUESTS
from tests.server import until

NUM_CLIENTS = 20
PATIENCE_S = 300.0  # what ends a client's request must be the server; this is for what never comes
ANSWER = "x" * 10


@dataclass(kw_only=True)
class Try:
    """One time that a request was sent; times are monotonic seconds."""

    id: str
    sent_s: float
    ended_s: float = math.inf
    answered: bool = False


@dataclass
class Asked:
    """One request, with all its tries."""

    tries: list[Try] = field(default_factory=list)

    @property
    def answered_s(self) -> float | None:
        """When it was answered whole; None: not yet, or never."""
        return next((one.ended_s for one in self.tries if one.answered), None)


class Clients:
    """Clients that ask one request after another until told to end, every second one streams."""

    def __init__(self, url: str, name: str) -> None:
        self.asked: list[Asked] = []
        self._url, self._name = url, name
        self._end = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number,), daemon=True)
            for number in range(NUM_CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End when the requests that run are answered."""
        self._end.set()
        for thread in self._threads:
            thread.join()

    def tries(self) -> list[Try]:
        """Return every time that anything was sent."""
        return [one for asked in list(self.asked) for one in list(asked.tries)]

    def num_answered(self, since_s: float) -> int:
        """Return how many requests were begun and answered since then."""
        return sum(
            asked.tries[0].sent_s >= since_s and asked.answered_s is not None
            for asked in list(self.asked)
        )

    def longest_s(self, since_s: float) -> float:
        """Return the longest wait for an answer, counted from `since_s` where it began before."""
        ends = [(asked.tries[0].sent_s, asked.answered_s or math.inf) for asked in self.asked]
        return max(end - max(began, since_s) for began, end in ends if end >= since_s)

    def _run(self, number: int) -> None:
        body = {"model": "alpha", "messages": [{"role": "user", "content": "hello"}]}
        body |= {"stream": bool(number % 2)}
        with httpx.Client(base_url=self._url, timeout=PATIENCE_S) as http:
            for turn in itertools.count():
                if self._end.is_set():
                    return
                asked = Asked()
                name = f"{self._name}-{number}-{turn}"
                give_up_s = time.monotonic() + PATIENCE_S
                while asked.answered_s is None and time.monotonic() < give_up_s:
                    one = Try(id=f"{name}-{len(asked.tries)}", sent_s=time.monotonic())
                    asked.tries.append(one)
                    if len(asked.tries) == 1:
                        self.asked.append(asked)
                    with contextlib.suppress(httpx.HTTPError):
                        answer = http.post(
                            "/v1/chat/completions", json=body, headers={"x-request-id": one.id}
                        )
                        one.answered = _is_whole(answer)
                    one.ended_s = time.monotonic()
                    if not one.answered:
                        time.sleep(0.2)


def _is_whole(answer: httpx.Response) -> bool:
    if answer.status_code != 200:
        return False
    if "event-stream" not in answer.headers["content-type"]:
        return bool(answer.json()["choices"][0]["message"]["content"] == ANSWER)
    return '"error"' not in answer.text and answer.text.rstrip().endswith("[DONE]")


@dataclass(frozen=True, kw_only=True)
class Books:
    """What a ledger says: rows of tries that a model ran for, and how many requests it charged."""

    rows: Counter[str]
    num_charged: int


def read_books(database: Database, lease_s: float) -> Books:
    """Return the books once nothing is held: what the dead held comes back with its lease's end."""
    held = sa.select(sa.func.count()).where(~BUDGET_HOLDS.c.lapsed)
    charged = sa.select(sa.func.sum(BUDGET_WINDOWS.c.spent_requests))
    rows = sa.select(REQUESTS.c.client_request_id).where(REQUESTS.c.answered_by.is_not(None))

    def nothing_is_held() -> bool:
        with database.connect() as connection:
            return not connection.execute(held).scalar_one()

    until(nothing_is_held, lease_s + 60)
    with database.connect() as connection:
        return Books(
            rows=Counter(connection.execute(rows).scalars()),
            num_charged=int(connection.execute(charged).scalar_one() or 0),
        )
