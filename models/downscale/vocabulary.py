"""The base as everything else takes it: whole, or with the part of its vocabulary that is used.

A small model's embedding is much of it (21% of SmolLM2-135M), and a few domains use a fraction of
its rows. With `base.vocabulary: used` these remain, with what byte-pair encoding makes them of and
all single bytes: text of the corpora becomes the same tokens as before, for no merge that is left
out ever happens there, and any other text becomes more of them. Of what remains the base says what
it said, as if the others were no choice. Members cut from it share its tokenizer.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Set
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from models.downscale.base import CHECKPOINT, load_base, whole_base
from models.downscale.corpora import corpus
from models.downscale.render import Renderer
from models.downscale.stage import Run, remembered, stage
from models.errors import BaseError
from models.tasks.base import Split

_TOKENIZER: Final = "tokenizer.json"
# Settings that name a token, or several, end so; these name some and end otherwise.
_TOKEN_ID: Final = "_token_id"
_SPACE: Final = "▁"  # how SentencePiece writes one
_REFUSED: Final = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias")


@remembered
def base_model(run: Run) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The base in fp32, shared and not to be trained, and the tokenizer of all members."""
    whole = run.recipe.base.vocabulary == "all"
    return load_base(whole_base(run) if whole else vocabulary(run) / CHECKPOINT)


@stage("vocabulary")
def vocabulary(run: Run, folder: Path) -> None:
    """Stage: the base with the tokens that training on the corpora uses."""
    model, tokenizer = load_base(whole_base(run))
    before = _rendered(run, tokenizer)
    sizes = len(tokenizer), model.num_parameters()
    new_ids = cut_vocabulary(model, tokenizer, set(chain(*before)), folder / CHECKPOINT)
    after = _rendered(run, load_base(folder / CHECKPOINT)[1])
    if after != [[new_ids[token] for token in tokens] for tokens in before]:
        raise _refused("its tokenizer would cut the corpora into other tokens")
    run.report(
        f"vocabulary: {len(new_ids):,} of {sizes[0]:,} tokens, {model.num_parameters():,} of "
        f"{sizes[1]:,} parameters"
    )


def _rendered(run: Run, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """The tokens of all that is trained on."""
    renderer, row_tokens = Renderer(tokenizer), run.recipe.adapt.row_tokens
    examples = [one for name in run.recipe.corpora for one in corpus(run, name).of(Split.TRAIN)]
    return [list(one.tokens) for one in renderer.render(examples, max_tokens=row_tokens)]


def cut_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, used: Set[int], folder: Path
) -> dict[int, int]:
    """Write what remains of model and tokenizer to `folder`, and return new tokens by the old.

    `model` is changed in place. Kept are `used`, special and other added tokens, those that the
    settings name, and those of which the tokenizer makes these and any text; in their order.

    Raises:
        BaseError: the tokenizer is none of byte pairs, or the settings of generation name tokens in
            a way that is not supported; says which.
    """
    for name in _REFUSED:
        if getattr(model.generation_config, name, None):
            raise _refused(f"generation_config.json names tokens in {name}")
    tokenizer.save_pretrained(folder)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    new_ids = _cut_tokenizer(state, used | _named(model))
    # Written by the library, so that what it cannot read does not get there.
    Tokenizer.from_str(json.dumps(state)).save(str(folder / _TOKENIZER))
    kept = torch.tensor(list(new_ids))
    with torch.no_grad():
        rows = [table.weight[kept].clone() for table in _tables(model)]
        model.resize_token_embeddings(len(kept), mean_resizing=False)
        for table, left in zip(_tables(model), rows, strict=True):
            table.weight.copy_(left)
    for settings, name, _ in _settings(model):
        setattr(settings, name, _renumbered(getattr(settings, name), new_ids))
    model.save_pretrained(folder)
    return new_ids


def _settings(model: PreTrainedModel) -> list[tuple[Any, str, list[int]]]:
    """What names tokens: the settings, the name in them, and which."""
    found = []
    for settings in (model.config, model.generation_config):
        for name, value in settings.to_dict().items():
            if name.endswith(_TOKEN_ID):
                named = value if isinstance(value, list) else [value]
                found.append((settings, name, [one for one in named if one is not None]))
    return found


def _named(model: PreTrainedModel) -> set[int]:
    """The tokens that settings name: an end may be a token of text, and is an end afterwards."""
    return {token for *_, tokens in _settings(model) for token in tokens}


def _tables(model: PreTrainedModel) -> list[Any]:
    """The embedding and the head, which may be one."""
    return [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[no-untyped-call]


def _cut_tokenizer(state: dict[str, Any], used: Set[int]) -> dict[int, int]:
    """Cut the state of a tokenizer in place; returns the new ids by the old, in their order."""
    pairs = state["model"]
    if pairs["type"] != "BPE" or pairs["continuing_subword_prefix"] or pairs["end_of_word_suffix"]:
        raise _refused(f"its tokenizer is of another kind ({pairs['type']}) than plain byte pairs")
    ids: dict[str, int] = pairs["vocab"]
    added = {token["id"]: token["content"] for token in state["added_tokens"]}
    made_of: defaultdict[str, list[str]] = defaultdict(list)
    for left, right in pairs["merges"]:
        made_of[left + right] += [left, right]
    waiting = [text for text, token in ids.items() if token in used or token in added]
    waiting += [text for text in ids if _is_least(text, by_bytes=pairs["byte_fallback"])]
    waiting += [pairs["unk_token"]] if pairs["unk_token"] else []
    kept: set[str] = set()
    while waiting:
        text = waiting.pop()
        if text not in kept:
            kept.add(text)
            waiting += made_of[text]
    old = sorted({ids[text] for text in kept if text in ids} | set(added))
    new_ids = {token: number for number, token in enumerate(old)}
    pairs["vocab"] = {text: new_ids[ids[text]] for text in ids if text in kept}
    pairs["merges"] = [merge for merge in pairs["merges"] if "".join(merge) in kept]
    for token in state["added_tokens"]:
        token["id"] = new_ids[token["id"]]
    state["padding"] = state["truncation"] = None
    _renumber_processor(state["post_processor"], new_ids)
    return new_ids


def _is_least(text: str, *, by_bytes: bool) -> bool:
    """Whether any text could need this token: one of the bytes, or where there are none, of the
    single characters (which bytes are written as, too)."""
    if by_bytes:
        if text == _SPACE:  # as bytes it would be decoded too late to become a space again
            return True
        return len(text) == len("<0x00>") and text.startswith("<0x") and text.endswith(">")
    return len(text) == 1


def _renumber_processor(processor: dict[str, Any] | None, new_ids: dict[int, int]) -> None:
    """Renumber the tokens that a tokenizer puts around a text."""
    if processor is None:
        return
    for part in processor.get("processors", ()):
        _renumber_processor(part, new_ids)
    for token in processor.get("special_tokens", {}).values():
        token["ids"] = [new_ids[old] for old in token["ids"]]
    for name in {"sep", "cls"} & processor.keys():
        text, old = processor[name]
        processor[name] = [text, new_ids[old]]


def _renumbered(named: int | list[int] | None, new_ids: dict[int, int]) -> int | list[int] | None:
    """The new ids of the tokens that a setting names; of what was no token there is none."""
    if isinstance(named, list):
        return [new_ids[old] for old in named if old in new_ids]
    return None if named is None else new_ids.get(named)


def _refused(why: str) -> BaseError:
    return BaseError(f"base.vocabulary: 'used' cannot be had of this base: {why}; allowed is 'all'")
