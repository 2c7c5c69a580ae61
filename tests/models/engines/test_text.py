"""Text comes out whole, in characters, and never with a stop string."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer

from models.engines.text import TextStream, Vocabulary
from tests.models.engines.stacked.tiny import VOCAB_SIZE, build_tokenizer


@settings(max_examples=300)
@given(
    pieces=st.lists(st.text("abcé", max_size=4), max_size=12),
    stops=st.lists(st.text("abcé", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings(pieces: list[str], stops: list[str]) -> None:
    """What is shown is the text before the first stop string, wherever tokens end; it only grows
    and stays a prefix."""
    stream, shown, seen = TextStream(stops), "", ""
    for piece in pieces:
        shown += stream.push(piece.encode())
        seen += piece
        ends = [seen.find(stop) for stop in stops if stop in seen]
        assert stream.stopped == bool(ends)
        assert (seen[: min(ends)] if ends else seen).startswith(shown)
        if ends:
            assert shown == seen[: min(ends)]
            assert stream.push(b"more") + stream.finish() == ""
            return
    assert shown + stream.finish() == seen


@settings(max_examples=100)
@given(text=st.text(max_size=12), cuts=st.lists(st.integers(0, 40), max_size=6))
def test_characters_stay_whole(text: str, cuts: list[int]) -> None:
    """Bytes cut anywhere give the same text, without replacement characters on the way."""
    raw = text.encode(errors="replace")
    stream, edges = TextStream(()), sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})
    pieces = [stream.push(raw[a:b]) for a, b in pairwise(edges)]
    assert "".join(pieces) + stream.finish() == raw.decode()


def test_an_incomplete_character_at_the_end_is_replaced() -> None:
    """Bytes that never become a character come out as U+FFFD when the answer ends."""
    stream = TextStream(())
    assert stream.push("é".encode()[:1]) == ""
    assert stream.finish() == "\ufffd"


def test_vocabulary_bytes_join_to_the_text() -> None:
    """The raw bytes of a text's tokens are the text's bytes; special tokens leave none."""
    tokenizer = build_tokenizer()
    grammars = LLTokenizer(tokenizer.to_str(), n_vocab=VOCAB_SIZE, eos_token=[0])
    vocabulary = Vocabulary(tokenizer, grammars)
    text = "hello wörld 你好 🙂\n"
    assert b"".join(vocabulary.raw(i) for i in tokenizer.encode(text).ids) == text.encode()
    assert vocabulary.raw(0) == vocabulary.raw(1) == vocabulary.raw(VOCAB_SIZE - 1) == b""
