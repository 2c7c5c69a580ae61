"""Continual training of one model on a corpus mixed with general data.

One loop serves all: a chunk after the cut, the base fine-tuned for comparison, a chunk trained
from scratch and the short runs that choices are made and laws are fitted on.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import torch
from transformers import PreTrainedModel

from models.downscale.recipe import AdaptSettings
from models.errors import CorpusError, DivergedError, TrainingDiverged
from models.training.checkpoint import Progress
from models.training.data import Conversation, Rows, fill_rows, lay_out
from models.training.forward import Distillation, Scorer, answer_loss, target_log_probabilities
from models.training.loop import Method, Settings, run
from policies.carbon.llmcarbon import training_flops


@dataclass(frozen=True, kw_only=True)
class AdaptResult:
    """What a run took and reached.

    `cpu_s` is the process's CPU time. `losses` are (step, label loss in nats). `flops` are 6ND;
    the base's own forward passes for distillation, made once for all runs, are not in them.
    """

    tokens: int
    num_steps: int
    wall_clock_s: float
    cpu_s: float
    flops: float
    losses: tuple[tuple[int, float], ...]
    device: str


def adapt(  # noqa: PLR0913 - each names a fact of the run
    model: PreTrainedModel,
    own: Sequence[Conversation],
    general: Sequence[Conversation],
    *,
    general_share: float,
    tokens: int,
    settings: AdaptSettings,
    seed: int,
    folder: Path | None = None,
    distill: bool = True,
    method: Callable[[int], Method] = lambda _: Method(),
    report: Callable[[str], None] = lambda _: None,
    watch: Callable[[Progress], None] = lambda _: None,
) -> AdaptResult:
    """Train `model` in place for `tokens` tokens, `general_share` of them from `general`.

    With `distill`, conversations that carry the base's likeliest tokens also teach those. With a
    `folder` the run is checkpointed there and goes on from what it finds of the same run. `method`
    makes of the number of steps what takes part in them; `watch` is told of every step.

    Raises:
        DivergedError: the loss is not finite.
        CorpusError: a corpus is empty, or its examples are longer than a row.
    """
    for name, share, corpus in (
        ("the own", 1 - general_share, own),
        ("the general", general_share, general),
    ):
        if share > 0 and not any(len(c.tokens) <= settings.row_tokens for c in corpus):
            raise CorpusError(
                f"adapt.row_tokens: no example of {name} corpus fits {settings.row_tokens} tokens"
            )
    device = choose_device(settings.device)
    loop = _loop_settings(settings, tokens, distill=distill)
    taking_part = method(loop.num_steps)
    facts = {
        **asdict(loop),
        **taking_part.facts,
        "question_weight": settings.question_weight,
        "general_share": general_share,
        "seed": seed,
        "start": _weights_sha256(model),
        "data": _conversations_sha256([*own, *general]),
    }

    def batches(first_step: int) -> Iterator[Rows]:
        stream = mix(own, general, general_share=general_share, seed=seed)
        rows = fill_rows(stream, loop.row_tokens)
        for _ in islice(rows, first_step * loop.rows_per_step):
            pass
        while True:
            yield lay_out(
                list(islice(rows, loop.rows_per_step)),
                row_tokens=loop.row_tokens,
                question_weight=settings.question_weight,
            )

    model.to(device)  # type: ignore[arg-type]
    model.train()
    try:
        progress = run(
            model,
            batches,
            loop,
            facts,
            folder=folder,
            method=taking_part,
            resume=folder is not None,
            checkpoint_every_s=settings.checkpoint_every_s,
            report=report,
            watch=watch,
        )
    except TrainingDiverged as error:
        raise DivergedError(str(error)) from None
    finally:
        model.to("cpu")  # type: ignore[arg-type]
        model.eval()  # type: ignore[no-untyped-call]
    parameters = sum(p.numel() for p in model.parameters())
    return AdaptResult(
        tokens=progress.num_tokens,
        num_steps=progress.step,
        wall_clock_s=progress.wall_clock_s,
        cpu_s=progress.cpu_s,
        flops=training_flops(parameters, progress.num_tokens),
        losses=progress.losses,
        device=device,
    )


def mix(
    own: Sequence[Conversation],
    general: Sequence[Conversation],
    *,
    general_share: float,
    seed: int,
) -> Iterator[Conversation]:
    """An endless stream in which `general` has this share of the tokens.

    Each corpus is shuffled anew every time it has been gone through. The corpus that lags most
    behind its share comes next, so that the mixture is exact and needs no luck.
    """
    sources = [_epochs(own, f"own/{seed}"), _epochs(general, f"general/{seed}")]
    shares = [1 - general_share, general_share]
    seen = [0, 0]
    while True:
        total = sum(seen)
        turn = max((0, 1), key=lambda i: shares[i] * total - seen[i] + 1e-9 * shares[i])
        conversation = next(sources[turn])
        seen[turn] += len(conversation.tokens)
        yield conversation


def _epochs(conversations: Sequence[Conversation], seed: str) -> Iterator[Conversation]:
    order = list(range(len(conversations)))
    rng = random.Random(seed)
    while True:
        rng.shuffle(order)
        for index in order:
            yield conversations[index]


def mean_loss(
    model: PreTrainedModel, conversations: Sequence[Conversation], *, row_tokens: int = 128
) -> float:
    """Nats per answer token on held-out conversations."""
    scorer = Scorer(model, row_tokens=row_tokens)
    return answer_loss(
        conversations, [logs for (logs,) in scorer.map(conversations, target_log_probabilities)]
    )


def choose_device(wish: str) -> str:
    """`wish`, or where it is "auto" the GPU if there is one."""
    if wish != "auto":
        return wish
    return "cuda" if torch.cuda.is_available() else "cpu"


def _loop_settings(settings: AdaptSettings, tokens: int, *, distill: bool) -> Settings:
    num_steps = max(1, round(tokens / (settings.rows_per_step * settings.row_tokens)))
    distillation = Distillation(
        temperature=settings.distill.temperature, weight=settings.distill.weight
    )
    return Settings(
        num_steps=num_steps,
        num_decay_steps=round(settings.decay_share * num_steps),
        num_warmup_steps=round(settings.warmup_share * num_steps),
        rows_per_step=settings.rows_per_step,
        row_tokens=settings.row_tokens,
        learning_rate=settings.learning_rate,
        muon_learning_rate=settings.muon_learning_rate,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        muon=settings.optimizer == "muon",
        compiled=settings.compiled,
        precision=settings.precision,
        micro_rows=-(-settings.rows_per_step // settings.accumulate),
        distillation=distillation if distill and settings.distill.weight > 0 else None,
    )


def _weights_sha256(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _conversations_sha256(conversations: Sequence[Conversation]) -> str:
    digest = hashlib.sha256()
    for conversation in conversations:
        digest.update(repr(conversation.tokens).encode())
    return digest.hexdigest()


# Enough for a mean loss to about 1%; trials judge often.
NUM_JUDGED: Final = 400


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Held-out losses, by name, in nats per answer token, after so many training tokens."""

    tokens: int
    losses: dict[str, float]


def trial(
    model: PreTrainedModel,
    own: Sequence[Conversation],
    general: Sequence[Conversation],
    judges: Mapping[str, Callable[[PreTrainedModel], float]],
    *,
    general_share: float,
    after_tokens: Sequence[int],
    settings: AdaptSettings,
    seed: int,
    distill: bool = True,
) -> list[Judgement]:
    """Train `model` and judge it after each number of tokens, the learning rate held constant.

    With the decay of a full run, each number of tokens would need a run of its own; without it one
    run gives them all, a little above what a decayed run would reach.
    """
    steady = settings.model_copy(update={"decay_share": 0.0})
    waiting = sorted(after_tokens)
    found: list[Judgement] = []

    def watch(progress: Progress) -> None:
        if waiting and progress.num_tokens >= waiting[0]:
            del waiting[0]
            losses = {name: judge(model) for name, judge in judges.items()}
            found.append(Judgement(tokens=progress.num_tokens, losses=losses))

    adapt(
        model,
        own,
        general,
        general_share=general_share,
        # Rows are not quite full, and the last judgement must be reached.
        tokens=int(1.1 * max(after_tokens)) + settings.rows_per_step * settings.row_tokens,
        settings=steady,
        seed=seed,
        distill=distill,
        watch=watch,
    )
    return found
