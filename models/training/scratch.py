"""Models trained from nothing on generated tasks: their tokenizer, conversations, shape, training.

The tokenizer has bytes, plus one token for each word that the questions are made of. Byte-level, so
every input is representable and round-trips exactly. A whole-word token always starts with a space
or a capital letter, hence a quoted word such as 'plan' stays one token per letter, and digits are
always single tokens. Saved as a standard `tokenizer.json` (byte-level BPE without merges and with
`ignore_merges`, so a listed word is taken whole and all else is bytes).

A user who types a control token such as <|end|> in a message cannot end the turn: the chat
template writes `< |` for every `<|` in content. Text tokenized without the template (plain
completions) is not protected, unless the caller encodes with `split_special_tokens=True`.

Most conversations have one turn; some have several, or a system prompt. They are a function of
(mixture, seed, shard index) alone, so training resumes at any step. Models are plain Llama
checkpoints with tied embeddings and grouped-query attention.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from models.tasks import DOMAINS
from models.tasks.base import Split, Task
from models.training.checkpoint import Progress
from models.training.data import Conversation, Rows, pack
from models.training.loop import Settings, run

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


_SHARE_MULTI_TURN: Final = 0.10
_SHARE_SYSTEM_PROMPT: Final = 0.08
_STEPS_PER_SHARD: Final = 32


class Renderer:
    """Turns tasks into token ids exactly as the chat template does, but in batches."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Look up the control tokens once."""
        self._backend = tokenizer.backend_tokenizer
        self._id: Callable[[str], int] = partial(_token_id, tokenizer)

    def render(self, dialogues: Sequence[tuple[str | None, Sequence[Task]]]) -> list[Conversation]:
        """Render (system prompt or None, turns) pairs."""
        texts: list[str] = []
        for system, turns in dialogues:
            texts += [system] if system is not None else []
            for task in turns:
                texts += [task.question, task.answer]
        encoded = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        end = self._id(END)
        rendered = []
        for system, turns in dialogues:
            roles = ([SYSTEM] if system is not None else []) + [USER, ASSISTANT] * len(turns)
            tokens: list[int] = []
            is_answer: list[bool] = []
            for role in roles:
                body = [*next(encoded).ids, end]
                tokens += [self._id(role), *body]
                is_answer += [False] + [role == ASSISTANT] * len(body)
            rendered.append(Conversation(tokens=tokens, is_answer=is_answer))
        return rendered


def _token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    index = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(index, int)
    return index


def draw_dialogue(
    rng: random.Random, mixture: Mapping[str, float]
) -> tuple[str | None, list[Task]]:
    """One training dialogue: a domain by its share, one turn or a few, now and then a system."""
    name = rng.choices(list(mixture), list(mixture.values()))[0]
    num_turns = rng.randint(2, 3) if rng.random() < _SHARE_MULTI_TURN else 1
    system = rng.choice(SYSTEM_PROMPTS) if rng.random() < _SHARE_SYSTEM_PROMPT else None
    return system, [DOMAINS[name].sample(rng, Split.TRAIN) for _ in range(num_turns)]


def steps(
    renderer: Renderer,
    mixture: Mapping[str, float],
    *,
    seed: int,
    first_step: int,
    rows_per_step: int,
    row_tokens: int,
    question_weight: float,
) -> Iterator[Rows]:
    """Endless training batches from step `first_step` on."""
    shard, skip = divmod(first_step, _STEPS_PER_SHARD)
    while True:
        rng = random.Random(f"{sorted(mixture.items())}/{seed}/{shard}")
        rows = pack(
            _conversations(renderer, rng, mixture),
            num_rows=_STEPS_PER_SHARD * rows_per_step,
            row_tokens=row_tokens,
            question_weight=question_weight,
        )
        for step in range(skip, _STEPS_PER_SHARD):
            yield rows.part(slice(step * rows_per_step, (step + 1) * rows_per_step))
        shard, skip = shard + 1, 0


def _conversations(
    renderer: Renderer, rng: random.Random, mixture: Mapping[str, float]
) -> Iterator[Conversation]:
    while True:
        yield from renderer.render([draw_dialogue(rng, mixture) for _ in range(256)])


ROPE_THETA: Final = 10_000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaShape:
    """Width, depth and heads of one model."""

    hidden_size: int
    num_layers: int
    feed_forward_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int = 32


def build_model(
    shape: LlamaShape, tokenizer: PreTrainedTokenizerFast, *, seed: int
) -> LlamaForCausalLM:
    """A freshly initialised fp32 model for `tokenizer`; the same for the same seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        intermediate_size=shape.feed_forward_size,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_size,
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


@dataclass(frozen=True, kw_only=True)
class TaskTraining(Settings):
    """Everything that the trained weights depend on, beside the model's own shape and seed.

    `mixture` gives each domain's share of the conversations.
    """

    mixture: Mapping[str, float]
    question_weight: float = 0.2
    seed: int = 0


def train(
    model: PreTrainedModel,
    renderer: Renderer,
    recipe: TaskTraining,
    *,
    folder: Path,
    resume: bool = False,
    checkpoint_every_s: float = 60.0,
    report: Callable[[str], None] = print,
) -> Progress:
    """Train `model` in place on fresh tasks; see `models.training.loop.run`."""
    return run(
        model,
        lambda first_step: steps(
            renderer,
            recipe.mixture,
            seed=recipe.seed,
            first_step=first_step,
            rows_per_step=recipe.rows_per_step,
            row_tokens=recipe.row_tokens,
            question_weight=recipe.question_weight,
        ),
        recipe,
        asdict(replace(recipe, mixture=dict(recipe.mixture))),
        folder=folder,
        resume=resume,
        checkpoint_every_s=checkpoint_every_s,
        report=report,
    )
