"""Options of requests beyond OpenAI's, each with an effect on what a stacked engine answers."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from models.engines.base import GenerationRequest, Structure
from models.errors import RequestError
from tests.models.engines.stacked.tiny import (
    answer,
    build_engine,
    build_tokenizer,
    request,
    save_checkpoint,
    text_of,
    token_ids,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two random checkpoints."""
    root = tmp_path_factory.mktemp("options")
    return [save_checkpoint(root / f"{s}", seed=s, initializer_range=0.08) for s in range(2)]


def _one(folders: list[Path], wanted: GenerationRequest) -> Any:
    [chunks] = answer(build_engine(folders), wanted)
    return chunks


@pytest.mark.parametrize(
    ("structure", "pattern"),
    [
        (Structure(kind="regex", text="[a-c]{3}/x"), "[a-c]{3}/x"),
        *(
            (Structure(kind="regex", text=text), text)
            for text in (r"[ab]\/x", r"C:\\/[ab]", r"[/][ab]\\", "a\n[bc]")
        ),
        (Structure(kind="choice", text='["yes", "no \\"so\\""]'), 'yes|no "so"'),
        (Structure(kind="grammar", text='start: "a" ("b" | "c")'), "a[bc]"),
        (Structure(kind="grammar", text='root ::= "a" ("b" | "c")'), "a[bc]"),
    ],
)
def test_forms(folders: list[Path], structure: Structure, pattern: str) -> None:
    """An answer of a random model follows a regular expression, a choice, or a grammar."""
    for seed in range(3):
        chunks = _one(folders, request([5, 6], structure=structure, temperature=1.0, seed=seed))
        assert re.fullmatch(pattern, text_of(chunks))
        assert chunks[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    "structure",
    [
        Structure(kind="regex", text="([", field="guided_regex"),
        Structure(kind="grammar", text='start: "a', field="guided_grammar"),
    ],
)
def test_forms_that_cannot_be_read_are_refused(folders: list[Path], structure: Structure) -> None:
    """The field is named."""
    with pytest.raises(RequestError, match=structure.field):
        _one(folders, request([5], structure=structure))


def test_blanks_between_json_tokens_are_bounded(folders: list[Path]) -> None:
    """A model that wants nothing but blanks still comes to the end of an object."""
    [blank] = [i for i in range(256) if i == 32]
    structure = Structure(
        kind="json", text='{"properties": {"a": {"const": 1}}, "required": ["a"]}'
    )
    chunks = _one(
        folders,
        request([5], structure=structure, logit_bias={blank: 100.0}, max_tokens=200),
    )
    assert max(map(len, re.findall(r"\s+", text_of(chunks))), default=0) <= 8


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        ({}, True),
        ({"$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"type": "null"}}}, True),
        ({"additionalProperties": {"type": "null"}}, False),
        ({"required": ["a", "b"]}, False),
        ({"allOf": [{"properties": {"b": {"type": "null"}}}]}, False),
    ],
)
def test_objects_have_the_properties_that_are_named(
    folders: list[Path], schema: dict[str, Any], closed: bool
) -> None:
    """A model that wants a comma gets one only where a schema speaks of others, or asks for one."""
    named = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    text = json.dumps({**named, **schema})
    wanted = request(
        [5],
        structure=Structure(kind="json", text=text),
        logit_bias={build_tokenizer().encode(",").ids[0]: 100.0},
        max_tokens=40,
    )
    chunks = _one(folders, wanted)
    assert ("," not in text_of(chunks)) == closed
    if closed:
        assert json.loads(text_of(chunks)) == {"a": 1}


@pytest.mark.parametrize(
    "extra",
    [
        {"type": "string", "format": "password"},
        {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*$"},
        {"type": "array", "uniqueItems": True},
    ],
)
def test_only_strict_schemas_are_taken_at_their_word(folders: list[Path], extra: Any) -> None:
    """What no grammar holds is ignored, and refused where the schema is strict."""
    text = json.dumps(extra)
    assert _one(folders, request([5], structure=Structure(kind="json", text=text)))
    with pytest.raises(RequestError, match="response_format"):
        _one(folders, request([5], structure=Structure(kind="json", text=text, strict=True)))


def test_min_tokens_and_stop_tokens(folders: list[Path]) -> None:
    """A stop token ends the answer and is not shown unless asked; not before min_tokens."""
    free = token_ids(_one(folders, request([5, 6], max_tokens=12, ignore_eos=True)))
    stop = free[3]
    first = free.index(stop)
    wanted = request([5, 6], max_tokens=12, ignore_eos=True, stop_token_ids=(stop,))
    chunks = _one(folders, wanted)
    assert token_ids(chunks) == free[: first + 1]
    assert chunks[-1].finish_reason == "stop"
    longer = request(
        [5, 6], max_tokens=12, ignore_eos=True, stop_token_ids=(stop,), min_tokens=first + 3
    )
    assert len(token_ids(_one(folders, longer))) >= first + 3


def test_repetition_penalty(folders: list[Path]) -> None:
    """With a strong one no token comes twice, nor does one of the prompt."""
    prompt = [5, 6]
    chunks = _one(
        folders, request(prompt, max_tokens=20, ignore_eos=True, repetition_penalty=100.0)
    )
    tokens = [*prompt, *token_ids(chunks)]
    assert len(set(tokens)) == len(tokens)


@pytest.mark.parametrize("members", [["m0"], ["m0", "m1"]])
def test_a_prompt_is_scored_as_answers_are(folders: list[Path], members: list[str]) -> None:
    """What was generated greedily has the same log-probabilities when it is scored as a prompt."""
    engine = build_engine(folders)
    prompt = [5, 6, 7]
    [chunks] = answer(engine, request(prompt, members, max_tokens=8, ignore_eos=True))
    told = [token for chunk in chunks for token in chunk.tokens]
    whole = [*prompt, *(token.token_id for token in told)]
    [scored] = answer(
        build_engine(folders), request(whole, members, max_tokens=1, prompt_logprobs=2)
    )
    tokens = scored[0].prompt
    assert [token.token_id for token in tokens] == whole
    assert tokens[0].logprob is None
    for token, before in zip(tokens[len(prompt) :], told, strict=True):
        assert before.logprob is not None
        assert token.logprob is not None
        assert math.isclose(token.logprob, before.logprob, rel_tol=1e-3, abs_tol=1e-4)
        assert token.top[0].token_id == token.token_id
        assert len(token.top) == 2


def test_a_scored_prompt_comes_with_its_last_hidden_state(folders: list[Path]) -> None:
    """What goes into the last norm at its end is transformers', for each member that reads it."""
    prompt = [5, 6, 7, 8]
    engine = build_engine(folders, step_rows=4)
    [scored] = answer(engine, request(prompt, ["m1", "m0"], max_tokens=2, prompt_logprobs=0))
    kept = [chunk.rows for chunk in scored if chunk.rows is not None]
    assert len(kept) == 1 and kept[0] is scored[0].rows
    for row, folder in zip(kept[0], folders, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        seen: list[torch.Tensor] = []
        model.model.norm.register_forward_pre_hook(
            lambda _, given, seen=seen: seen.append(given[0])
        )
        with torch.inference_mode():
            model(torch.tensor([prompt]))
        np.testing.assert_allclose(row, seen[0][0, -1].numpy(), rtol=1e-4, atol=1e-5)
    [plain] = answer(build_engine(folders), request(prompt, max_tokens=2))
    assert all(chunk.rows is None for chunk in plain)
