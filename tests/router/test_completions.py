"""`/v1/completions` as the openai client sees it."""

import asyncio
from typing import Any

import pytest

from models.engines.base import Token, TopLogprob
from router.openai_api.logprobs import Offsets, text_logprobs


def _complete(server: Any, prompt: Any, **fields: Any) -> Any:
    return server.client.completions.create(model="alpha", prompt=prompt, **fields)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([104, 105], ["hi"]),
        ([[104], [105]], ["h", "i"]),
    ],
)
def test_all_forms_of_prompts(server: Any, prompt: Any, texts: list[str]) -> None:
    """Strings, lists of strings, token ids and lists of those give a choice per prompt."""
    answer = _complete(server, prompt)
    assert [choice.text for choice in answer.choices] == texts
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.usage.prompt_tokens == sum(map(len, texts))


def test_choices_are_ordered_by_prompt(server: Any) -> None:
    """With n, the choices of the first prompt come first."""
    answer = _complete(server, ["a", "b"], n=2, best_of=2)
    assert [choice.text for choice in answer.choices] == ["a", "a", "b", "b"]


@pytest.mark.parametrize("stream", [False, True])
def test_echo(server: Any, stream: bool) -> None:
    """echo puts the prompt before the answer, token ids as text."""
    answer = _complete(server, [104, 105], echo=True, stream=stream)
    parts = list(answer) if stream else [answer]
    assert "".join(part.choices[0].text for part in parts) == "hihi"


def test_many_decisions_are_told_in_turns_with_others(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A policy learns what a hundred prompts have cost one by one, while others are served."""
    others, told = [0], list[int]()

    async def serve_others() -> None:
        while len(told) < 100:
            others[0] += 1
            await asyncio.sleep(0)

    serving = asyncio.run_coroutine_threadsafe(serve_others(), server.loop)
    policy = type(server.service.catalog.policies["auto"])
    monkeypatch.setattr(policy, "settle", lambda *_: told.append(others[0]))
    server.client.completions.create(model="auto", prompt=["x"] * 100)
    serving.result(60)
    assert len(set(told)) == 100


def test_sixteen_tokens_by_default(server: Any) -> None:
    """Without max_tokens an answer has at most 16 tokens, as OpenAI has it."""
    [choice] = _complete(server, "x" * 40).choices
    assert (choice.text, choice.finish_reason) == ("x" * 16, "length")


def test_logprobs(server: Any) -> None:
    """The legacy shape: parallel lists, and offsets into the text."""
    logprobs = _complete(server, "abc", logprobs=2).choices[0].logprobs
    assert logprobs.tokens == ["a", "b", "c"]
    assert logprobs.text_offset == [0, 1, 2]
    assert logprobs.token_logprobs == [-0.1] * 3
    assert [len(top) for top in logprobs.top_logprobs] == [2, 2, 2]


def test_streamed_offsets_go_on(server: Any) -> None:
    """In a stream, text offsets count from the start of the answer."""
    chunks = _complete(server, "abc", logprobs=0, stream=True)
    offsets = [offset for chunk in chunks for offset in chunk.choices[0].logprobs.text_offset]
    assert offsets == [0, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_prompt_is_scored(server: Any, max_tokens: int, stream: bool) -> None:
    """With echo and logprobs every token of the prompt is told, the first without a value."""
    answer = _complete(server, "abc", echo=True, logprobs=1, max_tokens=max_tokens, stream=stream)
    parts = [part.choices[0] for part in (answer if stream else [answer])]
    told = [part.logprobs for part in parts if part.logprobs]
    assert "".join(part.text for part in parts) == "abc" + "abc"[:max_tokens]
    assert [token for one in told for token in one.tokens] == [*"abc", *"abc"[:max_tokens]]
    assert [value for one in told for value in one.token_logprobs] == [
        None,
        *[-0.1] * (2 + max_tokens),
    ]
    assert [at for one in told for at in one.text_offset] == list(range(3 + max_tokens))
    assert parts[-1].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_offsets_count_characters(server: Any, stream: bool) -> None:
    """A token within a character starts where the character does; its name is its bytes."""
    answer = _complete(server, "a\U0001f389b", logprobs=1, stream=stream)
    told = [part.choices[0].logprobs for part in (answer if stream else [answer])]
    assert [at for one in told if one for at in one.text_offset] == [0, 1, 1, 1, 1, 2]
    names = [token for one in told if one for token in one.tokens]
    assert names[:3] == ["a", "bytes:\\xf0", "bytes:\\x9f"]


def test_the_drawn_token_is_among_the_alternatives(server: Any) -> None:
    """Also where none were asked for, and where alternatives look alike."""
    [choice] = _complete(server, "ab", logprobs=0).choices
    assert choice.logprobs.top_logprobs == [{"a": -0.1}, {"b": -0.1}]
    same = TopLogprob(token_id=7, raw=b"a", logprob=-3.0)
    drawn = Token(token_id=5, raw=b"a", logprob=-2.0, top=(same,))
    [top] = text_logprobs([drawn], Offsets())["top_logprobs"]
    assert top == {"a": -2.0, "token_id:7": -3.0}


def test_long_prompts_can_be_cut(server: Any) -> None:
    """Of a prompt its last tokens are read, as many as asked for or as there is room for."""
    answer = _complete(server, "abcdef", extra_body={"truncate_prompt_tokens": 2})
    assert (answer.choices[0].text, answer.usage.prompt_tokens) == ("ef", 2)
    answer = _complete(server, "x" * 9000 + "end", extra_body={"truncate_prompt_tokens": -1})
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": [2**32]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x" * 9000}, "prompt"),
        ({"prompt": [1] * 9000}, "prompt"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
    ],
)
def test_bad_fields_are_named(server: Any, body: dict[str, Any], param: str) -> None:
    """Each field that cannot be honoured gets 400 with its name."""
    response = server.post("/v1/completions", **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
