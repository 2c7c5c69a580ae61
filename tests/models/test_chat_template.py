"""Conversations become the prompts that transformers makes of them; failures are the request's."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from models.card import read_card
from models.chat_template import Rendering, read_chat_template
from models.errors import PoolError, RequestError
from models.spec import Model, ModelSpec
from models.tokenizer import CheckpointTokenizer, load_tokenizers
from tests.models.engines.stacked.tiny import save_checkpoint

CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "é <b>\n there"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "go"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
LOOP = "{% for m in messages %}"
TEMPLATES = {
    "generation tag": LOOP + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% endif %}{{ m.role }}{% endfor %}",
    "generation scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}"
    "{% endgeneration %}{{ x }}",
    "generation trimmed": "a {%- generation -%} b {%- endgeneration -%} c",
    "tojson": LOOP + "{{ m | tojson }}{% endfor %}",
    "tojson ascii": LOOP + "{{ m.content | tojson(ensure_ascii=True) }}{% endfor %}",
    "tojson separators": LOOP + "{{ m | tojson(separators=(',', ':')) }}{% endfor %}",
    "tojson indent": LOOP + "{{ m | tojson(indent=2, sort_keys=True) }}{% endfor %}",
    "blocks": LOOP + "\n  {% if loop.last %}\n  last\n  {% endif %}\n{% endfor %}\n",
    "loop controls": LOOP + "{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "strftime_now": "{{ strftime_now('%Y')[:2] }}",
    "special tokens": "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}|"
    "{{ image_token }}|{{ boi_token }}",
    "undefined": "{{ nothing }}{% if enable_thinking is defined %}x{% endif %}{{ tools }}",
    "documents": "{{ documents }}{{ add_generation_prompt }}",
    "tools": "{% if tools %}{{ tools | tojson }}{% endif %}{{ messages | length }}",
    "namespace": "{% set ns = namespace(n=0) %}" + LOOP + "{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}",
    "macro": "{% macro say(m) %}[{{ m.content | trim }}]{% endmacro %}" + LOOP + "{{ say(m) }}"
    "{% endfor %}",
}
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|user|>",
    "eos_token": {"__type": "AddedToken", "content": "<|end|>", "special": True},
    "image_token": "<image>",
    "extra_special_tokens": {"boi_token": "<boi>"},
}


def checkpoint(folder: Path, template: Any = None, **config: Any) -> Path:
    """A checkpoint with `template` in its tokenizer_config.json."""
    save_checkpoint(folder)
    facts = CONFIG | config | ({} if template is None else {"chat_template": template})
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("case", TEMPLATES)
def test_prompts_are_those_of_transformers(case: str, tools: Any, tmp_path: Path) -> None:
    """The same text, with and without tools."""
    folder = checkpoint(tmp_path, TEMPLATES[case])
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        CHAT, tools=tools, tokenize=False, add_generation_prompt=True
    )
    ours = read_chat_template(folder)
    assert ours is not None
    assert ours.render(CHAT, tools or ()) == theirs


OPEN = {
    "ChatML": LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "trimmed": LOOP + "{{ m.role }}: {{ m.content | trim }}\nend of turn\n{% endfor %}",
}


@pytest.mark.parametrize("content", ["end", "the end ", " a\n\n", "", "im_end", "é"])
@pytest.mark.parametrize("case", OPEN)
def test_last_turns_are_left_open_as_by_transformers(
    case: str, content: str, tmp_path: Path
) -> None:
    """However the last turn's content looks, and whatever the template writes after it."""
    folder = checkpoint(tmp_path, OPEN[case])
    chat = [*CHAT[:1], {"role": "assistant", "content": content}]
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        chat, tokenize=False, continue_final_message=True
    )
    ours = read_chat_template(folder)
    assert ours is not None
    assert ours.render(chat, (), Rendering(continue_final=True)) == theirs
    assert chat[-1]["content"] == content


def test_a_last_turn_that_is_not_shown_cannot_be_left_open(tmp_path: Path) -> None:
    """As in transformers, where the template drops or changes the content."""
    for template in ("{{ messages[0].content }}", "{{ messages[-1].content | upper }}"):
        found = read_chat_template(checkpoint(tmp_path, template))
        assert found is not None
        with pytest.raises(RequestError, match="does not show") as caught:
            found.render(CHAT[:2], (), Rendering(continue_final=True))
        assert caught.value.param == "continue_final_message"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content + 1 }}", "the chat template fails on them: TypeError"),
        ("{{ messages[9].content.x }}", "the chat template refuses them"),
        ("{{ raise_exception('roles must alternate') }}", "refuses them: roles must alternate"),
        ("{{ 1 / 0 }}", "fails on them: ZeroDivisionError"),
        ("{% for i in range(1000000000) %}{% endfor %}", "fails on them: OverflowError"),
        ("{{ messages.append(1) }}", "the chat template refuses them"),
    ],
)
def test_failures_are_the_requests(template: str, message: str, tmp_path: Path) -> None:
    """Whatever a template does on a conversation, the client hears of it as its own error."""
    found = read_chat_template(checkpoint(tmp_path, template))
    assert found is not None
    with pytest.raises(RequestError, match=message) as caught:
        found.render(CHAT)
    assert caught.value.param == "messages"


def test_named_templates(tmp_path: Path) -> None:
    """Of several, "default" is taken, and "tool_use" where tools are offered; as transformers."""
    names = ("default", "tool_use", "rag")
    named = [{"name": name, "template": name} for name in names]
    folder = tmp_path
    for written in (named, {name: name for name in names}):
        checkpoint(folder, written)
        theirs = AutoTokenizer.from_pretrained(folder)
        for tools in (None, TOOLS):
            found = read_chat_template(folder)
            assert found is not None
            wanted = theirs.apply_chat_template(CHAT, tools=tools, tokenize=False)
            assert found.render(CHAT, tools or ()) == wanted
    (folder / "chat_template.jinja").write_text("from a file é", encoding="utf-8")
    found = read_chat_template(folder)
    assert found is not None
    assert found.render(CHAT, TOOLS) == "from a file é"
    (folder / "chat_template.jinja").unlink()
    checkpoint(folder, named[1:])
    with pytest.raises(PoolError, match="none is called 'default'"):
        read_chat_template(folder)


@pytest.mark.parametrize("written", [5, True, ["text"], [{"name": "default"}], {"default": 5}])
def test_a_template_that_is_no_text_is_refused(written: Any, tmp_path: Path) -> None:
    """What is neither text nor names of texts is named, instead of becoming the prompt itself."""
    with pytest.raises(PoolError, match=r"tokenizer_config\.json: chat_template .* is not allowed"):
        read_chat_template(checkpoint(tmp_path, written))


def test_each_model_has_its_own_template(tmp_path: Path) -> None:
    """Models with one tokenizer and different templates prompt differently, those alike share."""
    folders = {
        "a": checkpoint(tmp_path / "a", "A {{ messages[0].content }}"),
        "b": checkpoint(tmp_path / "b", "B {{ messages[0].content }}"),
        "c": checkpoint(tmp_path / "c", "A {{ messages[0].content }}"),
        "d": checkpoint(tmp_path / "d", "A {{ messages[0].content }}", bos_token="<|end|>"),
        "e": checkpoint(
            tmp_path / "e", "A {{ messages[0].content }}", extra_special_tokens={"m_token": "go"}
        ),
    }
    models = [
        Model(
            spec=ModelSpec(name=name, engine="e", checkpoint=str(folder)),
            card=read_card(folder),
            tokenizer=folder,
        )
        for name, folder in folders.items()
    ]
    assert len({model.card.tokenizer_sha256 for model in models if model.card}) == 1
    loaded = load_tokenizers(models)
    prompts = {name: loaded[name].decode(loaded[name].encode_chat(CHAT[2:])) for name in folders}
    assert prompts["a"] == prompts["c"] == "A go"
    assert prompts["b"] == "B go"
    assert loaded["a"] is loaded["c"]
    assert loaded["a"] is not loaded["d"]
    assert loaded["e"].encode("go") != loaded["a"].encode("go")


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": True, "add_eos_token": True},
        {"add_bos_token": False},
        {"split_special_tokens": True},
        {"pad_token": "hello", "unk_token": "<new>"},
        {"additional_special_tokens": ["<extra>", "th"]},
        {"extra_special_tokens": ["<extra>"], "image_token": "<|image|>"},
        {"added_tokens.json": {"[CALL]": 297, "<think>": 296, "<|end|>": 0}},
        {"added_tokens.json": {"<extra>": 296}, "extra_special_tokens": ["<extra>"]},
        {
            "added_tokens_decoder": {
                "0": {"content": "<|end|>", "special": False},
                "320": {"content": "<think>", "special": False, "normalized": False},
                "321": {"content": "[CALL]", "special": True, "normalized": False},
            }
        },
    ],
)
def test_ids_and_texts_are_those_of_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    """What tokenizer_config.json adds to a tokenizer changes ids and texts alike."""
    older = config.pop("added_tokens.json", None)
    folder = checkpoint(tmp_path, "{{ messages[0].content }}", **config)
    if older is not None:
        (folder / "added_tokens.json").write_text(json.dumps(older))
    ours, theirs = CheckpointTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    for text in ("hello", "<think> a</think>[CALL]<extra>b<|user|>", " the <new> <|end|>"):
        ids = theirs(text)["input_ids"]
        assert list(ours.encode(text)) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
