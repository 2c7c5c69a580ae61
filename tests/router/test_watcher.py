"""One request's work never stops the others, whatever it sends and wherever.

A watcher asks for `/version` all the time while every endpoint of the OpenAPI document gets every
large field. What it waits for is not counted in seconds, which tell of whatever else the machine
does, but in processor time that the server used meanwhile, by its clock (clock_getcpuclockid(3)):
work on the event loop, or on a thread that keeps the interpreter's lock, makes that long. What
holds everybody up does so each time, so that the least of a few tries counts.
"""

import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from tests.router.test_bodies import CHAT, ENDPOINTS, TEXT, TURN
from tests.server import Server, serving

MOST_S, TRIES = 0.05, 5
# What the piece of work in `most_s` takes on two cores of a Xeon at rest.
_USUAL_PACE_S = 0.02
WORDS = "the quick brown fox jumps, over "
JSON = {"content-type": "application/json"}
SCHEMA = {
    "type": "object",
    "properties": {
        f"p{i}": {"type": "string", "description": "d", "enum": ["a"]} for i in range(20)
    },
}
TOOLS = [
    {"type": "function", "function": {"name": f"f{i}", "parameters": SCHEMA}} for i in range(128)
]
TURNS = [
    {"role": "user", "content": "x y " * 50},
    {"role": "assistant", "content": "z " * 90},
] * 1000
LONG = WORDS * 25_000
DEEP: list[tuple[str, dict[str, Any]]] = [
    *((path, {"messages": [{"role": "user", "content": LONG}]}) for path in ENDPOINTS),
    *((path, {"messages": [*TURNS, TURN], "stream": True}) for path in (CHAT, "/v1/messages")),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 1000}]}),
    (CHAT, {"tools": TOOLS, "tool_choice": "none", "logprobs": True, "top_logprobs": 20}),
    (CHAT, {"messages": [TURN], "n": 128, "logprobs": True, "top_logprobs": 20}),
    (CHAT, {"logit_bias": {str(i): 1 for i in range(256)}, "stop": ["x" * 1000] * 16}),
    (
        CHAT,
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": SCHEMA},
            }
        },
    ),
    (TEXT, {"prompt": ["x y " * 1000] * 128}),
    (TEXT, {"prompt": [[65] * 1000] * 128}),
    (TEXT, {"prompt": [65] * 500, "echo": True, "logprobs": 5, "max_tokens": 0}),
    ("/tokenize", {"prompt": LONG, "messages": None, "return_token_strs": True}),
    ("/detokenize", {"tokens": [65] * 240_000}),
    ("/v1/responses", {"input": [*TURNS, TURN], "store": True}),
    ("/v1/responses", {"input": [*TURNS, TURN], "instructions": LONG[:200_000], "stream": True}),
]


@dataclass(frozen=True)
class Served:
    """A server, and a client of it."""

    server: Server
    http: httpx.Client

    def held_up(self, method: str, path: str, **sent: Any) -> str | None:
        """Send something; return by how much it holds the watcher up, None: by little."""
        worst = []
        for _ in range(TRIES):
            with Watcher(self.server) as watcher:
                code = self.http.request(method, path, **sent).status_code
            assert code < 500, (path, code)
            if watcher.worst_s <= MOST_S or watcher.worst_s <= most_s():
                return None
            worst.append(watcher.worst_s)
        return f"{method} {path}: {1e3 * min(worst):.0f} ms"


@pytest.fixture(scope="module", name="served")
def local_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server in one process of its own, whose model reads a megabyte."""
    options = {"context_tokens": 2**20, "answers": ["y"]}
    with (
        serving(
            tmp_path_factory.mktemp("watched"),
            "--local",
            config={"responses": {"store": "if_asked"}},
            engines=[{"name": "one", "kind": "fake", "options": options}],
            models=[{"name": "alpha", "engine": "one"}],
            policies={},
        ) as found,
        found.http as client,
    ):
        yield Served(found, client)


class Watcher:
    """Asks until it is closed; `worst_s` is the most that the server computed for one answer."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._thread = threading.Thread(target=self._watch)
        self._over = False
        self._asked = threading.Event()
        self.worst_s = 0.0

    def __enter__(self) -> "Watcher":
        self._thread.start()
        assert self._asked.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._thread.join()

    def _watch(self) -> None:
        clock = ~self._server.process.pid << 3 | 2
        line = http.client.HTTPConnection("127.0.0.1", self._server.port, timeout=120)
        while not self._over:
            began_s = time.clock_gettime(clock)
            line.request("GET", "/version")
            line.getresponse().read()
            if self._asked.is_set():
                self.worst_s = max(self.worst_s, time.clock_gettime(clock) - began_s)
            self._asked.set()
        line.close()


def most_s() -> float:
    """Return `MOST_S` here and now, where a processor may be slower, or shared."""
    took = []
    for _ in range(3):
        began_s = time.thread_time()
        json.dumps(json.loads("[" + "1," * 200_000 + "1]"))
        took.append(time.thread_time() - began_s)
    return MOST_S * max(1.0, min(took) / _USUAL_PACE_S)


def _kinds(schema: dict[str, Any], named: dict[str, Any]) -> set[str]:
    """Return the JSON types that a field of the document may have."""
    while "$ref" in schema:
        schema = named[schema["$ref"].rpartition("/")[2]]
    options = [one for key in ("anyOf", "oneOf", "allOf") for one in schema.get(key, ())]
    if options:
        return set().union(*(_kinds(one, named) for one in options))
    kinds = schema.get("type", ["string", "array", "object"])
    return {kinds} if isinstance(kinds, str) else set(kinds)


def _large(kinds: set[str]) -> Iterator[Any]:
    """Yield large values of these types, or of a wrong one where they have none."""
    if "string" in kinds:
        yield WORDS * 100_000
    if "array" in kinds:
        yield [65] * 240_000
        yield ["ab"] * 40_000
    if "object" in kinds:
        yield {f"k{i}": 0 for i in range(38_000)}
    if not kinds & {"string", "array", "object"}:
        yield ["ab"] * 40_000


@pytest.mark.timeout(900)
def test_no_large_field_holds_others_up(served: Served) -> None:
    """Each field of each endpoint that takes JSON, as the document has them."""
    document = served.http.get("/openapi.json").json()
    named, wrong, num_tried = document["components"]["schemas"], list[str](), 0
    for path, methods in document["paths"].items():
        content = methods.get("post", {}).get("requestBody", {}).get("content", {})
        if "application/json" not in content:
            continue
        schema = named[content["application/json"]["schema"]["$ref"].rpartition("/")[2]]
        for field, shape in schema["properties"].items():
            for value in _large(_kinds(shape, named)):
                body = json.dumps({**ENDPOINTS.get(path, {}), field: value})
                told = served.held_up("POST", path, content=body, headers=JSON)
                wrong += [f"{field}: {told}"] if told else []
                num_tried += 1
    assert num_tried > 200
    assert not wrong


def test_no_large_parameter_holds_others_up(served: Served) -> None:
    """In addresses: as much as the head of a request may hold."""
    document = served.http.get("/openapi.json").json()
    long, wrong = "x" * 30_000, list[str | None]()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            places = [
                one["name"] for one in operation.get("parameters", ()) if one["in"] == "query"
            ]
            address = path.replace("{", long + "{").replace("{", "").replace("}", "")
            if places or address != path:
                params = dict.fromkeys(places[:1], long)
                wrong.append(served.held_up(method.upper(), address, params=params))
    assert wrong
    assert not any(wrong), wrong


@pytest.mark.parametrize(("path", "fields"), DEEP)
def test_nothing_large_within_fields_holds_others_up(
    served: Served, path: str, fields: dict[str, Any]
) -> None:
    """Long and many turns, parts, tools, choices, prompts, tokens; what is answered, too."""
    body = {"max_tokens": 2, **ENDPOINTS[path], **fields}
    if path == "/v1/responses":
        del body["max_tokens"]
    assert served.held_up("POST", path, content=json.dumps(body), headers=JSON) is None


def test_no_kept_response_holds_others_up(served: Served) -> None:
    """One of megabytes is told, listed and gone on from."""
    asked = {"model": "alpha", "input": [*TURNS, TURN], "instructions": WORDS * 3000, "store": True}
    kept = served.http.post("/v1/responses", json=asked).json()
    one = f"/v1/responses/{kept['id']}"
    assert served.held_up("GET", one) is None
    assert served.held_up("GET", f"{one}/input_items", params={"limit": 100}) is None
    going_on = {"model": "alpha", "input": "x", "previous_response_id": kept["id"]}
    assert served.held_up("POST", "/v1/responses", json=going_on) is None


def test_no_file_holds_others_up(served: Served) -> None:
    """One of a single line of 20 MB, uploaded and begun as a batch: it is not even parsed."""
    files = {"file": ("in.jsonl", b"[" + b"1," * 10_000_000)}
    worst = []
    for _ in range(3):
        with Watcher(served.server) as watcher:
            file = served.http.post("/v1/files", data={"purpose": "batch"}, files=files).json()
            asked = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
            batch = served.http.post("/v1/batches", json=asked).json()
            while batch["status"] != "failed":
                time.sleep(0.05)
                batch = served.http.get(f"/v1/batches/{batch['id']}").json()
        assert batch["errors"]["data"][0]["code"] == "line_too_long"
        worst.append(watcher.worst_s)
    assert min(worst) <= most_s()
