"""`/v1/completions` as the openai client sees it."""

from typing import Any

import pytest


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
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt"),
    ],
)
def test_bad_fields_are_named(server: Any, body: dict[str, Any], param: str) -> None:
    """Each field that cannot be honoured gets 400 with its name."""
    response = server.post("/v1/completions", **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
