"""lm-evaluation-harness measures through the server what its backend `hf` measures itself."""

import json
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import httpx
import pytest
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from tests.clients.conftest import PYTHON, ROOT, Served
from tests.clients.harness import MEMBERS, POOL, TASKS, evaluated

QUESTIONS = [json.loads(line) for line in (TASKS / "questions.jsonl").read_text().splitlines()]
SYSTEMS = (*MEMBERS, "pair")
# float32 on both sides, added up in another order.
CLOSE = 2e-3


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `hf` measures, by system."""
    out = tmp_path_factory.mktemp("reference") / "told.json"
    packages = sysconfig.get_paths()["purelib"]
    command = [PYTHON, "-m", "tests.clients.reference", packages, str(out)]
    subprocess.run(command, cwd=ROOT, check=True)
    told: dict[str, Any] = json.loads(out.read_text())
    return told


@pytest.fixture(autouse=True)
def _at_home(monkeypatch: pytest.MonkeyPatch, served: Served, tmp_path: Path) -> None:
    """The tasks name their data from the repository's root; the harness reads the key here."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OPENAI_API_KEY", served.key)


def _by_likelihood(served: Served, model: str, **options: Any) -> LocalCompletionsAPI:
    settings: dict[str, Any] = {
        "tokenizer_backend": "huggingface",
        "tokenizer": str(POOL / "arithmetic"),
        "batch_size": 16,
        "max_length": 1024,
    }
    return LocalCompletionsAPI(
        model=model, base_url=f"{served.url}/v1/completions", **{**settings, **options}
    )


def _by_chat(served: Served, model: str) -> LocalChatCompletion:
    url = f"{served.url}/v1/chat/completions"
    return LocalChatCompletion(model=model, base_url=url, num_concurrent=4)


def _asked(served: Served, path: str, **body: Any) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {served.key}"}
    response = httpx.post(f"{served.url}{path}", json=body, headers=headers, timeout=120)
    told: dict[str, Any] = response.raise_for_status().json()
    return told


def _documented(system: str, task: str) -> str:
    """Return the accuracy that the table in docs/clients.md has for a `task`."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs/clients.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    head = next(row for row in rows if row[1:] == ["choices", "answers"])
    return next(row for row in rows if row[0] == f"`{system}`")[head.index(task)]


@pytest.mark.parametrize("system", SYSTEMS)
def test_choices_are_as_likely(served: Served, reference: dict[str, Any], system: str) -> None:
    """Every choice has the log-likelihood that the checkpoints give it, and so the accuracy."""
    model = "policy/pair" if system == "pair" else system
    [mine] = evaluated(_by_likelihood(served, model), "pool_choices").values()
    theirs = reference[system]["pool_choices"]
    for one, other in zip(mine["said"], theirs["said"], strict=True):
        assert one == pytest.approx(other, abs=CLOSE)
    assert mine["accuracy"] == theirs["accuracy"]
    assert _documented(system, "choices") == f"{mine['accuracy']:.1%}"


@pytest.mark.parametrize("system", SYSTEMS)
def test_answers_are_the_same(served: Served, reference: dict[str, Any], system: str) -> None:
    """Greedy answers in a chat are those that the checkpoints give, and so is the accuracy."""
    model = "policy/pair" if system == "pair" else system
    [mine] = evaluated(_by_chat(served, model), "pool_answers").values()
    theirs = reference[system]["pool_answers"]
    assert mine["said"] == theirs["said"]
    assert mine["accuracy"] == theirs["accuracy"]
    assert _documented(system, "answers") == f"{mine['accuracy']:.1%}"


def test_a_policy_scores_as_its_choice_does(served: Served, reference: dict[str, Any]) -> None:
    """Under `auto` every text is as likely as under the member that the router picked for it."""
    harness = _by_likelihood(served, "auto")
    [mine] = evaluated(harness, "pool_choices").values()
    expected = []
    for index, asked in enumerate(mine["asked"]):
        expected.append([])
        for number, (context, choice, *_) in enumerate(asked):
            told = _asked(
                served,
                "/v1/completions",
                model="auto",
                prompt=harness.tok_encode(context + choice),
                max_tokens=1,
                echo=True,
                logprobs=1,
            )
            [member] = told["shoal"]["members"]
            expected[-1].append(reference[member]["pool_choices"]["said"][index][number])
    for one, other in zip(mine["said"], expected, strict=True):
        assert one == pytest.approx(other, abs=CLOSE)
    assert _documented("auto", "choices") == f"{mine['accuracy']:.1%}"


def test_a_policy_answers_as_its_choice_does(served: Served, reference: dict[str, Any]) -> None:
    """Under `auto` every answer is the one of the member that the router picked."""
    [mine] = evaluated(_by_chat(served, "auto"), "pool_answers").values()
    expected = list(mine["said"])
    num_known = 0
    for index, question in enumerate(QUESTIONS):
        messages = [{"role": "user", "content": question["question"]}]
        told = _asked(
            served, "/v1/chat/completions", model="auto", messages=messages, temperature=0
        )
        [member] = told["shoal"]["members"]
        if member in reference:  # `general` is no checkpoint of transformers'
            expected[index] = reference[member]["pool_answers"]["said"][index]
            num_known += 1
    assert num_known > 0.9 * len(QUESTIONS)
    assert mine["said"] == expected
    assert _documented("auto", "answers") == f"{mine['accuracy']:.1%}"
