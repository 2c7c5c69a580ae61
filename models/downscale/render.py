"""Examples as token ids, with the part that the assistant writes marked; for any chat template.

A chunk is trained on the prompt that it is served with. So each answer follows what the template
hands over to the assistant with, not what it writes into a finished conversation (reasoning models'
templates put an empty block of thoughts there, or end the prompt with the opening of one), and
prompt and answer are tokenized apart, exactly as at inference. A text begins with what the model
expects there, as a prompt of /v1/completions does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from jinja2.exceptions import TemplateSyntaxError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from models.chat_template import ChatTemplate, Message, Rendering
from models.downscale.corpus import Example
from models.errors import BaseError, CorpusError, RequestError
from models.training.data import Conversation

# For checkpoints that come without a template: they could not be served for chat otherwise.
PLAIN_TEMPLATE: Final = (
    "{%- for message in messages -%}"
    "{{- message['role'] ~ ': ' ~ message['content'] ~ '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}"
)
_BARE: Final = Rendering(generation_prompt=False)
_MARK: Final = "\ue000{}\ue001"
# What filters of templates (tojson, escape, replace) would not leave as it is.
_PROBE: Final = "a \"b\" 'c' \\d\ne\té\u2028 f&g {h} [i] |j| #k *l*"
# A piece of a text shorter than this is not worth measuring.
_MIN_PIECE_TOKENS: Final = 4

# A piece of a rendered conversation: its text, or the turn whose content stands here; and whether
# the assistant writes it.
Piece = tuple[str | int, bool]


@dataclass(frozen=True, kw_only=True)
class Halves:
    """A piece of a text: its `opening`, how it `goes_on`, and its tokens, the latter's marked."""

    opening: str
    goes_on: str
    conversation: Conversation


class Renderer:
    """Renders examples for one tokenizer.

    Templates are slow, so each sequence of roles is rendered once, with marks for the contents,
    and filled in afterwards; contents that a template might treat in a special way (with a "<",
    white space at an end, or all where it does not write them as they are) are rendered one by one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Read the template and the end token of `tokenizer`, which must have both.

        Raises:
            BaseError: the template cannot be read.
        """
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        special = {name: str(text) for name, text in tokenizer.special_tokens_map.items()}
        try:
            self._template = ChatTemplate(tokenizer.get_chat_template(), special_tokens=special)
        except TemplateSyntaxError as error:
            raise BaseError(f"base.checkpoint: its chat template cannot be read: {error}") from None
        end = tokenizer.eos_token_id
        assert isinstance(end, int)
        self._end = end
        plain, whole = (self._backend.encode("a", add_special_tokens=s).ids for s in (False, True))
        num_before = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        self._beginning = whole[:num_before]
        self._verbatim: bool | None = None
        self._special = set(tokenizer.all_special_ids)
        self._layouts: dict[tuple[str, ...], list[list[Piece]]] = {}

    def end_tokens(self) -> list[int]:
        """The tokens that end an answer: the tokenizer's, and the one that the template writes."""
        [pieces] = self._layout(("user", "assistant"))
        closing = pieces[-1][0] if isinstance(pieces[-1][0], str) else ""
        ids = self._backend.encode(closing, add_special_tokens=False).ids
        written = next((token for token in ids if token in self._special), self._end)
        return list(dict.fromkeys((self._end, written)))

    def render(
        self, examples: Sequence[Example], *, max_tokens: int | None = None
    ) -> list[Conversation]:
        """Token ids of `examples`, in order.

        A text longer than `max_tokens` becomes several; a conversation stays whole, however long,
        but becomes one for each answer where the template shows the assistant another prompt than
        the conversation so far.

        Raises:
            CorpusError: the chat template refuses a conversation.
        """
        parts = [part for example in examples for part in self._segments(example)]
        texts = [text for part in parts for text, _ in part]
        encoded = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        conversations: list[Conversation] = []
        for part in parts:
            tokens: list[int] = []
            is_answer: list[bool] = []
            for _, written in part:
                ids = next(encoded).ids
                tokens += ids
                is_answer += [written] * len(ids)
            if len(part) > 1:
                conversations.append(Conversation(tokens=tokens, is_answer=is_answer))
                continue
            tokens.append(self._end)
            size = max(1, max_tokens - len(self._beginning)) if max_tokens else len(tokens)
            conversations += [
                self._piece(tokens[i : i + size], 0) for i in range(0, len(tokens), size)
            ]
        return conversations

    def halves(self, text: str, *, max_tokens: int) -> list[Halves]:
        """The pieces of a held-out `text`, of `max_tokens` at most, each to be gone on with from
        its middle. What is too short for two halves is left out."""
        encoded = self._backend.encode(text, add_special_tokens=False)
        ids, ends = encoded.ids, [0, *(end for _, end in encoded.offsets)]
        size = max(1, max_tokens - len(self._beginning))
        found = []
        for start in range(0, len(ids), size):
            piece = ids[start : start + size]
            if len(piece) < _MIN_PIECE_TOKENS:
                continue
            middle = start + len(piece) // 2
            goes_on = text[ends[middle] : ends[start + len(piece)]]
            if goes_on.strip():
                found.append(
                    Halves(
                        opening=text[ends[start] : ends[middle]],
                        goes_on=goes_on,
                        conversation=self._piece(piece, middle - start),
                    )
                )
        return found

    def _piece(self, tokens: Sequence[int], num_given: int) -> Conversation:
        """Tokens of a text, the first `num_given` of them given, after a text's beginning."""
        given = len(self._beginning) + num_given
        return Conversation(
            tokens=[*self._beginning, *tokens],
            is_answer=[i >= given for i in range(len(self._beginning) + len(tokens))],
        )

    def _segments(self, example: Example) -> list[list[tuple[str, bool]]]:
        """The text of each conversation that an example becomes, cut at the ends of prompts and
        answers; a single segment is a plain text."""
        if example.text is not None:
            return [[(example.text, True)]]
        turns = example.turns
        roles = tuple(turn.role for turn in turns)
        if not self._writes_verbatim() or any(
            "<" in turn.content or turn.content.strip() != turn.content for turn in turns
        ):
            layout = self._lay_out(roles, [turn.content for turn in turns])
        else:
            layout = self._layout(roles)
        found = []
        for pieces in layout:
            segments: list[tuple[str, bool]] = []
            for content, written in pieces:
                text = turns[content].content if isinstance(content, int) else content
                if segments and segments[-1][1] == written:
                    text = segments.pop()[0] + text
                segments.append((text, written))
            found.append(segments)
        return found

    def _writes_verbatim(self) -> bool:
        """Whether the template writes contents as they are, whatever stands in them."""
        if self._verbatim is None:
            turns = [{"role": role, "content": _PROBE} for role in ("user", "assistant")]
            try:
                written = self._template.render(turns, rendering=_BARE)
            except RequestError:
                written = ""
            self._verbatim = written.count(_PROBE) == len(turns)
        return self._verbatim

    def _layout(self, roles: tuple[str, ...]) -> list[list[Piece]]:
        """The conversations of these roles, their contents left open."""
        if roles not in self._layouts:
            marked = self._lay_out(roles, [_MARK.format(i) for i in range(len(roles))])
            self._layouts[roles] = [
                [part for piece in pieces for part in _unmark(*piece)] for pieces in marked
            ]
        return self._layouts[roles]

    def _lay_out(self, roles: Sequence[str], contents: Sequence[str]) -> list[list[Piece]]:
        messages = [
            {"role": role, "content": content}
            for role, content in zip(roles, contents, strict=True)
        ]
        answers = [i for i, role in enumerate(roles) if role == "assistant"]
        try:
            written = [self._answer(messages[: i + 1]) for i in answers]
        except (RequestError, ValueError) as error:
            raise CorpusError(f"the chat template refuses a conversation: {error}") from None
        joined: list[Piece] = []
        so_far = ""
        for prompt, answer in written:
            if not prompt.startswith(so_far):  # earlier answers look different from here
                return [[(prompt, False), (answer, True)] for prompt, answer in written]
            joined += [(prompt[len(so_far) :], False), (answer, True)]
            so_far = prompt + answer
        return [joined]

    def _answer(self, messages: Sequence[Message]) -> tuple[str, str]:
        """The prompt of the last turn as at inference, and what the assistant writes after it.

        That is the content as the template writes it, and its end; found by comparing with the
        same turn of a marked content, since a template may change what it is given.
        """
        prompt = self._template.render(messages[:-1])
        closed = self._template.render(messages, rendering=_BARE)
        mark = _MARK.format("")
        marked = self._template.render(
            [*messages[:-1], {**messages[-1], "content": mark}], rendering=_BARE
        )
        head, shown, tail = marked.partition(mark)
        if shown and closed.startswith(head) and closed.endswith(tail):
            opened = prompt.removeprefix(head) if prompt.startswith(head) else ""
            return prompt, closed[len(head) :].removeprefix(opened)
        if closed.startswith(prompt) and closed != prompt:
            return prompt, closed[len(prompt) :]
        raise ValueError("it does not write an answer where its prompt says, or not at all")


def _unmark(text: str | int, written: bool) -> list[Piece]:
    """Split a rendered text at its marks."""
    head, *rest = str(text).split(_MARK[0])
    pieces: list[Piece] = [(head, written)] if head else []
    for part in rest:
        index, tail = part.split(_MARK[-1], 1)
        pieces.append((int(index), written))
        pieces += [(tail, written)] if tail else []
    return pieces
