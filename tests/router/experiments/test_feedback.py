"""Feedback: what is taken, what it becomes, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from router.ledger.feedback import rated_requests
from tests.router.experiments.trial_server import EXPERIMENT, Trial, serving, write_config


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    """A server whose models echo the question."""
    config = write_config(tmp_path_factory.mktemp("trial"), experiments={"e": EXPERIMENT})
    with serving(config) as running:
        yield running


def kept(trial: Trial, response_id: str) -> tuple[float | None, str | None]:
    """The score and label in the ledger."""
    trial.flush()
    found = [o for o in rated_requests(trial.ledger.database) if o.row["request_id"] == response_id]
    return found[0].score, found[0].label


@pytest.mark.parametrize(
    ("feedback", "score"),
    [
        ({"thumb": "up"}, 1.0),
        ({"thumb": "down"}, 0.0),
        ({"score": 0.25}, 0.25),
        ({"label": " Ninety-FIVE. "}, 1.0),
        ({"label": "ninety-six"}, 0.0),
    ],
)
def test_every_kind_becomes_a_score(trial: Trial, feedback: dict[str, Any], score: float) -> None:
    """Thumbs, scores and labels; a label counts as equal but for case, spacing and full stop."""
    answer = trial.ask("ninety-five", user="u")
    response = trial.rate(answer["id"], **feedback)
    assert response.json() == {"object": "feedback", "id": answer["id"], "score": score}
    assert kept(trial, answer["id"]) == (score, None), "a label is text, and none is kept"


def test_feedback_right_after_a_stream_finds_its_answer(trial: Trial) -> None:
    """A row that is still on its way to the database is waited for."""
    body = {
        "model": "auto",
        "messages": [{"role": "user", "content": "seven"}],
        "stream": True,
    }
    with trial.http.stream("POST", "/v1/chat/completions", json=body) as response:
        first, *_ = response.iter_lines()
    response_id = first.split('"id":"')[1].split('"')[0]
    assert trial.rate(response_id, label="seven").json()["score"] == 1.0


def test_the_same_twice_is_once_and_a_change_of_mind_counts(trial: Trial) -> None:
    """Feedback is idempotent; a later one replaces the earlier."""
    answer = trial.ask(user="u")
    for _ in range(2):
        assert trial.rate(answer["id"], thumb="up").status_code == 200
    assert kept(trial, answer["id"]) == (1.0, None)
    assert trial.rate(answer["id"], thumb="down").status_code == 200
    assert kept(trial, answer["id"]) == (0.0, None)


def test_numbers_of_ones_own_are_kept_beside_a_score(trial: Trial) -> None:
    """Metrics may come alone, after a thumb, which stays; the last word on them counts."""
    answer = trial.ask("seven", user="u")
    trial.rate(answer["id"], thumb="up")
    for refund in (0, 1):
        response = trial.rate(answer["id"], metrics={"refund": refund, "basket": 12.5})
        assert response.json() == {"object": "feedback", "id": answer["id"], "score": None}
    trial.flush()
    [found] = [
        o for o in rated_requests(trial.ledger.database) if o.row["request_id"] == answer["id"]
    ]
    assert found.metrics == {"refund": 1, "basket": 12.5}
    assert found.score == 1.0


@pytest.mark.parametrize(
    ("feedback", "words"),
    [
        ({"metrics": {"refund": "much"}}, "metrics.refund"),
        ({"metrics": {"refund": 1e101}}, "metrics.refund"),
        ({}, "give exactly one of thumb, score and label"),
        ({"thumb": "up", "score": 1}, "give exactly one"),
        ({"score": 1.5}, "score"),
        ({"thumb": "sideways"}, "thumb"),
        ({"stars": 5}, "stars"),
    ],
)
def test_bad_feedback_is_refused(trial: Trial, feedback: dict[str, Any], words: str) -> None:
    """400, in OpenAI's shape, naming the field."""
    response = trial.rate("chatcmpl-1", **feedback)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_unknown_responses_are_404(trial: Trial) -> None:
    """Feedback on something nobody was told is not stored."""
    response = trial.rate("chatcmpl-unknown", thumb="up")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "response_not_found"


def test_requests_without_an_answer_cannot_be_rated(trial: Trial) -> None:
    """409 for a request that was refused."""
    refused = trial.http.post(
        "/v1/chat/completions",
        json={"model": "nobody", "messages": [{"role": "user", "content": "x"}]},
    )
    assert refused.status_code == 404
    trial.flush()
    failed = [o.row for o in rated_requests(trial.ledger.database) if o.row["status"] == 404]
    response = trial.rate(failed[0]["request_id"], thumb="up")
    assert (response.status_code, response.json()["error"]["code"]) == (409, "not_answered")


def test_no_text_is_kept(trial: Trial) -> None:
    """The ledger holds a digest, neither question nor answer."""
    answer = trial.ask("a very private question", user="u")
    trial.flush()
    [row] = [
        o.row for o in rated_requests(trial.ledger.database) if o.row["request_id"] == answer["id"]
    ]
    assert "private" not in str(row)
    assert len(row["answer_digest"]) == 16
