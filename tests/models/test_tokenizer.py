"""Tokenizers give what the checkpoint's own would."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

from models.engines.encoder.engine import TextReader
from models.errors import PoolError, RequestError
from models.pool import DEFAULT_POOL
from models.tokenizer import ByteTokenizer, CheckpointTokenizer
from models.tokenizer_json import read_tokenizer

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße, 1+1?"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m.content | tojson }}{% endfor %}"
)


def _checkpoint(folder: Path, *, unknown: str = "?", **config: object) -> Path:
    vocabulary = {"<s>": 0, "a": 1, "b": 2, '"': 3, "?": 4}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(2)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_bytes_and_turns() -> None:
    """Bytes come back whole, and every turn ends with the end-of-turn id."""
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("Grüße")) == "Grüße"
    ids = tokenizer.encode_chat(CHAT)
    assert ids.count(ByteTokenizer.END_OF_TURN) == 2
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.decode(ids).endswith("assistant\n")


def test_checkpoint_text_and_chat(tmp_path: Path) -> None:
    """Text gets the model's first token, a template writes its own, nothing is cut."""
    token = {"content": "<s>", "special": True}
    folder = _checkpoint(tmp_path, bos_token=token, chat_template=TEMPLATE)
    tokenizer = CheckpointTokenizer(folder)
    assert tokenizer.encode("aba") == (0, 1, 2, 1)
    assert tokenizer.encode_chat([{"role": "user", "content": "ab"}]) == (0, 3, 1, 2, 3)
    assert tokenizer.decode((0, 1)) == "a"
    assert tokenizer.vocab_size == 5


def test_a_system_message_opens_conversations_that_have_none(tmp_path: Path) -> None:
    """It stands before the first turn, and gives way to the conversation's own."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    folder = _checkpoint(tmp_path, bos_token="<s>", chat_template=template)
    tokenizer = CheckpointTokenizer(folder, system="b")
    user = {"role": "user", "content": "a"}
    assert tokenizer.encode_chat([user]) == (2, 1)
    assert tokenizer.encode_chat([{"role": "system", "content": "a"}, user]) == (1, 1)
    assert CheckpointTokenizer(folder).encode_chat([user]) == (1,)


def test_template_that_refuses_or_lacks(tmp_path: Path) -> None:
    """A conversation the template refuses, or a model without one, is the client's error."""
    folder = _checkpoint(tmp_path, bos_token="<s>", chat_template=TEMPLATE)
    with pytest.raises(RequestError, match="no system"):
        CheckpointTokenizer(folder).encode_chat(CHAT)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(RequestError, match="no chat template"):
        CheckpointTokenizer(folder).encode_chat(CHAT)


def test_a_text_that_cannot_be_encoded_is_the_clients_error(tmp_path: Path) -> None:
    """A tokenizer without a token for the unknown encodes what it knows, and refuses the rest."""
    folder = _checkpoint(tmp_path, unknown="[UNK]")
    assert CheckpointTokenizer(folder).encode("ab", special=False) == (1, 2)
    with pytest.raises(RequestError, match="cannot encode this text"):
        CheckpointTokenizer(folder).encode("abc")
    reader = TextReader(read_tokenizer(folder), max_tokens=8)
    assert reader.rows(["ab"], cut=False)[0][-2:] == [1, 2]
    with pytest.raises(RequestError, match="cannot encode this text"):
        reader.rows(["ab", "c"], cut=True)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    """A broken tokenizer or template says which file it is."""
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(PoolError, match=r"tokenizer\.json"):
        CheckpointTokenizer(tmp_path)
    _checkpoint(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% if")
    with pytest.raises(PoolError, match="chat template"):
        CheckpointTokenizer(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_same_ids_as_transformers() -> None:
    """On the pool that comes with Shoal, text and conversations get transformers' own ids."""
    from transformers import AutoTokenizer

    folder = DEFAULT_POOL / "base"
    if not folder.is_dir():
        pytest.skip("the default pool is not there")
    ours, theirs = CheckpointTokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("What is 37 + 58?", "Grüße\n\n  x", ""):
        assert list(ours.encode(text)) == theirs(text)["input_ids"]
    for chat in (CHAT, CHAT[1:], [*CHAT, {"role": "assistant", "content": "2"}, CHAT[1]]):
        wanted = theirs.apply_chat_template(chat, add_generation_prompt=True)
        assert list(ours.encode_chat(chat)) == list(wanted["input_ids"])
    assert ours.vocab_size == len(theirs)
