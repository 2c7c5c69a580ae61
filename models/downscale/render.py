"""Examples as token ids, with the part that the assistant wrote marked; for any chat template.

A conversation is cut where the template would hand over to the assistant, and prompt and answer
are tokenized apart, exactly as at inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from models.chat_template import ChatTemplate
from models.downscale.corpus import Example, Turn
from models.downscale.errors import CorpusError
from models.errors import RequestError
from models.training.data import Conversation

# For checkpoints that come without a template: they could not be served for chat otherwise.
PLAIN_TEMPLATE: Final = (
    "{%- for message in messages -%}"
    "{{- message['role'] ~ ': ' ~ message['content'] ~ '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}"
)
_MARK: Final = "\ue000{}\ue001"

# A piece of a rendered conversation: its text, or the turn whose content stands here; and whether
# the assistant writes it.
Piece = tuple[str | int, bool]


class Renderer:
    """Renders examples for one tokenizer.

    Templates are slow, so each sequence of roles is rendered once, with marks for the contents,
    and filled in afterwards; contents that a template might treat in a special way (with a "<", or
    white space at an end) are rendered as they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Read the template and the end token of `tokenizer`, which must have both."""
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        special = {name: str(text) for name, text in tokenizer.special_tokens_map.items()}
        self._template = ChatTemplate(
            tokenizer.get_chat_template(),
            special_tokens=special,
        )
        end = tokenizer.eos_token_id
        assert isinstance(end, int)
        self._end = end
        self._layouts: dict[tuple[str, ...], list[Piece]] = {}

    def render(self, examples: Sequence[Example], *, max_tokens: int) -> list[Conversation]:
        """Token ids of `examples`, in order.

        A conversation longer than `max_tokens` loses its end; a longer text becomes several.

        Raises:
            CorpusError: the chat template refuses a conversation.
        """
        segments = [self._segments(example) for example in examples]
        texts = [text for one in segments for text, _ in one]
        encoded = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        conversations: list[Conversation] = []
        for example, one in zip(examples, segments, strict=True):
            tokens: list[int] = []
            is_answer: list[bool] = []
            for _, written in one:
                ids = next(encoded).ids
                tokens += ids
                is_answer += [written] * len(ids)
            if example.text is not None:
                tokens, is_answer = [*tokens, self._end], [*is_answer, True]
            last = len(tokens) if example.text is not None else 1
            conversations += [
                Conversation(
                    tokens=tokens[start : start + max_tokens],
                    is_answer=is_answer[start : start + max_tokens],
                )
                for start in range(0, last, max_tokens)
            ]
        return conversations

    def _segments(self, example: Example) -> list[tuple[str, bool]]:
        """The example's text, cut where it changes between prompt and answer."""
        if example.text is not None:
            return [(example.text, True)]
        turns = example.turns
        if any("<" in turn.content or turn.content.strip() != turn.content for turn in turns):
            pieces = self._lay_out(turns, marked=False)
        else:
            roles = tuple(turn.role for turn in turns)
            if roles not in self._layouts:
                self._layouts[roles] = self._lay_out(turns, marked=True)
            pieces = self._layouts[roles]
        segments: list[tuple[str, bool]] = []
        for content, written in pieces:
            text = turns[content].content if isinstance(content, int) else content
            if segments and segments[-1][1] == written:
                text = segments.pop()[0] + text
            segments.append((text, written))
        return segments

    def _lay_out(self, turns: Sequence[Turn], *, marked: bool) -> list[Piece]:
        contents = [_MARK.format(i) if marked else turn.content for i, turn in enumerate(turns)]
        messages = [
            {"role": turn.role, "content": content}
            for turn, content in zip(turns, contents, strict=True)
        ]
        try:
            full = self._template.render(messages, generation_prompt=False)
            pieces: list[Piece] = []
            done = 0
            for i, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                prompt = self._template.render(messages[:i])
                closed = self._template.render(messages[: i + 1], generation_prompt=False)
                found = full.index(contents[i], done)
                start = len(prompt) if full.startswith(prompt) else found
                end = len(closed) if full.startswith(closed) else found + len(contents[i])
                pieces += [(full[done:start], False), (full[start:end], True)]
                done = end
        except (RequestError, ValueError) as error:
            raise CorpusError(f"the chat template refuses a conversation: {error}") from None
        pieces.append((full[done:], False))
        return [part for piece in pieces for part in (_unmark(*piece) if marked else [piece])]


def _unmark(text: str | int, written: bool) -> list[Piece]:
    """Split a rendered text at its marks."""
    head, *rest = str(text).split(_MARK[0])
    pieces: list[Piece] = [(head, written)] if head else []
    for part in rest:
        index, tail = part.split(_MARK[-1], 1)
        pieces.append((int(index), written))
        pieces += [(tail, written)] if tail else []
    return pieces
