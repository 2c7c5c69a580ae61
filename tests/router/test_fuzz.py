"""Two thousand mutated bodies: whatever is sent, nothing of the server breaks."""

import copy
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import pytest

from tests.router.conftest import Running, running
from tests.router.test_encoding import pool_of

NUM_SEEDS = 2000

# What is put in the place of any part of a body that was in order.
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3.5, 1e308, -1e308, 1e-320, 2**31, 2**62, 2**63, 2**64, 10**400,
    -(10**400), "", "a", "auto", "\0", "é😀", "\ud800", "x" * 3000, "NaN", "1", "-0", [], {}, [[]],
    [{}], {"": None}, {"a": {}}, ["a"], [1], [None], [[[[]]]], [0] * 500, {"1": 10**400}, {"٣": 1},
    {"type": "text"}, {"type": "json_object"}, {"type": "json_schema"}, {"type": {}},
    [{"type": "text", "text": {}}], [{"type": [], "text": 1}], ["alpha"] * 300, {"alpha": {}},
)  # fmt: skip

ANSWER = {"members": ["alpha", "beta"], "weights": [1, 2], "rule": "mixture", "gate": 0.9}
BEST = {"candidates": ["alpha", "gamma"], "select": "majority", "scorer": "confidence"}
PLAN = {
    "cascade": {
        "stages": ["alpha", {"best": BEST}, {"answer": ANSWER}],
        "thresholds": [0.5, 0.5],
        "timeouts_s": [5, 5],
        "scorer": "confidence",
    }
}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHAT = "/v1/chat/completions"
BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        CHAT,
        {
            "model": "alpha",
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c", "content": "1"},
            ],
            "tools": [FUNCTION], "tool_choice": "none", "max_tokens": 3,
        },
    ),
    (
        CHAT,
        {
            "model": "auto",
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "x"}], "name": "n"},
            ],
            "max_tokens": 4, "max_completion_tokens": 4, "n": 1, "stop": ["zz"], "seed": 1,
            "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "user": "u",
            "logit_bias": {"5": 1}, "logprobs": True, "top_logprobs": 2, "presence_penalty": 0.1,
            "frequency_penalty": 0.1, "response_format": {"type": "text"}, "metadata": {"a": "b"},
            "ignore_eos": False,
        },
    ),
    (
        CHAT,
        {
            "model": "alpha", "messages": [{"role": "user", "content": "x"}], "max_tokens": 3,
            "stream": True, "stream_options": {"include_usage": True},
            "shoal": {
                "plan": PLAN, "explain": True, "session": "s", "timeout_s": 10, "max_usd": 1,
                "max_wh": 1, "max_gco2e": 1, "max_latency_s": 10, "quality_floor": 0.1,
            },
        },
    ),
    (
        "/v1/completions",
        {
            "model": "alpha", "prompt": ["x"], "max_tokens": 3, "n": 1, "best_of": 1, "echo": False,
            "logprobs": 2, "suffix": None, "stop": "q", "shoal": {"policy": "auto"},
        },
    ),
    ("/v1/completions", {"model": "alpha", "prompt": [[5, 6, 7], [8]], "max_tokens": 3, "n": 2}),
    (
        "/v1/messages",
        {
            "model": "alpha", "max_tokens": 3, "system": "s", "stop_sequences": ["q"], "top_k": 3,
            "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
            "metadata": {"user_id": "u"}, "temperature": 0.5, "top_p": 0.5, "stream": False,
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "none"}, "thinking": {"type": "disabled"},
        },
    ),
    (
        "/v1/messages/count_tokens",
        {"model": "alpha", "messages": [{"role": "user", "content": "x"}], "system": "s"},
    ),
    (
        "/v1/responses",
        {
            "model": "alpha", "max_output_tokens": 3, "instructions": "s", "store": False,
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "1"},
            ],
            "tools": [{"type": "function", "name": "f", "parameters": {}}], "tool_choice": "none",
            "text": {"format": {"type": "text"}, "verbosity": "low"}, "include": [],
            "reasoning": {"effort": "low"}, "metadata": {"a": "b"}, "parallel_tool_calls": True,
            "temperature": 0.5, "top_p": 0.5, "user": "u", "previous_response_id": None,
        },
    ),
    ("/v1/responses", {"model": "auto", "input": "x", "max_output_tokens": 3, "stream": True}),
    ("/tokenize", {"model": "alpha", "prompt": "x"}),
    ("/tokenize", {"model": "alpha", "messages": [{"role": "user", "content": "x"}]}),
    ("/detokenize", {"model": "alpha", "tokens": [65, 66]}),
    ("/v1/feedback", {"id": "chatcmpl-none", "label": "l"}),
    ("/v1/feedback", {"id": "chatcmpl-none", "score": 0.5}),
    (
        "/v1/embeddings",
        {
            "model": "plain", "input": ["the cat"], "dimensions": 8, "encoding_format": "float",
            "truncate_prompt_tokens": -1, "user": "u", "shoal": {"session": "s"},
        },
    ),
    ("/v1/embeddings", {"model": "plain", "input": [[5, 6], [7]], "encoding_format": "base64"}),
    (
        "/v1/rerank",
        {
            "model": "plain", "query": "the cat", "documents": ["a dog", {"text": "the cat sat"}],
            "top_n": 1, "return_documents": True,
        },
    ),
    (
        "/v1/batches",
        {
            "input_file_id": "file-of-lines", "endpoint": CHAT, "completion_window": "24h",
            "metadata": {"a": "b"}, "output_expires_after": None,
        },
    ),
    (
        "/v1/admin/keys",
        {"name": "k", "scope": "user", "weight": 2, "team": "team-there", "caps": {}},
    ),
    ("/v1/admin/keys/key-there", {"team": None, "caps": {"tokens_per_minute": 5.5, "x": None}}),
    ("/v1/admin/teams", {"name": "t", "caps": {"requests_per_month": 7}}),
    ("/v1/admin/teams/team-there", {"caps": {"wh_per_hour": None, "gco2e_per_day": 2}}),
)  # fmt: skip
LINE = {"custom_id": "1", "method": "POST", "url": CHAT, "body": BODIES[0][1]}
FORM = (
    b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x\r\n'
    b'content-disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n%s\r\n--x--\r\n'
)
JSON, UPLOAD = "application/json", "multipart/form-data; boundary=x"


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    parts = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, part in parts:
        yield from _places(part, (*place, key))


def _mutate(seed: int) -> tuple[str, str, bytes]:
    """Return a path, a type and a body that is nearly right: odd parts, or bytes, put in."""
    random = Random(seed)
    if random.random() < 0.05:
        return "/v1/files", UPLOAD, _scratched(FORM % json.dumps(LINE).encode(), random)
    path, body = copy.deepcopy(random.choice(BODIES))
    if random.random() < 0.2:
        return path, JSON, _scratched(json.dumps(body).encode(), random)
    for _ in range(random.choice((1, 1, 1, 2, 3, 4))):
        *above, last = random.choice([place for place in _places(body) if place])
        target: Any = body
        for key in above:
            target = target[key]
        kin = [odd for odd in ODD if type(odd) is type(target[last])]
        target[last] = copy.deepcopy(random.choice(kin if kin and random.random() < 0.6 else ODD))
    return path, JSON, json.dumps(body).encode()


def _scratched(body: bytes, random: Random) -> bytes:
    """Return `body` with some bytes taken out and others put in."""
    raw = bytearray(body)
    for _ in range(random.randint(1, 6)):
        at = random.randint(0, len(raw))
        raw[at : at + random.randint(0, 20)] = random.randbytes(random.randint(0, 2))
    return bytes(raw)


@pytest.fixture(name="server", scope="module")
def server_of_everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Scripted models, and an encoder."""
    folder = tmp_path_factory.mktemp("pool")
    pool = pool_of(folder)
    scripted = [{"name": name, "engine": "one"} for name in ("beta", "gamma")]
    policies = {"auto": {"kind": "fixed", "plan": "beta"}}
    with running(
        folder, **{**pool, "models": [*pool["models"], *scripted], "policies": policies}
    ) as server:
        yield server


# Starlette leaves the file of a form that was cut off to the garbage collector.
@pytest.mark.filterwarnings("ignore:.*SpooledTemporaryFile:pytest.PytestUnraisableExceptionWarning")
def test_nothing_that_is_sent_breaks_the_server(server: Running) -> None:
    """No body is answered by a 5xx, and every error is in the shape of its API."""
    whole = {"content": FORM % json.dumps(LINE).encode(), "headers": {"content-type": UPLOAD}}
    there = {
        b"file-of-lines": server.http.post("/v1/files", **whole).json()["id"],
        b"key-there": server.http.post("/v1/admin/keys", json={"name": "k"}).json()["id"],
        b"team-there": server.http.post("/v1/admin/teams", json={"name": "t0"}).json()["id"],
    }

    def post(seed: int) -> tuple[int, str]:
        path, kind, body = _mutate(seed)
        for name, found in there.items():
            path, body = path.replace(name.decode(), found), body.replace(name, found.encode())
        answer = server.http.post(path, content=body, headers={"content-type": kind})
        told = f"seed {seed} {path}: {answer.status_code} {answer.text[:200]}"
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert isinstance(error["message"], str) and error["type"], told
        elif "event-stream" in answer.headers["content-type"] and path == CHAT:
            assert answer.text.endswith("data: [DONE]\n\n"), told
            return (500 if '"error":{"message' in answer.text else 200), told
        return answer.status_code, told

    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(post, range(NUM_SEEDS)))
    statuses = Counter(status for status, _ in answers)
    # 504: a mutated timeout_s may be too short for an answer.
    assert [told for status, told in answers if status >= 500 and status != 504] == []
    assert statuses[200] > 100, statuses
    assert statuses[400] > 100, statuses
    assert server.post().status_code == 200
