"""The pool's one tokenizer: bytes, plus one token for each word that the questions are made of.

Byte-level, so every input is representable and round-trips exactly. A whole-word token always
starts with a space or a capital letter, hence a quoted word such as 'plan' stays one token per
letter, and digits are always single tokens. Saved as a standard `tokenizer.json` (byte-level BPE
without merges and with `ignore_merges`, so a listed word is taken whole and all else is bytes).

A user who types a control token such as <|end|> in a message cannot end the turn: the chat
template writes `< |` for every `<|` in content. Text tokenized without the template (plain
completions) is not protected, unless the caller encodes with `split_special_tokens=True`.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from models.tasks import DOMAINS, Split

PAD: Final = "<|pad|>"
END: Final = "<|end|>"
SYSTEM: Final = "<|system|>"
USER: Final = "<|user|>"
ASSISTANT: Final = "<|assistant|>"
SPECIAL_TOKENS: Final = (PAD, END, SYSTEM, USER, ASSISTANT)

SYSTEM_PROMPTS: Final = (
    "You are a helpful assistant.",
    "Answer with the result only.",
    "You are a helpful assistant. Answer briefly.",
)

CHAT_TEMPLATE: Final = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'developer' -%}{%- set role = 'system' -%}"
    "{%- elif message['role'] in ['system', 'user', 'assistant'] -%}"
    "{%- set role = message['role'] -%}"
    "{%- else -%}{{- raise_exception('unknown role ' ~ message['role']) -}}{%- endif -%}"
    "{%- set content = message['content'] or '' -%}"
    "{{- '<|' ~ role ~ '|>' ~ (content | replace('<|', '< |')) ~ '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

MAX_TOKENS: Final = 1024
_SAMPLE_PER_DOMAIN: Final = 20_000
_SAMPLE_SEED: Final = 0
# Template words occur 60 times or more in the sample, a made-up word at most 6 times.
_MIN_COUNT: Final = 30
_NUM_TOKENS: Final = 512
# A word with the space before it, one digit, one other mark with the space before it, white space.
_PIECES: Final = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\s"


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# Courtesies that no template uses; they fill the vocabulary up to its round size.
_COURTESIES: Final = (
    *("Hello", "Hi", "Hey", "Please", "Thanks", "Tell", "Show", "Find", "Compute", "Solve"),
    *("Name", "List", "Ġplease", "Ġhello", "Ġthanks", "Ġyou", "Ġcan", "Ġme", "Ġtell", "Ġyour"),
)


def _common_words(texts: Iterable[str]) -> list[str]:
    """The frequent pieces of several bytes that start with a space or a capital letter."""
    splitter = _splitter()
    seen: Counter[str] = Counter()
    for text in texts:
        seen.update(piece for piece, _ in splitter.pre_tokenize_str(text))
    words = [w for w in seen if len(w) > 1 and (w[0] == "Ġ" or w[0].isupper())]
    frequent = [w for w in words if seen[w] >= _MIN_COUNT]
    return sorted(frequent, key=lambda w: (-seen[w], w))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer made from the training split of all domains; always the same."""
    questions = (
        task.question
        for domain in DOMAINS.values()
        for task in islice(domain.stream(Split.TRAIN, seed=_SAMPLE_SEED), _SAMPLE_PER_DOMAIN)
    )
    byte_pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = _NUM_TOKENS - len(SPECIAL_TOKENS) - len(byte_pieces)
    spoken = [prompt for prompt in SYSTEM_PROMPTS for _ in range(_MIN_COUNT)]
    words = dict.fromkeys([*_common_words((*questions, *spoken)), *_COURTESIES])
    pieces = [*SPECIAL_TOKENS, *byte_pieces, *list(words)[:room]]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
