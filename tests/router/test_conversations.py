"""A conversation stays with who answered it, and a tool's result goes to who called."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from policies.base import Decision
from policies.plan import Answer, Plan
from router.conversations import stay
from tests.models.engines.remote.bad_server import BadServer, Reply, called, finish, in_thread
from tests.models.engines.stacked.tiny import save_checkpoint
from tests.router.conftest import Running, running

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
ADD: Any = {"type": "function", "function": {"name": "add", "parameters": SCHEMA}}
A, B = Answer(members=("a",)), Answer(members=("b",))


@pytest.mark.parametrize(
    ("plan", "scores", "familiar", "in_call", "expected"),
    [
        (B, {"a": 0.70, "b": 0.72}, True, False, A),
        (B, {"a": 0.60, "b": 0.72}, True, False, B),
        # The policy chose a model of which it expects less: for its price, or for safety.
        (B, {"a": 0.75, "b": 0.72}, True, False, B),
        (B, {"a": 0.70, "b": 0.72}, False, False, B),
        (B, {"b": 0.72}, None, False, B),
        (Answer(members=("b", "c")), {"a": 0.7, "b": 0.7}, True, False, Answer(members=("b", "c"))),
        (B, {"a": 0.1, "b": 0.9}, True, True, A),
        (Answer(members=("b", "c")), {}, None, True, A),
    ],
)
def test_changing_must_be_worth_it(
    plan: Plan, scores: dict[str, float], familiar: bool | None, in_call: bool, expected: Plan
) -> None:
    """By more than the margin, unless the policy has reasons of its own; never within a call."""
    decision = Decision(plan=plan, scores=scores, familiar=familiar)
    assert stay(decision, A, margin=0.05, in_call=in_call).plan == expected


CALLING = Reply(
    events=[
        called("add", '{"a": 1}', id_="call_far"),
        *finish("tool_calls", prompt_tokens=30, completion_tokens=12),
    ]
)
TEMPLATE = (
    "{% for t in tools or [] %}<tool_call>{{ t | tojson }}{% endfor %}{% for m in messages %}"
    "<|user|>{{ m.role }} {{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function | tojson }}{% endfor %}<|end|>{% endfor %}"
)


@pytest.fixture(scope="module", name="upstream")
def calling_server() -> Iterator[BadServer]:
    """A server that answers everything with one call."""
    with in_thread(CALLING) as server:
        yield server


@pytest.fixture(scope="module", name="front")
def mixed_server(
    upstream: BadServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A stacked member, which `auto` chooses, and a remote one, which takes over from it."""
    folder = tmp_path_factory.mktemp("pool")
    near = save_checkpoint(folder / "near", max_position_embeddings=2048)
    (near / "chat_template.jinja").write_text(TEMPLATE)
    with running(
        folder,
        engines=[
            {"name": "chunks", "kind": "stacked", "options": {"num_threads": 1}},
            {"name": "hosted", "kind": "remote", "options": {"base_url": upstream.url}},
        ],
        models=[
            {"name": "near", "engine": "chunks", "checkpoint": str(near)},
            {"name": "far", "engine": "hosted", "remote": {}},
        ],
        policies={
            "auto": {"kind": "fixed", "plan": "near", "fallback": ["far"]},
            "far": {"kind": "fixed", "plan": "far"},
        },
    ) as server:
        yield server


def _loop(front: Running, first: str, **fields: Any) -> list[str]:
    """Run a loop of three calls, under `auto` after the first; return who answered each time."""
    messages: list[Any] = [{"role": "user", "content": f"Add for {first}."}]
    who = []
    for turn in range(3):
        model = first if turn == 0 else "auto"
        answer = front.client.chat.completions.create(
            model=model,
            messages=messages,
            tools=[ADD],
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=150,
            temperature=1,
            seed=turn,
            **fields,
        )
        [choice] = answer.choices
        assert choice.finish_reason == "tool_calls"
        [call] = choice.message.tool_calls or []
        arguments = json.loads(call.function.arguments)
        messages += [
            choice.message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": str(arguments["a"] + 1)},
        ]
        who += answer.model_extra["shoal"]["members"]
    return who


def test_a_loop_of_calls_on_a_stacked_member(front: Running) -> None:
    """Each call is forced, parsed, answered and goes on, all on the member of ours."""
    assert _loop(front, "auto") == ["near"] * 3


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_only_allowed_tools_are_called(front: Running, path: str) -> None:
    """Of two functions the one that `allowed_tools` names is called, whatever the model drew."""
    functions = [{**ADD["function"], "name": name} for name in ("add", "subtract")]
    if path.endswith("responses"):
        tools: Any = [{"type": "function", **function} for function in functions]
        some = [{"type": "function", "name": "subtract"}]
        choice: Any = {"type": "allowed_tools", "mode": "required", "tools": some}
        body: Any = {"input": "Go on.", "max_output_tokens": 90}
    else:
        tools = [{"type": "function", "function": function} for function in functions]
        some = [{"type": "function", "function": {"name": "subtract"}}]
        allowed = {"mode": "required", "tools": some}
        choice = {"type": "allowed_tools", "allowed_tools": allowed}
        body = {"max_tokens": 90}
    fields = {"temperature": 1, "parallel_tool_calls": False, "tools": tools, "tool_choice": choice}
    for seed in range(3):
        told = front.post(path, model="near", seed=seed, **body, **fields).json()
        calls = told.get("output") or told["choices"][0]["message"]["tool_calls"]
        names = {call.get("name") or call["function"]["name"] for call in calls}
        assert names == {"subtract"}, told


@pytest.mark.parametrize("field", ["guided_regex", "guided_grammar", "structured_outputs"])
def test_a_form_that_cannot_be_read_is_named(front: Running, field: str) -> None:
    """The field in which it was asked for, of several in which it could have been."""
    form: Any = {"regex": "("} if field == "structured_outputs" else "("
    told = front.post(model="near", max_tokens=4, **{field: form})
    assert (told.status_code, told.json()["error"]["param"]) == (400, field)


def test_results_go_to_who_called(front: Running) -> None:
    """Although `auto` would choose another: the member on the other server goes on."""
    assert _loop(front, "policy/far") == ["far"] * 3


def test_other_replicas_read_it_in_the_ledger(front: Running) -> None:
    """A process that did not see the first turn finds in the rows who answered."""
    messages: list[Any] = [{"role": "user", "content": "A question of its own."}]
    first = front.client.chat.completions.create(model="policy/far", messages=messages, tools=[ADD])
    front.settle()
    call = first.choices[0].message
    [made] = call.tool_calls or []
    messages += [
        call.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": made.id, "content": "2"},
    ]
    conversations = front.service._conversations

    def answered() -> Any:
        conversations._answers.clear()
        return front.client.chat.completions.create(
            model="auto", messages=messages, tools=[ADD], max_tokens=8
        )

    front.wait(lambda: answered().model_extra["shoal"]["members"] == ["far"])


def test_a_session_names_a_conversation(front: Running) -> None:
    """Its beginning may change; another session knows nothing of it."""
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    asked: Any = [{"role": "user", "content": "one"}]
    told: Any = [
        {"role": "user", "content": "shortened"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]

    def who(session: str, model: str, messages: Any) -> Any:
        body = {"shoal": {"session": session}}
        return front.chat(
            model=model, messages=messages, tools=[ADD], max_tokens=8, extra_body=body
        ).shoal["members"]

    assert who("s1", "policy/far", asked) == ["far"]
    assert who("s1", "auto", told) == ["far"]
    assert who("s2", "auto", told) == ["near"]
