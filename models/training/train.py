"""The training loop: packed rows in, a trained Llama checkpoint out; resumable at any step.

Hidden matrices are trained by Muon (orthogonalised momentum, Jordan et al. 2024), embedding and
norms by AdamW; the schedule is warm-up, stable, decay.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from transformers import LlamaForCausalLM

from models.training.checkpoint import Progress, load_checkpoint, read_progress, save_checkpoint
from models.training.data import Renderer, Rows, steps
from models.training.forward import low_precision, packed_loss, rotary_tables, to_tensors
from models.training.schedule import learning_rate_share

_REPORT_EVERY_STEPS: Final = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that the trained weights depend on, beside the model's own shape and seed.

    `mixture` gives each domain's share of the conversations. Both learning rates are peaks; with
    `muon` off, AdamW at `learning_rate` trains everything.
    """

    mixture: Mapping[str, float]
    num_steps: int
    num_decay_steps: int
    num_warmup_steps: int = 50
    rows_per_step: int = 32
    row_tokens: int = 128
    learning_rate: float = 3e-3
    muon_learning_rate: float = 6e-3
    weight_decay: float = 0.05
    question_weight: float = 0.2
    clip_norm: float = 1.0
    seed: int = 0
    muon: bool = True
    compiled: bool = True


def make_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices and AdamW for the rest; or AdamW for all."""
    parameters = dict(model.named_parameters())
    hidden = [p for n, p in parameters.items() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in parameters.items() if p.ndim == 1 or "embed" in n]
    adamw = torch.optim.AdamW(
        others if recipe.muon else [*hidden, *others],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.0 if recipe.muon else recipe.weight_decay,
        fused=True,
    )
    if not recipe.muon:
        return [adamw]
    muon = torch.optim.Muon(
        hidden,
        lr=recipe.muon_learning_rate,
        weight_decay=recipe.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, adamw]


class Trainer:
    """One run's model, optimizers and loss; knows nothing of time, files or schedules."""

    def __init__(self, model: LlamaForCausalLM, recipe: Recipe) -> None:
        """Prepare to train `model` in place."""
        self.model = model
        self.optimizers = make_optimizers(model, recipe)
        self._peaks = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self._clip_norm = recipe.clip_norm
        self._dtype = torch.bfloat16 if recipe.compiled else torch.float32
        self._loss = torch.compile(packed_loss) if recipe.compiled else packed_loss
        config = model.config
        head_size = int(config.head_dim or config.hidden_size // config.num_attention_heads)
        cos, sin = rotary_tables(head_size, recipe.row_tokens)
        self._constants: dict[str, Any] = {
            "cos": cos,
            "sin": sin,
            "num_layers": config.num_hidden_layers,
            "head_size": head_size,
            "eps": config.rms_norm_eps,
        }

    def step(self, rows: Rows, learning_rate_share: float) -> float:
        """One update at this share of the peak learning rates; returns the loss before it."""
        for optimizer, rates in zip(self.optimizers, self._peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = learning_rate_share * rate
        weights = low_precision(self.model, self._dtype)
        loss = self._loss(weights, **{**to_tensors(rows), **self._constants})
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def restore(self, folder: Path, recipe: Mapping[str, Any]) -> Progress | None:
        """Load the newest checkpoint that this recipe can go on from, if there is one.

        A checkpoint from before the decay fits a longer or shorter run of the same recipe too.
        """
        length = {"num_steps", "num_decay_steps"}
        for name in ("last", "stable"):
            progress = read_progress(folder / name)
            if progress is None:
                continue
            differs = {k for k, v in recipe.items() if progress.recipe.get(k) != v}
            stable = min(r["num_steps"] - r["num_decay_steps"] for r in (recipe, progress.recipe))
            if not differs or (differs <= length and progress.step <= stable):
                load_checkpoint(folder / name, self.model, self.optimizers)
                return progress
        return None


@dataclass(kw_only=True, slots=True)
class _Meter:
    """Running loss and speed since `begun_s`, for the progress line."""

    num_steps: int
    begun_s: float
    first_step: int
    first_tokens: int
    loss: float | None = None

    def update(self, loss: float) -> None:
        self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss

    def line(self, step: int, num_tokens: int, now_s: float) -> str:
        spent_s = now_s - self.begun_s
        left_s = spent_s / (step - self.first_step) * (self.num_steps - step)
        return (
            f"step {step}/{self.num_steps} loss {self.loss:.4f} {num_tokens / 1e6:.2f}M tokens "
            f"{(num_tokens - self.first_tokens) / spent_s:.0f} tokens/s eta {left_s / 60:.1f} min"
        )


def train(
    model: LlamaForCausalLM,
    renderer: Renderer,
    recipe: Recipe,
    *,
    folder: Path,
    resume: bool = False,
    deadline_s: float | None = None,
    checkpoint_every_s: float = 60.0,
    report: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """Train `model` in place and return how far it came.

    Checkpoints go to `folder/last` and, at the start of the decay, to `folder/stable`. With
    `resume` the run goes on from them. At `deadline_s` (on `clock`) it stops after a checkpoint;
    the result is then an unfinished model, to be resumed later.
    """
    facts = asdict(replace(recipe, mixture=dict(recipe.mixture)))
    trainer = Trainer(model, recipe)
    restored = trainer.restore(folder, facts) if resume else None
    done = restored or Progress(step=0, num_tokens=0, wall_clock_s=0.0, recipe=facts)
    begun_s = saved_s = clock()
    meter = _Meter(
        num_steps=recipe.num_steps,
        begun_s=begun_s,
        first_step=done.step,
        first_tokens=done.num_tokens,
    )
    progress = replace(done, recipe=facts)
    for rows in _batches(renderer, recipe, first_step=done.step):
        if progress.step == recipe.num_steps - recipe.num_decay_steps:
            save_checkpoint(folder / "stable", model, trainer.optimizers, progress)
        if progress.step >= recipe.num_steps:
            break
        meter.update(trainer.step(rows, _share(recipe, progress.step)))
        now_s = clock()
        progress = replace(
            progress,
            step=progress.step + 1,
            num_tokens=progress.num_tokens + int((rows.segments > 0).sum()),
            wall_clock_s=done.wall_clock_s + now_s - begun_s,
        )
        if progress.step % _REPORT_EVERY_STEPS == 0:
            report(meter.line(progress.step, progress.num_tokens, now_s))
        out_of_time = deadline_s is not None and now_s >= deadline_s
        if out_of_time or now_s - saved_s >= checkpoint_every_s:
            save_checkpoint(folder / "last", model, trainer.optimizers, progress)
            saved_s = now_s
        if out_of_time:
            return progress
    save_checkpoint(folder / "last", model, trainer.optimizers, progress)
    return progress


def _batches(renderer: Renderer, recipe: Recipe, *, first_step: int) -> Iterator[Rows]:
    return steps(
        renderer,
        recipe.mixture,
        seed=recipe.seed,
        first_step=first_step,
        rows_per_step=recipe.rows_per_step,
        row_tokens=recipe.row_tokens,
        question_weight=recipe.question_weight,
    )


def _share(recipe: Recipe, step: int) -> float:
    return learning_rate_share(
        step,
        num_steps=recipe.num_steps,
        num_warmup_steps=recipe.num_warmup_steps,
        num_decay_steps=recipe.num_decay_steps,
    )
