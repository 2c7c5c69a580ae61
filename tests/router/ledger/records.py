"""Records for tests."""

from collections.abc import Sequence
from typing import Any

from router.ledger.database import Database, writing
from router.ledger.schema import REQUESTS
from router.ledger.writer import insert_new, row_of
from router.record import MemberTokens, RequestRecord, who_ran


def record(number: int = 0, **fields: Any) -> RequestRecord:
    """Return a plausible answered request, one per `number`."""
    values: dict[str, Any] = {
        "request_id": f"req-{number}",
        "time_s": 1_800_000_000.0 + number,
        "endpoint": "chat.completions",
        "model": "auto",
        "policy": "learned",
        "status": 200,
        "latency_s": 0.25,
        "ttft_s": 0.05,
        "stream": True,
        "plan": {"answer": {"members": ["math", "code"], "rule": "mixture"}},
        "prompt_tokens": 10,
        "output_tokens": 20,
        "num_choices": 1,
        "members": {
            "math": MemberTokens(prompt_tokens=10, output_tokens=20),
            "code": MemberTokens(prompt_tokens=10, output_tokens=20),
        },
        "usd": 0.001,
        "wh": 0.002,
        "gco2e": 0.0005,
        "energy_method": "modelled:llmcarbon",
        "scores": {"math": 0.9, "code": 0.4},
        "stages": ({"path": "0", "members": ["math"], "score": 0.9},),
        "key_id": "key_a",
    }
    values |= fields
    return RequestRecord(**{"answered_by": who_ran(values["members"]), **values})


def keep(database: Database, records: Sequence[RequestRecord]) -> None:
    """Write these records to the ledger."""
    with writing(database) as connection:
        connection.execute(insert_new(connection, REQUESTS), [row_of(one) for one in records])
