"""What one client's huge requests cost others: `python -m tests.bench.stall [--ray] [NAME ...]`.

A server of scripted models runs in a process of its own. A client asks it for one token at a time,
first alone, then while two others send one attack over and over. The row of an attack is
the 50th and 99th percentile of that client's waits, and how many times the idle 99th it is; the
target is at most three times. Idle stretches alternate with attacks, so that other load on the
machine hits both. `--ray` starts Ray, with HAProxy in front.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from tests.server import serving

CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
RESPONSES, COUNT = "/v1/responses", "/v1/messages/count_tokens"
TURN = {"role": "user", "content": "hello"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {}}}
NUM_ATTACKERS = 2
PAUSE_S = 0.02
TARGET = 3.0
POOL = {
    "engines": [
        {"name": "one", "kind": "fake", "options": {"answers": ["x"], "context_tokens": 2**21}}
    ],
    "models": [{"name": "alpha", "engine": "one"}],
    "policies": {"auto": {"kind": "fixed", "plan": "alpha"}},
}


def _keys(count: int) -> dict[str, int]:
    return {f"key{number}": 0 for number in range(count)}


def _chat(**fields: Any) -> dict[str, Any]:
    return {"model": "alpha", "messages": [TURN], "max_tokens": 1, **fields}


def _said(content: Any, **more: Any) -> dict[str, Any]:
    return _chat(messages=[{"role": "user", "content": content, **more}])


def _schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    return _chat(
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    )


# By name: the path, what makes the body, and headers.
Attack = tuple[str, Callable[[], dict[str, Any] | bytes], dict[str, str]]
ATTACKS: dict[str, Attack] = {
    f"{path.removeprefix('/v1/')} {name}": (path, make, {})
    for path, name, make in (
        (CHAT, "messages, 100,000", lambda: _chat(messages=[TURN] * 100_000)),
        (CHAT, "messages, 2,048 (answered)", lambda: _chat(messages=[TURN] * 2_048)),
        (CHAT, "messages, 8,000", lambda: _chat(messages=[TURN] * 8_000)),
        (CHAT, "content, 3.9 MB", lambda: _said("word " * 780_000)),
        (CHAT, "content, 1 MB (answered)", lambda: _said("word " * 200_000)),
        (CHAT, "content parts, 100,000", lambda: _said([{"type": "text", "text": "x"}] * 100_000)),
        (CHAT, "content parts, 1,000", lambda: _said([{"type": "text", "text": "x"}] * 1_000)),
        (CHAT, "image parts, 3.9 MB", lambda: _said(
            [{"type": "image_url", "image_url": {"url": "data:," + "A" * 3_900_000}}])),
        (CHAT, "tool_calls, 30,000", lambda: _chat(
            messages=[TURN, {"role": "assistant", "tool_calls": [CALL] * 30_000}])),
        (CHAT, "tool_calls, 30 × 128 (answered)", lambda: _chat(
            messages=[TURN, *[{"role": "assistant", "tool_calls": [CALL] * 128}] * 30])),
        (CHAT, "tools, 50,000", lambda: _chat(tools=[FUNCTION] * 50_000)),
        (CHAT, "tools, 128 of 1,000 keys", lambda: _chat(tool_choice="none", tools=[
            {"type": "function", "function": {"name": "f", "parameters": _keys(400)}}] * 128)),
        (CHAT, "stop, 100,000", lambda: _chat(stop=["x"] * 100_000)),
        (CHAT, "logit_bias, 37,000", lambda: _chat(logit_bias=_keys(37_000))),
        (CHAT, "metadata, 37,000", lambda: _chat(metadata=_keys(37_000))),
        (CHAT, "unknown fields, 37,000", lambda: _chat(**_keys(37_000))),
        (CHAT, "unknown field of 70,000 lists", lambda: _chat(x=[[]] * 70_000)),
        (CHAT, "template variables, 37,000", lambda: _chat(chat_template_kwargs=_keys(37_000))),
        (CHAT, "schema, 37,000 keys", lambda: _schema({"properties": _keys(37_000)})),
        (CHAT, "schema, 3.9 MB", lambda: _schema({"description": "x" * 3_900_000})),
        (CHAT, "choices, 50,000", lambda: _chat(guided_choice=["x"] * 50_000)),
        (CHAT, "regex, 3.9 MB", lambda: _chat(guided_regex="a" * 3_900_000)),
        (CHAT, "grammar, 3.9 MB", lambda: _chat(guided_grammar='root ::= "' + "a" * 3_900_000)),
        (CHAT, "candidates, 50,000", lambda: _chat(
            shoal={"plan": {"best": {"candidates": ["alpha"] * 50_000, "select": "majority"}}})),
        (CHAT, "shoal, 37,000 keys", lambda: _chat(shoal=_keys(37_000))),
        (CHAT, "n 128 (answered)", lambda: _chat(n=128)),
        (CHAT, "numbers of 3.9 MB", lambda: b'{"seed":' + b"1" * 3_900_000 + b"}"),
        (CHAT, "quotes, 3.9 MB", lambda: b'{"x":["' + b'\\"' * 1_900_000 + b'"]}'),
        (CHAT, "lists in lists", lambda: b"[" * 3_900_000),
        (TEXT, "prompt, 1,000,000 token ids", lambda: {
            "model": "alpha", "prompt": [5] * 1_000_000}),
        (TEXT, "prompt, 140,000 token ids (answered)", lambda: {
            "model": "alpha", "prompt": [65] * 140_000, "max_tokens": 1}),
        (TEXT, "prompt, 128 × 1,000 ids, echo (answered)", lambda: {
            "model": "alpha", "prompt": [[65] * 1_000] * 128, "max_tokens": 1, "echo": True}),
        (TEXT, "prompt, 128 × 16 kB (answered)", lambda: {
            "model": "auto", "prompt": ["word " * 3_200] * 128, "max_tokens": 1}),
        (TEXT, "stop_token_ids, 100,000", lambda: {
            "model": "alpha", "prompt": "x", "stop_token_ids": [1] * 100_000}),
        (RESPONSES, "input, 100,000", lambda: {"model": "alpha", "input": [TURN] * 100_000}),
        (RESPONSES, "input, 2,048 (answered)", lambda: {"model": "alpha", "input": [TURN] * 2_048}),
        (RESPONSES, "tools, 50,000", lambda: {
            "model": "alpha", "input": "x", "tools": [{"type": "function", "name": "f"}] * 50_000}),
        (MESSAGES, "messages, 100,000", lambda: _chat(messages=[TURN] * 100_000)),
        (MESSAGES, "messages, 2,048 (answered)", lambda: _chat(messages=[TURN] * 2_048)),
        (MESSAGES, "blocks, 70,000 of no type", lambda: _said([{}] * 70_000)),
        (MESSAGES, "system, 3.9 MB", lambda: _chat(system="word " * 780_000)),
        (MESSAGES, "tools, 50,000", lambda: _chat(
            tools=[{"name": "f", "input_schema": {}}] * 50_000)),
        (MESSAGES, "stop_sequences, 100,000", lambda: _chat(stop_sequences=["x"] * 100_000)),
        (COUNT, "messages, 2,048 (answered)", lambda: _chat(messages=[TURN] * 2_048)),
        (COUNT, "content, 3.9 MB (answered)", lambda: _said("word " * 780_000)),
        ("/tokenize", "prompt, 3.9 MB (answered)", lambda: {
            "model": "alpha", "prompt": "w " * 1_900_000}),
        ("/detokenize", "tokens, 140,000 (answered)", lambda: {
            "model": "alpha", "tokens": [65] * 140_000}),
        ("/v1/embeddings", "input, 140,000 token ids", lambda: {
            "model": "alpha", "input": [65] * 140_000}),
        ("/v1/embeddings", "input, 2,048 texts of 1.9 kB", lambda: {
            "model": "alpha", "input": ["word " * 380] * 2_048}),
        ("/v1/rerank", "documents, 40,000", lambda: {
            "model": "alpha", "query": "x", "documents": ["x"] * 40_000}),
        ("/v1/batches", "metadata, 24,000", lambda: {
            "input_file_id": "f", "endpoint": CHAT, "completion_window": "24h",
            "metadata": _keys(24_000)}),
        ("/v1/feedback", "id, 0.9 MB", lambda: {"id": "x" * 900_000, "thumb": "up"}),
        ("/v1/feedback", "unknown fields, 37,000", lambda: {"id": "x", **_keys(37_000)}),
    )
}  # fmt: skip
ATTACKS |= {
    "headers, 60 kB": (CHAT, _chat, {f"x-{i}": "y" * 1000 for i in range(60)}),
    "authorization, 60 kB": (CHAT, _chat, {"authorization": "Bearer sk-shoal-" + "k" * 60_000}),
    "x-request-id, 60 kB": (CHAT, _chat, {"x-request-id": "k" * 60_000}),
    "GET /openapi.json": ("/openapi.json", lambda: b"", {}),
    "GET /metrics": ("/metrics", lambda: b"", {}),
    "GET /dashboard/data": ("/dashboard/data", lambda: b"", {}),
    "GET /v1/models": ("/v1/models", lambda: b"", {}),
}


def ask(line: HTTPConnection, path: str, body: bytes, headers: Mapping[str, str]) -> int:
    """Send one request on `line`, connected anew where it was closed, and return the status."""
    try:
        line.request("POST" if body else "GET", path, body or None, headers)
        answer = line.getresponse()
        answer.read()
        return answer.status
    except OSError:
        line.close()
        return 0


def attack(port: int, name: str, begun: Any, end: Any, found: Any) -> None:
    """Send one attack over and over, from `begun` until the `end`; `found` gets the statuses."""
    path, make, more = ATTACKS[name]
    made = make()
    body = made if isinstance(made, bytes) else json.dumps(made).encode()
    headers = {"content-type": "application/json", **more}
    line, statuses = HTTPConnection("127.0.0.1", port, timeout=60), Counter[int]()
    while not end.is_set():
        statuses[ask(line, path, body, headers)] += 1
        begun.release()
        time.sleep(PAUSE_S)
    found.put(statuses)


def watch(port: int, duration_s: float) -> list[float]:
    """Ask small questions for that long, and return how long each took."""
    line, waits = HTTPConnection("127.0.0.1", port, timeout=60), []
    body, headers = json.dumps(_chat()).encode(), {"content-type": "application/json"}
    end = time.perf_counter() + duration_s
    while time.perf_counter() < end:
        began = time.perf_counter()
        assert ask(line, CHAT, body, headers) == 200
        waits.append(time.perf_counter() - began)
        time.sleep(PAUSE_S)
    return waits


def percentile_ms(waits: list[float], share: float) -> float:
    """Return a percentile in milliseconds."""
    return 1000 * sorted(waits)[min(len(waits) - 1, int(share * len(waits)))]


def measure(port: int, name: str, duration_s: float) -> tuple[dict[int, int], list[float]]:
    """Attack and watch for that long; return what the attackers were answered, and the waits."""
    fork = multiprocessing.get_context("fork")  # at once, and with all that is imported here
    begun, end, found = fork.Semaphore(0), fork.Event(), fork.Queue()
    attackers = [
        fork.Process(target=attack, args=(port, name, begun, end, found))
        for _ in range(NUM_ATTACKERS)
    ]
    for attacker in attackers:
        attacker.start()
    for _ in attackers:
        begun.acquire()
    waits = watch(port, duration_s)
    end.set()
    statuses = sum((found.get() for _ in attackers), Counter[int]())
    for attacker in attackers:
        attacker.join()
    return dict(statuses), waits


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.stall")
    parser.add_argument("names", nargs="*", help="parts of the names of attacks; all by default")
    parser.add_argument("--ray", action="store_true", help="on Ray, behind HAProxy")
    parser.add_argument("--seconds", type=float, default=5, help="how long each attack is watched")
    arguments = parser.parse_args()
    wanted = [
        name for name in ATTACKS if not arguments.names or any(n in name for n in arguments.names)
    ]
    ratios = []
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder), *([] if arguments.ray else ["--local"]), **POOL) as server,
    ):
        watch(server.port, 2)
        print("| attack | answered with | idle p50 | idle p99 | p50 | p99, ms | times idle |")
        print("|---|---|---|---|---|---|---|")
        for name in wanted:
            idle = watch(server.port, arguments.seconds / 2)
            statuses, waits = measure(server.port, name, arguments.seconds)
            idle += watch(server.port, arguments.seconds / 2)
            figures = [percentile_ms(w, share) for w in (idle, waits) for share in (0.5, 0.99)]
            ratios.append(figures[3] / figures[1])
            told = ", ".join(f"{count} × {status}" for status, count in sorted(statuses.items()))
            cells = " | ".join(f"{figure:.1f}" for figure in figures)
            print(f"| {name} | {told} | {cells} | {ratios[-1]:.1f} |", flush=True)
    print(
        f"median {statistics.median(ratios):.1f} times, worst {max(ratios):.1f}; "
        f"{sum(ratio > TARGET for ratio in ratios)} of {len(ratios)} above {TARGET:g}"
    )


if __name__ == "__main__":
    main()
