"""The base: a checkpoint that is checked before work begins, or one that is trained here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from models.card import SUPPORTED_ARCHITECTURES, weight_files
from models.downscale.errors import BaseError, DivergedError
from models.downscale.recipe import BaseShape, BaseStage, BaseTraining
from models.downscale.render import PLAIN_TEMPLATE
from models.errors import PoolError, TrainingDiverged
from models.training.data import Renderer
from models.training.export import export_model
from models.training.shapes import Shape, build_model, grow, num_parameters
from models.training.tokenizer import build_tokenizer
from models.training.train import Recipe, train

CHECKPOINT: Final = "checkpoint"


def check_base(folder: Path) -> list[Path]:
    """Return the files that a base depends on: config, tokenizer and weights.

    Raises:
        BaseError: one is missing, or the architecture cannot be cut.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise BaseError(f"base.checkpoint: {config} is missing; is it a Hugging Face checkpoint?")
    try:
        facts: dict[str, Any] = json.loads(config.read_text())
    except ValueError as error:
        raise BaseError(f"base.checkpoint: {config} is not valid JSON: {error}") from None
    architecture = facts.get("model_type")
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise BaseError(
            f"base.checkpoint: {config}: model_type {architecture!r} is not supported; "
            f"allowed are {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    if "quantization_config" in facts:
        raise BaseError(f"base.checkpoint: {config}: a quantized checkpoint cannot be cut")
    if not (folder / "tokenizer.json").is_file():
        raise BaseError(f"base.checkpoint: {folder / 'tokenizer.json'} is missing")
    try:
        weights = weight_files(folder)
    except PoolError as error:
        raise BaseError(f"base.checkpoint: {error}") from None
    others = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return [*(folder / name for name in others if (folder / name).is_file()), *weights]


def load_base(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a base in fp32 and its tokenizer, which gets a plain chat template if it has none.

    Raises:
        BaseError: the weights do not fit the config, or the tokenizer not the weights.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BaseError(f"base.checkpoint: {folder} cannot be loaded: {error}") from None
    model, found = loaded
    if found["missing_keys"] or found["mismatched_keys"]:
        bad = sorted([*found["missing_keys"], *found["mismatched_keys"]])
        raise BaseError(f"base.checkpoint: {folder}: the weights lack or misfit {bad[:3]}")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise BaseError(f"base.checkpoint: {folder}: the tokenizer is no fast tokenizer")
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
    model.eval()  # type: ignore[no-untyped-call]
    return model, tokenizer


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
    renderer = Renderer(tokenizer)
    model: LlamaForCausalLM | None = None
    for number, stage in enumerate(settings.stages):
        deeper = build_model(_shape(settings.shape, stage), tokenizer, seed=stage.seed)
        if model is not None:
            try:
                grow(model, deeper)
            except ValueError as error:
                raise BaseError(f"base.train.stages.{number}.num_layers: {error}") from None
        model = deeper
        try:
            progress = train(
                model,
                renderer,
                _recipe(settings, stage, domains),
                folder=folder / f"stage-{number}",
                resume=True,
                report=report,
            )
        except TrainingDiverged as error:
            raise DivergedError(f"base.train.stages.{number}: {error}") from None
    assert model is not None
    export_model(model, tokenizer, progress, folder / CHECKPOINT)
    return folder / CHECKPOINT


def trained_parameters(settings: BaseTraining) -> int:
    """Return how many parameters the base will have, without training it."""
    with torch.device("meta"):
        shape = _shape(settings.shape, settings.stages[-1])
        return num_parameters(build_model(shape, build_tokenizer(), seed=0))


def _shape(shape: BaseShape, stage: BaseStage) -> Shape:
    return Shape(
        hidden_size=shape.hidden_size,
        num_layers=stage.num_layers,
        feed_forward_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_dim,
    )


def _recipe(settings: BaseTraining, stage: BaseStage, domains: Sequence[str]) -> Recipe:
    return Recipe(
        mixture={name: 1 / len(domains) for name in domains},
        num_steps=stage.steps,
        num_decay_steps=stage.decay_steps,
        rows_per_step=stage.rows_per_step,
        row_tokens=stage.row_tokens,
        learning_rate=stage.learning_rate,
        muon_learning_rate=stage.muon_learning_rate,
        seed=stage.seed,
        compiled=settings.compiled,
    )
