"""Trains a whole transformer as a router, as ZOOTER does (Lu et al. 2023, section 3).

Any Hugging Face encoder, end to end, on the objective of `heads`. What comes out is a checkpoint
folder (safetensors and JSON) and a `Router` over it. torch is imported when training starts, and
only here; a GPU is used where there is one.

Shape legend: Q queries, B batch, D dimensions, M models.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from policies.encoders.transformer import FineTuned
from policies.errors import PolicyError
from policies.outcomes import Outcome, content_sha256
from policies.routing.fit import FitSettings, held_out_metrics, make_doubt, make_examples
from policies.routing.heads import Heads, Objective, enhance, fit_platt, mean_scores
from policies.routing.nearness import Topics, fit_topics, no_landmarks
from policies.routing.router import Router, query_hashes
from policies.routing.strength import USUAL

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]

HEAD_RATE = 20.0
"""The new head learns this many times faster than the transformer that has been trained before."""


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """How the transformer is trained: AdamW, its rate rising for a tenth of the steps, then falling
    to nothing.

    The paper's mDeBERTa had 1e-5 and 5 epochs; small encoders bear more. The epoch with the least
    loss on held-out queries is kept.
    """

    learning_rate: float = 2e-5
    epochs: int = 5
    batch_size: int = 32
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < 1:
            raise PolicyError(f"learning_rate: {self.learning_rate} is not in (0, 1)")
        if self.epochs < 1 or self.batch_size < 1:
            raise PolicyError(
                f"epochs {self.epochs} and batch_size {self.batch_size} are not at least 1"
            )


def finetune_router(
    outcomes: Sequence[Outcome],
    *,
    path: str,
    out: Path,
    models: Sequence[str] | None = None,
    settings: FitSettings | None = None,
    training: FinetuneSettings | None = None,
) -> Router:
    """Fine-tune the encoder at `path` on outcomes, write it to the folder `out`, return the router.

    Trained once, with the usual β or the only one in `settings`: the queries held out for
    calibration take no part. Raises as `fit_router` does, and `PolicyError` where `path` is no
    encoder's folder.
    """
    settings, training = settings or FitSettings(), training or FinetuneSettings()
    examples = make_examples(outcomes, models)
    texts, scores_QM = examples.texts, examples.scores_QM
    held_out_Q = examples.held_out(settings.held_out_share, settings.seed)
    encoder = FineTuned(path=path, max_tokens=training.max_tokens)
    clusters_Q = np.zeros(len(texts), np.int64)
    if not all(outcome.tags for outcome in examples.outcomes):
        points_QD = encoder.fit_encode(texts).points_QD
        clusters_Q = _topics(points_QD, scores_QM, settings).assign(points_QD)
    seen_tags = list(compress(examples.tags(clusters_Q), ~held_out_Q))
    targets_QM = scores_QM.copy()
    beta = settings.betas[0] if len(settings.betas) == 1 else USUAL.beta
    targets_QM[~held_out_Q] = enhance(scores_QM[~held_out_Q], seen_tags, beta=beta)
    heads, losses = _train(
        encoder, texts, targets_QM, held_out_Q, settings=settings, training=training
    )
    encoder.vectors.save(out)
    encoder = FineTuned(path=str(out), max_tokens=training.max_tokens)
    encoded = encoder.fit_encode(texts)
    unseen_QM = scores_QM[held_out_Q]
    logits_QM = heads.logits(encoded.matrix_QF[held_out_Q])
    platt = fit_platt(logits_QM, unseen_QM)
    heads = platt.scaled(heads)
    topics = _topics(encoded.points_QD, scores_QM, settings)
    return Router(
        models=examples.models,
        encoder=encoder,
        landmarks=no_landmarks(encoder.num_dimensions),
        weights_FM=heads.weights_FM,
        bias_M=heads.bias_M,
        topics=topics,
        doubt=make_doubt(
            encoded.points_QD,
            scores_QM,
            examples.tags(topics.assign(encoded.points_QD)),
            settings,
        ),
        output_tokens_M=examples.mean_output_tokens(),
        seen_Q=np.unique(query_hashes(examples.texts)),
        facts={
            "data_sha256": content_sha256(examples.outcomes),
            "num_queries": len(examples.outcomes),
            "settings": asdict(settings),
            "training": {**asdict(training), "base": path, "held_out_losses": losses},
            "held_out": held_out_metrics(platt.probabilities(logits_QM), unseen_QM),
        },
    )


def distillation_loss(z_BM: Tensor, targets_BM: Tensor, objective: Objective) -> Tensor:
    """Return the loss of `heads` without its penalty, averaged over the batch.

    `targets_BM` are enhanced scores, NaN where unknown.
    """
    import torch  # noqa: PLC0415 - only where selected
    from torch.nn import functional  # noqa: PLC0415

    known = ~targets_BM.isnan()
    targets = torch.where(known, targets_BM, 0.0)
    unknown = torch.finfo(z_BM.dtype).min

    def logs(scores_BM: Tensor) -> Tensor:
        scaled = scores_BM / objective.temperature
        return torch.where(known, scaled, unknown).log_softmax(dim=1)

    wanted = logs(targets)
    divergence = torch.where(known, wanted.exp() * (wanted - logs(z_BM.sigmoid())), 0.0)
    surprise = functional.binary_cross_entropy_with_logits(z_BM, targets, reduction="none")
    total = divergence + objective.tie_weight * torch.where(known, surprise, 0.0)
    return total.sum() / len(z_BM)


def _train(
    encoder: FineTuned,
    texts: Sequence[str],
    targets_QM: Floats,
    held_out_Q: NDArray[np.bool_],
    *,
    settings: FitSettings,
    training: FinetuneSettings,
) -> tuple[Heads, list[float]]:
    """Train encoder and head; returns the best epoch's head and every epoch's held-out loss."""
    import torch  # noqa: PLC0415 - only where selected

    vectors = encoder.vectors
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = vectors.model
    model.to(device)  # type: ignore[arg-type]
    num_dimensions, num_models = encoder.num_dimensions, targets_QM.shape[1]
    seen, unseen = np.flatnonzero(~held_out_Q), np.flatnonzero(held_out_Q)
    targets = torch.tensor(targets_QM, dtype=torch.float32, device=device)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        head = torch.nn.Linear(num_dimensions, num_models, device=device)
        mean_M = np.clip(mean_scores(targets_QM[seen]), 1e-3, 1 - 1e-3)
        torch.nn.init.zeros_(head.weight)
        head.bias.data = torch.tensor(np.log(mean_M / (1 - mean_M)), dtype=torch.float32).to(device)
        # Coordinates of a unit vector are small; times this they are about 1.
        scale = num_dimensions**0.5

        def loss_of(rows: NDArray[np.intp]) -> Tensor:
            z_BM = head(vectors.pooled([texts[row] for row in rows]) * scale)
            return distillation_loss(z_BM, targets[torch.as_tensor(rows)], settings.objective)

        rate = training.learning_rate
        optimizer = torch.optim.AdamW(
            [
                {"params": model.parameters(), "lr": rate},
                {"params": head.parameters(), "lr": rate * HEAD_RATE},
            ]
        )
        num_steps = training.epochs * -(-len(seen) // training.batch_size)
        warmup = max(1, num_steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / warmup, (num_steps - step) / max(1, num_steps - warmup)),
        )
        rng = np.random.default_rng(settings.seed)
        best = copy.deepcopy(model.state_dict()), copy.deepcopy(head.state_dict())
        losses: list[float] = []
        for _ in range(training.epochs):
            model.train()
            for rows in _batches(rng.permutation(seen), training.batch_size):
                optimizer.zero_grad()
                loss_of(rows).backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
            model.eval()  # type: ignore[no-untyped-call]
            with torch.inference_mode():
                batches = _batches(unseen, training.batch_size)
                summed = sum(float(loss_of(rows)) * len(rows) for rows in batches)
            losses.append(round(summed / len(unseen), 5))
            if losses[-1] == min(losses):
                best = copy.deepcopy(model.state_dict()), copy.deepcopy(head.state_dict())
        model.load_state_dict(best[0])
        head.load_state_dict(best[1])
    weights_FM = head.weight.detach().cpu().numpy().T * np.float32(scale)
    return Heads(weights_FM=weights_FM, bias_M=head.bias.detach().cpu().numpy()), losses


def _batches(rows: NDArray[np.intp], size: int) -> list[NDArray[np.intp]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _topics(points_QD: NDArray[np.float32], scores_QM: Floats, settings: FitSettings) -> Topics:
    return fit_topics(
        points_QD,
        scores_QM,
        num_clusters=settings.num_clusters,
        seed=settings.seed,
    )
