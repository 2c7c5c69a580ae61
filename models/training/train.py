"""The training loop: packed rows in, a trained Llama checkpoint out; resumable at any step.

Hidden matrices are trained by Muon (orthogonalised momentum, Jordan et al. 2024), embedding and
norms by AdamW; the schedule is warm-up, stable, decay.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from models.training.checkpoint import Progress, load_checkpoint, read_progress, save_checkpoint
from models.training.data import Renderer, steps
from models.training.forward import low_precision, packed_loss, rotary_tables, to_tensors
from models.training.schedule import learning_rate_share


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


def _restore(
    folder: Path,
    model: LlamaForCausalLM,
    optimizers: list[torch.optim.Optimizer],
    recipe: dict[str, Any],
) -> Progress | None:
    """Load the newest checkpoint that this recipe can go on from, if there is one.

    A checkpoint from before the decay fits a longer or shorter run of the same recipe too.
    """
    length = {"num_steps", "num_decay_steps"}
    for name in ("last", "stable"):
        progress = read_progress(folder / name)
        if progress is None:
            continue
        differs = {k for k, v in recipe.items() if progress.recipe.get(k) != v}
        stable_steps = min(r["num_steps"] - r["num_decay_steps"] for r in (recipe, progress.recipe))
        if not differs or (differs <= length and progress.step <= stable_steps):
            load_checkpoint(folder / name, model, optimizers)
            return progress
    return None


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
    the result is then a model before its decay, to be resumed later.
    """
    facts = asdict(replace(recipe, mixture=dict(recipe.mixture)))
    optimizers = make_optimizers(model, recipe)
    peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
    restored = _restore(folder, model, optimizers, facts) if resume else None
    done = restored or Progress(step=0, num_tokens=0, wall_clock_s=0.0, recipe=facts)
    loss_of = torch.compile(packed_loss) if recipe.compiled else packed_loss
    config = model.config
    head_size = int(config.head_dim or config.hidden_size // config.num_attention_heads)
    cos, sin = rotary_tables(head_size, recipe.row_tokens)
    dtype = torch.bfloat16 if recipe.compiled else torch.float32
    batches = steps(
        renderer,
        recipe.mixture,
        seed=recipe.seed,
        first_step=done.step,
        rows_per_step=recipe.rows_per_step,
        row_tokens=recipe.row_tokens,
        question_weight=recipe.question_weight,
    )
    begun, saved, num_tokens, recent = clock(), clock(), done.num_tokens, 0.0

    def progress_at(step: int) -> Progress:
        spent = done.wall_clock_s + clock() - begun
        return Progress(step=step, num_tokens=num_tokens, wall_clock_s=spent, recipe=facts)

    for step in range(done.step, recipe.num_steps):
        if step == recipe.num_steps - recipe.num_decay_steps:
            save_checkpoint(folder / "stable", model, optimizers, progress_at(step))
        rows = next(batches)
        share = learning_rate_share(
            step,
            num_steps=recipe.num_steps,
            num_warmup_steps=recipe.num_warmup_steps,
            num_decay_steps=recipe.num_decay_steps,
        )
        for optimizer, rates in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = share * rate
        loss = loss_of(
            low_precision(model, dtype),
            **to_tensors(rows),
            cos=cos,
            sin=sin,
            num_layers=config.num_hidden_layers,
            head_size=head_size,
            eps=config.rms_norm_eps,
        )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        num_tokens += int((rows.segments > 0).sum())
        recent = loss.item() if not recent else 0.95 * recent + 0.05 * loss.item()
        if (step + 1) % 50 == 0:
            spent = clock() - begun
            speed = (num_tokens - done.num_tokens) / spent
            left = spent / (step + 1 - done.step) * (recipe.num_steps - step - 1)
            report(
                f"step {step + 1}/{recipe.num_steps} loss {recent:.4f} "
                f"{num_tokens / 1e6:.2f}M tokens {speed:.0f} tokens/s eta {left / 60:.1f} min"
            )
        out_of_time = deadline_s is not None and clock() >= deadline_s
        last_step = step + 1 == recipe.num_steps
        if out_of_time or last_step or clock() - saved >= checkpoint_every_s:
            save_checkpoint(folder / "last", model, optimizers, progress_at(step + 1))
            saved = clock()
        if out_of_time and not last_step:
            return progress_at(step + 1)
    return progress_at(recipe.num_steps)
