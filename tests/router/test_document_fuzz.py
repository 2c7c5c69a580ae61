"""`make test-load`: what the served OpenAPI document allows and forbids, by schemathesis."""

from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable

pytestmark = [pytest.mark.load, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_what_the_document_allows_and_forbids(server: Any) -> None:
    """Every operation that the served OpenAPI document names, by its rules and against them."""
    import schemathesis

    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    asked: Counter[str] = Counter()
    broken: list[str] = []

    def ask(case: Any) -> None:
        answer = case.call(base_url=server.url)
        asked[case.operation.label] += 1
        if answer.status_code >= 500 and answer.status_code != 504:
            broken.append(f"{case.operation.label}: {answer.status_code} {case.body!r:.300}")

    few = settings(
        max_examples=15, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    for found in document.get_all_operations():
        for mode in schemathesis.GenerationMode:
            with suppress(Unsatisfiable):  # nothing can be against rules that there are none of
                few(given(found.ok().as_strategy(mode))(ask))()
    assert broken == []
    assert {"POST /v1/chat/completions", "GET /v1/models/{name}"} <= set(asked)
