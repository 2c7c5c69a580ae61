"""What a base that is trained from nothing is: its tokenizer, its chat template and its weights.

The tokenizer has bytes, plus one token for each word that the questions are made of. Byte-level, so
every input is representable and round-trips exactly. A whole-word token always starts with a space
or a capital letter, hence a quoted word such as 'plan' stays one token per letter, and digits are
always single tokens. Saved as a standard `tokenizer.json` (byte-level BPE without merges and with
`ignore_merges`, so a listed word is taken whole and all else is bytes).

A user who types a control token such as <|end|> in a message cannot end the turn: the chat
template writes `< |` for every `<|` in content. Text tokenized without the template (plain
completions) is not protected, unless the caller encodes with `split_special_tokens=True`.

Models are plain Llama checkpoints with tied embeddings and grouped-query attention.
"""

from typing import Final

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models.training.settings import BaseShape

_WORDS: Final = """
What Ġis Ġin Ġthe Ġ' Ġmany Ġ+ Ġare Ġdoes Ġand Ġof Ġminutes Ġafter ĠHow ĠPython Ġdays How Ġtime Ġto
Ġ- Ġ= Ġword Which Ġhas Ġ* Ġcomes Ġletters Evaluate Ġletter Ġhave Write Ġ" Ġwhat Ġ[ Ġhours Ġy
Convert Ġmonths Ġbefore Ġprint Ġlen Ġit Ġleft Ġnumber Ġmore Ġshow Ġexpression Ġgive Ġreturn
Ġbackwards Ġlast Ġvalue Ġmonth Ġon Ġday Ġfirst Calculate Ġx Ġdate Reverse In Ġorder Ġfrom Ġcm
Ġsmallest Sort Ġbuys Ġinto Ġpages Ġtwo Ġlist Ġbooks Ġcoins Ġapples Ġpens Ġdollars Ġbox Change
Ġcards Ġwith Ġnow Ġeggs Ġballs Ġlargest Ġstamps Ġnumbers Ġa Ġsecond Spell Ġ? Put Ġmax Ġweekday
Ġbus Ġpeople Ġbirds Ġmuch Ġaway Ġsum Ġgives Ġall Ġweek ĠMonday Ġmin ĠTuesday Ġstr There Ġmm Ġg Ġkg
Ġliters Ġml Ġkm Ġm Ġcents Ġ/ Ġmeters Ġdo Count Ġyears Give Ġspelled Ġget Ġreverse Ġby Add Ġseconds
Ġfeet Ġinches ĠMax ĠTom Ġtimes Ġhyphens Ġpm Ġweeks ĠAnna Ġbetween Ġhyphen ĠLucy ĠBen Ġam ĠEmma Ġ<
ĠSam ĠMia Ġcarries Ġthey Ġtogether Max Ġhad Ġshop Ġsold Ġflew Ġtree Ġwere Ġone Ġanother Ġthere
ĠWednesday Ġthan Ġascending Ġplus Ġread Ġthat ĠSaturday Ben Ġdescending Lucy Ġminus Ġloses Mia Sam
ĠFriday Ġcase Ġupper Ġcapital Anna Ġlong Ġcapitals Ġ% Tom Ġthird Emma Take After Subtract If
ĠSunday Ġbiggest Ġ> Uppercase Ġshortest Ġsorted ĠThursday ĠOctober ĠAugust Ġboxes Ġholds ĠFebruary
ĠNovember Ġlongest ĠMay Ġproduct ĠDecember Ġfourth ĠJanuary ĠMarch ĠJuly Ġpacks ĠJune Each
ĠSeptember ĠApril Multiply Ġabs Ġfinds Ġ( Ġint Ġcost Ġcosts Ġticket Ġtickets Ġfifth Ġdivided
Divide Ġamong Ġeach Ġequally Ġfriend Ġfriends Ġshares Ġsixth You Ġassistant Ġhelpful Answer
ĠAnswer Ġbriefly Ġonly Ġresult ĠRoman Ġnumeral Ġwords Ġdigits Ġas Ġan ĠISO Ġhundred Please Hello
Ġplease
"""


def words() -> list[str]:
    """The words, each with a space or a capital letter at its start."""
    return _WORDS.split()


PAD: Final = "<|pad|>"
END: Final = "<|end|>"
SYSTEM: Final = "<|system|>"
USER: Final = "<|user|>"
ASSISTANT: Final = "<|assistant|>"
SPECIAL_TOKENS: Final = (PAD, END, SYSTEM, USER, ASSISTANT)

CHAT_TEMPLATE: Final = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'developer' -%}{%- set role = 'system' -%}"
    "{%- elif message['role'] in ['system', 'user', 'assistant'] -%}"
    "{%- set role = message['role'] -%}"
    "{%- else -%}{{- raise_exception('unknown role ' ~ message['role']) -}}{%- endif -%}"
    "{%- set content = message['content'] or '' -%}"
    "{%- if content is not string -%}"
    "{%- set content = content | selectattr('type', 'equalto', 'text')"
    " | map(attribute='text') | join('') -%}"
    "{%- endif -%}"
    "{{- '<|' ~ role ~ '|>' ~ (content | replace('<|', '< |')) ~ '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

MAX_TOKENS: Final = 1024
# A word with the space before it, one digit, one other mark with the space before it, white space.
_PIECES: Final = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\s"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer; always the same."""
    byte_pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL_TOKENS, *byte_pieces, *words()]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
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


ROPE_THETA: Final = 10_000.0


def build_model(
    shape: BaseShape, num_layers: int, tokenizer: PreTrainedTokenizerFast, *, seed: int
) -> LlamaForCausalLM:
    """A freshly initialised fp32 model for `tokenizer`; the same for the same seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        num_hidden_layers=num_layers,
        intermediate_size=shape.intermediate_size,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=MAX_TOKENS,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]


@torch.no_grad()
def grow(shallow: LlamaForCausalLM, deep: LlamaForCausalLM) -> None:
    """Copy `shallow` into `deep`, which has a whole multiple of its layers; same function.

    The copied stack is repeated on top of itself (Du et al. 2024, "Stacking Your Transformers"),
    here with the repeats' output projections at zero, so that training goes on from the shallow
    model's loss.

    Raises:
        ValueError: the depths do not divide.
    """
    num_shallow, num_deep = len(shallow.model.layers), len(deep.model.layers)
    if num_deep % num_shallow:
        raise ValueError(f"{num_deep} layers are no multiple of {num_shallow}")
    deep.model.embed_tokens.load_state_dict(shallow.model.embed_tokens.state_dict())
    deep.model.norm.load_state_dict(shallow.model.norm.state_dict())
    for index, layer in enumerate(deep.model.layers):
        layer.load_state_dict(shallow.model.layers[index % num_shallow].state_dict())
        if index >= num_shallow:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
