"""Requests get their arm over HTTP: sticky, recorded, and only where the experiment may choose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from policies.encoders.base import parse_encoder
from policies.errors import ExperimentError
from policies.outcomes import Outcome
from policies.routing.fit import fit_router
from policies.routing.router import save_router
from router.ledger.queries import requests
from tests.router.experiments.trial_server import EXPERIMENT, Trial, serving, write_config

ARMS = EXPERIMENT["arms"]


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    """A server with one experiment split by user, and one by session for another key's model."""
    chats = {**EXPERIMENT, "unit": "session", "target": {"models": ["policy/small"]}}
    config = write_config(
        tmp_path_factory.mktemp("trial"), experiments={"users": EXPERIMENT, "chats": chats}
    )
    with serving(config) as running:
        yield running


def test_each_arm_answers_with_its_policy_and_stays(trial: Trial) -> None:
    """Users split into both arms, every user stays, and the arm's policy answers."""
    arms: dict[str, set[tuple[str, str]]] = {}
    for user in range(12):
        for _ in range(3):
            shoal = trial.ask(user=f"u{user}")["shoal"]
            arms.setdefault(f"u{user}", set()).add((shoal["arm"], shoal["policy"]))
            assert shoal["experiment"] == "users"
    assert all(len(found) == 1 for found in arms.values())
    assert set.union(*arms.values()) == {("control", "small"), ("new", "large")}


def test_the_row_says_where_the_request_took_part(trial: Trial) -> None:
    """Experiment, arm, unit's hash and propensity are in the ledger; the user's name is not."""
    answer = trial.ask(user="somebody")
    trial.flush()
    [row] = [row for row in requests(trial.ledger.database) if row["request_id"] == answer["id"]]
    assert (row["experiment"], row["arm"]) == ("users", answer["shoal"]["arm"])
    assert (row["propensity"], len(row["unit"])) == (0.5, 16)
    assert "somebody" not in str(row)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"user": "u1", "model": "cheap"},
        {"user": "u1", "shoal": {"policy": "large"}},
        {"user": "u1", "shoal": {"plan": "dear"}},
    ],
)
def test_who_names_a_model_policy_or_plan_takes_no_part(
    trial: Trial, fields: dict[str, Any]
) -> None:
    """An experiment overrules nobody, and a request without a user is in no user's arm."""
    assert "arm" not in trial.ask(**fields)["shoal"]


def test_users_may_come_in_a_header(trial: Trial) -> None:
    """The header x-shoal-user names the unit where the body does not."""
    named = trial.ask(user="u5")["shoal"]["arm"]
    assert trial.ask(headers={"x-shoal-user": "u5"})["shoal"]["arm"] == named


def test_turns_of_a_conversation_stay_on_their_arm(trial: Trial) -> None:
    """Without a session's name, the conversation is known by how it began."""
    seen = set()
    for topic in range(12):
        opening = [{"role": "user", "content": f"topic {topic}"}]
        later = [
            *opening,
            {"role": "assistant", "content": "yes?"},
            {"role": "user", "content": "go on"},
        ]
        first, second = (
            trial.ask(model="policy/small", messages=messages)["shoal"]["arm"]
            for messages in (opening, later)
        )
        assert first == second
        seen.add(first)
    assert seen == {"control", "new"}


def test_sessions_may_be_named(trial: Trial) -> None:
    """The body's session wins over the header's, and one session has one arm."""
    arms = {
        trial.ask(
            f"message {i}",
            model="policy/small",
            shoal={"session": "s1"},
            headers={"x-shoal-session": f"other{i}"},
        )["shoal"]["arm"]
        for i in range(8)
    }
    assert len(arms) == 1


def test_changed_arms_are_refused_once_there_is_data(tmp_path: Path) -> None:
    """A running experiment keeps its arms; new weights are fine, new policies need a new name."""
    with serving(write_config(tmp_path, experiments={"e": EXPERIMENT})) as running:
        running.ask(user="u")
        running.flush()
    heavier = {
        "control": {"policy": "small", "weight": 0.2},
        "new": {"policy": "large", "weight": 0.8},
    }
    with serving(write_config(tmp_path, experiments={"e": {"arms": heavier}})) as running:
        weights = running.http.get("/v1/experiments/e").json()["weights"]
        assert weights == {"control": 0.2, "new": 0.8}
    swapped = {**heavier, "new": {"policy": "auto", "weight": 0.8}}
    with (
        pytest.raises(ExperimentError, match=r"experiments\.e: its arms, policies"),
        serving(write_config(tmp_path, experiments={"e": {"arms": swapped}})),
    ):
        pass
    with serving(write_config(tmp_path, experiments={"e2": {"arms": swapped}})) as running:
        assert running.ask(user="u")["shoal"]["experiment"] == "e2"


def test_a_policy_whose_contents_change_counts_as_changed(tmp_path: Path) -> None:
    """The same name over another plan is another arm."""
    settings = {"experiments": {"e": EXPERIMENT}}
    with serving(write_config(tmp_path, **settings)) as running:
        running.ask(user="u")
        running.flush()
    other = {"large": {"kind": "fixed", "plan": {"answer": {"members": ["cheap", "dear"]}}}}
    with (
        pytest.raises(ExperimentError, match="would mix two experiments"),
        serving(write_config(tmp_path, policies=other, **settings)),
    ):
        pass


def test_a_file_of_a_policy_within_a_policy_counts_as_its_contents(tmp_path: Path) -> None:
    """Trained again under the same name, what a policy wraps is another arm."""

    def learn(favourite: str) -> None:
        rows = [
            Outcome(query=f"word {n}", scores={"cheap": 0.0, "dear": 0.0, favourite: n % 3 / 2})
            for n in range(40)
        ]
        encoder = parse_encoder("ngrams", {"bits": 8})
        save_router(fit_router(rows, encoder=encoder), tmp_path / "router.npz")

    learn("cheap")
    answer = {"members": ["cheap", "dear"]}
    learned = {"kind": "learned", "path": "router.npz"}
    arms = {"control": ARMS["control"], "new": {"policy": "wrapping", "weight": 0.5}}
    settings = {
        "experiments": {"e": {"arms": arms}},
        "policies": {"wrapping": {"kind": "fused", "answer": answer, "router": learned}},
    }
    with serving(write_config(tmp_path, **settings)) as running:
        running.ask(user="u")
        running.flush()
    with serving(write_config(tmp_path, **settings)) as running:
        assert running.ask(user="u")["shoal"]["experiment"] == "e"
    learn("dear")
    with (
        pytest.raises(ExperimentError, match="would mix two experiments"),
        serving(write_config(tmp_path, **settings)),
    ):
        pass


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"experiments": {"e": {"arms": {**ARMS, "x": {"policy": "none", "weight": 0}}}}},
            "experiments.e.arms.x.policy: 'none' is unknown; allowed are auto, large, small",
        ),
        (
            {"shadows": {"s": {"policy": "none", "share": 1, "usd_per_day": 1}}},
            "shadows.s.policy: 'none' is unknown",
        ),
        (
            {"shadows": {"s": {"policy": "large", "share": 1, "usd_per_day": 1, "cap": 2}}},
            "shadows.s: the key 'cap' is unknown",
        ),
    ],
)  # fmt: skip
def test_a_bad_configuration_starts_nothing(
    tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    """The server refuses to start and says which key is wrong."""
    with pytest.raises(ExperimentError) as refusal, serving(write_config(tmp_path, **config)):
        pass
    assert words in str(refusal.value)
