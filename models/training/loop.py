"""The training loop: packed rows in, trained weights out; resumable at any step.

Hidden matrices are trained by Muon (orthogonalised momentum, Jordan et al. 2024), embeddings,
norms and biases by AdamW; the schedule is warm-up, stable, decay. Runs wherever the model lies.
Knows nothing of tasks, corpora or pools.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.errors import TrainingDiverged
from models.precision import Precision, products_dtype
from models.training.checkpoint import (
    Progress,
    load_beside,
    load_checkpoint,
    read_progress,
    save_checkpoint,
)
from models.training.data import Rows
from models.training.forward import (
    Distillation,
    Weights,
    compile_shapes,
    geometry,
    low_precision,
    packed_loss,
    rotary_tables,
    to_tensors,
)
from models.training.muon import Muon

_REPORT_EVERY_STEPS: Final = 50


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is trained. Both learning rates are peaks.

    With `muon` off, AdamW at `learning_rate` trains everything. `compiled` runs the step through
    torch.compile; `precision` is that of the matrix products, "auto" means bfloat16 where that is
    fast. A step takes `micro_rows` of its rows at a time (None: all at once) and adds up their
    gradients.
    """

    num_steps: int
    num_decay_steps: int
    num_warmup_steps: int = 50
    rows_per_step: int = 32
    row_tokens: int = 128
    learning_rate: float = 3e-3
    muon_learning_rate: float = 6e-3
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    muon: bool = True
    compiled: bool = True
    precision: Precision = "auto"
    micro_rows: int | None = None
    distillation: Distillation | None = None


def make_optimizers(model: PreTrainedModel, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices and AdamW for the rest; or AdamW for all."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    is_hidden = {
        n: p.ndim == 2 and "embed" not in n and "lm_head" not in n for n, p in parameters.items()
    }
    hidden = [p for n, p in parameters.items() if is_hidden[n]]
    others = [p for n, p in parameters.items() if not is_hidden[n]]
    adamw = torch.optim.AdamW(
        others if settings.muon else [*hidden, *others],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.0 if settings.muon else settings.weight_decay,
        fused=True,
    )
    if not settings.muon:
        return [adamw]
    muon = Muon(hidden, lr=settings.muon_learning_rate, weight_decay=settings.weight_decay)
    return [muon, adamw]


class Method:
    """What a way of adapting adds to the steps of a run; this one nothing."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the weights depend on because of it, for `run`'s recipe."""
        return {}

    def rows(self, model: PreTrainedModel, rows: Rows, step: int) -> Rows:  # noqa: ARG002
        """Return what the step of this number, counted from 0, learns from in place of `rows`."""
        return rows

    def loss(
        self,
        compute: Callable[..., tuple[Tensor, Tensor]],
        weights: Weights,
        **arguments: Any,  # noqa: ANN401 - as `packed_loss` takes them
    ) -> tuple[Tensor, Tensor]:
        """Return what to minimise of a part of the step and the label loss, as `compute` does,
        which is `packed_loss`."""
        return compute(weights, **arguments)

    def state(self) -> Mapping[str, Tensor]:
        """Return what is to be kept of it, to go on from after an interruption."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""

    def step(self, model: PreTrainedModel, step: int) -> AbstractContextManager[None]:  # noqa: ARG002
        """Stand around the step of this number, counted from 0."""
        return nullcontext()

    def penalty(self, model: PreTrainedModel) -> Tensor | None:  # noqa: ARG002
        """Return what is added to the loss of a step."""
        return None

    def before_update(self, step: int, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Change the step's gradients."""


class Trainer:
    """One run's model, optimizers and loss; knows nothing of time, files or schedules."""

    def __init__(
        self, model: PreTrainedModel, settings: Settings, method: Method | None = None
    ) -> None:
        """Prepare to train `model` in place, on the device that it is on."""
        self.model = model
        self._method = method or Method()
        self.optimizers = make_optimizers(model, settings)
        self._settings = settings
        self._peaks = [[group["lr"] for group in o.param_groups] for o in self.optimizers]
        self._dtype = products_dtype(settings.precision, model.device)
        self._loss = compile_shapes(packed_loss) if settings.compiled else packed_loss
        cos, sin = rotary_tables(model, settings.row_tokens)
        self._constants: dict[str, Any] = {
            "cos": cos,
            "sin": sin,
            "geometry": geometry(model),
            "distillation": settings.distillation,
        }

    def step(self, rows: Rows, learning_rate_share: float, number: int) -> float:
        """Update number `number`, counted from 0, at this share of the peak learning rates.

        Returns the label loss before it.
        """
        for optimizer, rates in zip(self.optimizers, self._peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = learning_rate_share * rate
        total_weight = torch.tensor(float(rows.weights.sum()), device=self.model.device)
        size = self._settings.micro_rows or len(rows.tokens)
        label = torch.zeros((), device=self.model.device)
        with self._method.step(self.model, number):
            for start in range(0, len(rows.tokens), size):
                label += self._accumulate(rows.part(slice(start, start + size)), total_weight)
            if (penalty := self._method.penalty(self.model)) is not None:
                penalty.backward()  # type: ignore[no-untyped-call]
        value = label.item()
        if math.isfinite(value):
            self._method.before_update(number, self.optimizers)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.clip_norm)
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return value

    def _accumulate(self, rows: Rows, total_weight: Tensor) -> Tensor:
        arguments: dict[str, Any] = {
            **to_tensors(rows, self.model.device),
            **self._constants,
            "total_weight": total_weight,
        }
        weights = low_precision(self.model, self._dtype)
        loss, label = self._method.loss(self._loss, weights, **arguments)
        loss.backward()  # type: ignore[no-untyped-call]
        return label

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
                self._method.restore(load_beside(folder / name))
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


def run(  # noqa: PLR0913 - each names a fact of the run
    model: PreTrainedModel,
    batches: Callable[[int], Iterator[Rows]],
    settings: Settings,
    recipe: Mapping[str, Any],
    *,
    folder: Path | None,
    method: Method | None = None,
    resume: bool = False,
    checkpoint_every_s: float = 60.0,
    report: Callable[[str], None] = print,
    watch: Callable[[Progress], None] = lambda _: None,
) -> Progress:
    """Train `model` in place on `batches(first_step)` and return how far it came.

    Checkpoints go to `folder/last` and, at the start of the decay, to `folder/stable`; without a
    folder there are none. With `resume` the run goes on from them if they were written under the
    same `recipe`, a JSON object of all that the weights depend on. `watch` is told of every step,
    and `method` takes part in them.

    Raises:
        TrainingDiverged: the loss is not finite; the last checkpoint stays.
    """
    method = method or Method()
    trainer = Trainer(model, settings, method)
    restored = trainer.restore(folder, recipe) if folder and resume else None
    done = restored or Progress(step=0, num_tokens=0, wall_clock_s=0.0, recipe={})
    begun_s = saved_s = time.monotonic()
    begun_cpu_s = time.process_time()
    meter = _Meter(
        num_steps=settings.num_steps,
        begun_s=begun_s,
        first_step=done.step,
        first_tokens=done.num_tokens,
        loss=done.losses[-1][1] if done.losses else None,
    )
    progress = replace(done, recipe=dict(recipe))

    def save(name: str) -> None:
        if folder is not None:
            kept = method.state()
            save_checkpoint(folder / name, model, trainer.optimizers, progress, beside=kept)

    left = max(settings.num_steps - done.step, 0)
    decay_at = settings.num_steps - settings.num_decay_steps
    for given in islice(batches(done.step), left):
        if progress.step == decay_at:
            save("stable")
        rows = method.rows(model, given, progress.step)
        share = learning_rate_share(progress.step, settings)
        loss = trainer.step(rows, share, progress.step)
        if not math.isfinite(loss):
            raise TrainingDiverged(progress.step, loss, settings.learning_rate)
        meter.update(loss)
        now_s = time.monotonic()
        progress = replace(
            progress,
            step=progress.step + 1,
            num_tokens=progress.num_tokens + rows.num_tokens,
            wall_clock_s=done.wall_clock_s + now_s - begun_s,
            cpu_s=done.cpu_s + time.process_time() - begun_cpu_s,
        )
        if progress.step % _REPORT_EVERY_STEPS == 0 or progress.step == settings.num_steps:
            assert meter.loss is not None
            known = (*progress.losses, (progress.step, round(meter.loss, 5)))
            progress = replace(progress, losses=known)
        watch(progress)
        if progress.step % _REPORT_EVERY_STEPS == 0:
            report(meter.line(progress.step, progress.num_tokens, now_s))
        if now_s - saved_s >= checkpoint_every_s:
            save("last")
            saved_s = now_s
    if progress.step == decay_at:
        save("stable")
    save("last")
    return progress


def learning_rate_share(step: int, settings: Settings) -> float:
    """Share of the peak rate in (0, 1] at `step` (counted from 0): linear up, flat, linear down."""
    rise, fall = settings.num_warmup_steps, settings.num_decay_steps
    warm = min(1.0, (step + 1) / rise) if rise else 1.0
    decay = min(1.0, (settings.num_steps - step) / fall) if fall else 1.0
    return min(warm, decay)
