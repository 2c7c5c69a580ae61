"""The base: a checkpoint that is checked before work begins, or one that is trained here.

A GGUF file is dequantized into a folder first; all else reads folders.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from models.card import SUPPORTED_ARCHITECTURES, ModelCard, read_card
from models.chat_template import read_chat_template
from models.downscale.corpus import draw_example
from models.downscale.dequantize import dequantize
from models.downscale.recipe import TASKS
from models.downscale.render import PLAIN_TEMPLATE, Renderer
from models.downscale.stage import Run, stage
from models.engines.stacked.architecture import read_architecture
from models.errors import BaseError, DivergedError, PoolError, TrainingDiverged
from models.sources.locate import locate
from models.training.checkpoint import Progress, export_checkpoint
from models.training.data import Conversation, Rows, pack
from models.training.loop import Settings
from models.training.loop import run as run_loop
from models.training.scratch import build_model, build_tokenizer, grow
from models.training.settings import BaseTraining

CHECKPOINT: Final = "checkpoint"
_STEPS_PER_SHARD: Final = 32


@stage("base")
def base(run: Run, folder: Path) -> None:
    """Stage: the base, trained into the stage's folder or read from where it is."""
    settings = run.recipe.base
    if settings.checkpoint is not None:
        given = run.read(find_base(settings.checkpoint))
        if not given.is_dir():
            check_base(dequantize(given, folder / CHECKPOINT))
        return
    training = settings.train
    assert training is not None
    tasks = [run.recipe.domains[name].corpus.removeprefix(TASKS) for name in run.domains]
    train_base(training, tasks, folder, report=run.report)


def whole_base(run: Run) -> Path:
    """The checkpoint of the base, with all of its vocabulary."""
    made = base(run) / CHECKPOINT
    given = run.recipe.base.checkpoint
    return made if made.is_dir() or given is None else find_base(given)


def find_base(checkpoint: str) -> Path:
    """The folder or .gguf file that a recipe names, fetched if it must be.

    Raises:
        BaseError: it cannot be had.
    """
    try:
        return locate(checkpoint, folder=Path()).path
    except PoolError as error:
        raise BaseError(f"base.checkpoint: {error}") from None


def check_base(folder: Path, *, row_tokens: int = 1) -> ModelCard:
    """Read the card of a base, with the reader of the engine that will serve what is cut from it.

    Rows of `row_tokens` will be trained on. Of a .gguf file only the head is checked, the rest once
    it is dequantized.

    Raises:
        BaseError: a file is missing, or its chunks could not be trained or served; names the file
            and the key.
    """
    try:
        card = read_card(folder)
        if card.shape.architecture not in SUPPORTED_ARCHITECTURES:
            raise BaseError(
                f"base.checkpoint: {folder if card.is_gguf else folder / 'config.json'}: "
                f"model_type {card.shape.architecture!r} is not supported; "
                f"allowed are {', '.join(SUPPORTED_ARCHITECTURES)}"
            )
        read_chat_template(folder)
        if card.is_gguf:
            return card
        architecture = read_architecture(card)
    except PoolError as error:
        raise BaseError(f"base.checkpoint: {error}") from None
    if architecture.activation != "silu":
        raise BaseError(
            f"base.checkpoint: {folder / 'config.json'}: hidden_act {architecture.activation!r} is "
            "served, but not trained; allowed is silu"
        )
    windows = [layer.window_tokens for layer in architecture.layers]
    shortest = min((window for window in windows if window is not None), default=row_tokens)
    if row_tokens > shortest:
        raise BaseError(
            f"adapt.row_tokens: {row_tokens} is more than the base's sliding_window of {shortest} "
            "tokens; training looks back over the whole row"
        )
    return card


def load_base(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a base in fp32 and its tokenizer, which gets a plain chat template if it has none.

    Raises:
        BaseError: the weights do not fit the config, or the tokenizer not the weights.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        # As the file has it: of some classes AutoTokenizer makes another that splits otherwise.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of a damaged file the libraries raise whatever it leads to
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise BaseError(
            f"base.checkpoint: {folder} cannot be loaded: {type(error).__name__}: {error}"
        ) from None
    model, found = loaded
    if found["missing_keys"] or found["mismatched_keys"]:
        bad = sorted([*found["missing_keys"], *found["mismatched_keys"]])
        raise BaseError(f"base.checkpoint: {folder}: the weights lack or misfit {bad[:3]}")
    if len(tokenizer) > model.config.vocab_size:
        raise BaseError(
            f"base.checkpoint: {folder}: tokenizer and weights do not belong together: the "
            f"tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}"
        )
    if tokenizer.eos_token_id is None:
        raise BaseError(f"base.checkpoint: {folder}: the tokenizer has no eos_token")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE
    assert isinstance(model, PreTrainedModel)
    model.generation_config = _generation(model, Renderer(tokenizer).end_tokens())
    model.eval()  # type: ignore[no-untyped-call]
    return model, tokenizer


def _generation(model: PreTrainedModel, ends: Sequence[int]) -> GenerationConfig:
    """What the base says of generation, and the tokens that end an answer in its chat template.

    What transformers reads but refuses to write (do_sample off beside a temperature) is left out.
    """
    generation = model.generation_config or GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        generation.validate(strict=True)
    except ValueError:
        kept = {name: getattr(generation, name) for name in ("bos_token_id", "pad_token_id")}
        kept["eos_token_id"] = generation.eos_token_id
        generation = GenerationConfig(**kept)  # type: ignore[no-untyped-call]
    given = generation.eos_token_id
    every = list(dict.fromkeys((*(given if isinstance(given, list) else [given]), *ends)))
    known = [token for token in every if token is not None]
    generation.eos_token_id = known[0] if len(known) == 1 else known
    return generation


@dataclass(frozen=True, kw_only=True)
class TaskTraining(Settings):
    """Everything that the trained weights depend on, beside the model's own shape and seed.

    `mixture` gives each task domain's share of the conversations.
    """

    mixture: Mapping[str, float]
    question_weight: float = 0.2
    seed: int = 0


def train_base(
    settings: BaseTraining,
    domains: Sequence[str],
    folder: Path,
    *,
    report: Callable[[str], None],
) -> Path:
    """Train a base on the task `domains`, in equal parts, and return its checkpoint's folder.

    Training state is kept under `folder`; an interrupted run goes on from it.

    Raises:
        BaseError: a stage's depth is no multiple of the one before.
        DivergedError: the loss is not finite.
    """
    tokenizer = build_tokenizer()
    model: LlamaForCausalLM | None = None
    for number, stretch in enumerate(settings.stages):
        deeper = build_model(settings.shape, stretch.num_layers, tokenizer, seed=stretch.seed)
        if model is not None:
            try:
                grow(model, deeper)
            except ValueError as error:
                raise BaseError(f"base.train.stages.{number}.num_layers: {error}") from None
        model = deeper
        training = TaskTraining(
            mixture={name: 1 / len(domains) for name in domains},
            num_steps=stretch.steps,
            num_decay_steps=stretch.decay_steps,
            compiled=settings.compiled,
            **stretch.model_dump(exclude={"num_layers", "steps", "decay_steps"}),
        )
        try:
            train_on_tasks(
                model,
                tokenizer,
                training,
                folder=folder / f"stage-{number}",
                resume=True,
                report=report,
            )
        except TrainingDiverged as error:
            raise DivergedError(f"base.train.stages.{number}: {error}") from None
    assert model is not None
    model.generation_config.do_sample = False
    export_checkpoint(model.to(torch.bfloat16), tokenizer, folder / CHECKPOINT)  # type: ignore[arg-type]
    return folder / CHECKPOINT


def train_on_tasks(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    training: TaskTraining,
    *,
    folder: Path,
    resume: bool = False,
    checkpoint_every_s: float = 60.0,
    report: Callable[[str], None],
) -> Progress:
    """Train `model` in place on fresh tasks; see `models.training.loop.run`."""
    return run_loop(
        model,
        lambda first_step: batches(tokenizer, training, first_step=first_step),
        training,
        asdict(training),
        folder=folder,
        resume=resume,
        checkpoint_every_s=checkpoint_every_s,
        report=report,
    )


def batches(
    tokenizer: PreTrainedTokenizerFast, training: TaskTraining, *, first_step: int
) -> Iterator[Rows]:
    """Endless training batches from step `first_step` on.

    They are a function of (mixture, seed, shard's number) alone, so that training resumes at any
    step.
    """
    renderer = Renderer(tokenizer)
    shard, skip = divmod(first_step, _STEPS_PER_SHARD)
    while True:
        rng = random.Random(f"{sorted(training.mixture.items())}/{training.seed}/{shard}")
        rows = pack(
            _conversations(renderer, rng, training.mixture),
            num_rows=_STEPS_PER_SHARD * training.rows_per_step,
            row_tokens=training.row_tokens,
            question_weight=training.question_weight,
        )
        for step in range(skip, _STEPS_PER_SHARD):
            first = step * training.rows_per_step
            yield rows.part(slice(first, first + training.rows_per_step))
        shard, skip = shard + 1, 0


def _conversations(
    renderer: Renderer, rng: random.Random, mixture: Mapping[str, float]
) -> Iterator[Conversation]:
    while True:
        yield from renderer.render([draw_example(rng, mixture) for _ in range(256)])


def trained_parameters(settings: BaseTraining) -> int:
    """Return how many parameters the base will have, without training it."""
    with torch.device("meta"):
        depth = settings.stages[-1].num_layers
        return build_model(settings.shape, depth, build_tokenizer(), seed=0).num_parameters()
