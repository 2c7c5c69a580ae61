"""What a chunk is trained on: which examples, how much general data, what the base says of them.

*Which* (active-learning pruning): examples are scored by how unsure an ensemble is of them: BALD
(Houlsby et al. 2011), the mutual information between the answer and which member gives it, or the
members' disagreement about the right answer. Which end to keep depends on how much data there is
(Sorscher et al. 2022): with plenty the hard examples, with little the easy ones.

*How much* (D-CPT, Que et al. 2024): the losses on the domain and on general data, as functions of
the tokens and of the mixture, are fitted on short runs and then tell the mixture of the full run.

*What the base says*: its likeliest tokens at every token of the corpora, computed once. Every run
that distils (each chunk, each trial) then costs as much as one that does not: the base, eight times
the size of a chunk, would else take most of every step. The rest of its distribution is left out
and the kept part renormalised.

Shapes: `M` members, `B` examples, `T` tokens, `K` answer tokens of a batch, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from models.downscale.cut import pad
from models.training.data import Conversation, TopTokens
from models.training.forward import Scorer
from policies.errors import LawError
from policies.laws.downscaling import MixtureLaw
from policies.laws.fitting import Fitted

Switch = Literal["hard", "easy"]
Score = Literal["bald", "disagreement"]
Kind = Literal["domain", "general"]
Scores = NDArray[np.float64]

_BATCH_EXAMPLES: Final = 256
# Elements [M, K, V] of a batch at most: 256 MB in fp32, of which a few are held at a time.
_BATCH_ELEMENTS: Final = 2**26


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which examples are kept (ascending indices), and why.

    `scores` is empty for a random choice. `trials` are the held-out losses that the switch was
    decided by, in nats per answer token; empty where it was given.
    """

    kept: tuple[int, ...]
    scores: tuple[float, ...]
    switch: Switch | None
    trials: dict[str, float]


def select(
    members: Sequence[PreTrainedModel],
    conversations: Sequence[Conversation],
    *,
    keep: float,
    by: Score,
    switch: Switch | Literal["auto"],
    trial: Callable[[Sequence[int]], float],
) -> Selection:
    """Keep the share `keep` of `conversations` by the uncertainty of `members`.

    With the switch "auto", `trial` is asked for the held-out loss after a short training on either
    choice, and the better one wins.
    """
    scores_B = uncertainty(members, conversations, by=by)
    if switch != "auto":
        kept = keep_by(scores_B, keep, switch)
        return Selection(kept=kept, scores=tuple(scores_B.tolist()), switch=switch, trials={})
    choices: dict[Switch, tuple[int, ...]] = {
        "hard": keep_by(scores_B, keep, "hard"),
        "easy": keep_by(scores_B, keep, "easy"),
    }
    losses: dict[str, float] = {name: trial(kept) for name, kept in choices.items()}
    best: Switch = "hard" if losses["hard"] <= losses["easy"] else "easy"
    return Selection(
        kept=choices[best], scores=tuple(scores_B.tolist()), switch=best, trials=losses
    )


def select_at_random(count: int, *, keep: float, seed: int) -> Selection:
    """Keep the share `keep` of `count` examples by lot."""
    order = np.random.default_rng(seed).permutation(count)[: _num_kept(count, keep)]
    kept = tuple(int(i) for i in np.sort(order))
    return Selection(kept=kept, scores=(), switch=None, trials={})


def keep_by(scores_B: Scores, keep: float, switch: Switch) -> tuple[int, ...]:
    """The ascending indices of the share `keep` with the highest ("hard") or lowest scores."""
    order = np.argsort(-scores_B if switch == "hard" else scores_B, kind="stable")
    return tuple(int(i) for i in np.sort(order[: _num_kept(len(scores_B), keep)]))


@torch.inference_mode()
def uncertainty(
    members: Sequence[PreTrainedModel], conversations: Sequence[Conversation], *, by: Score
) -> Scores:
    """Per conversation, the mean over its answer tokens of the members' uncertainty, in nats.

    "bald" is H(mean_m p_m) - mean_m H(p_m); "disagreement" the standard deviation over members
    of the right token's log-probability. A conversation without an answer has 0.
    """
    scores_B = np.zeros(len(conversations))
    row_elements = len(members) * int(members[0].config.vocab_size)
    for batch in _batches(conversations, row_elements):
        tokens_BT, mask_BT = pad([conversations[i] for i in batch])
        # A token is judged where it is predicted: one position earlier.
        judged_BT = torch.zeros_like(mask_BT)
        for row, i in enumerate(batch):
            answers = torch.tensor(conversations[i].is_answer[1:], dtype=torch.bool)
            judged_BT[row, : len(answers)] = answers
        rows_K = judged_BT.nonzero()[:, 0]
        logs_MKV = torch.stack(
            [_log_probabilities(member, tokens_BT, mask_BT, judged_BT) for member in members]
        )
        if by == "bald":
            score_K = _mutual_information(logs_MKV)
        else:
            targets_K = tokens_BT.roll(-1, 1)[judged_BT].to(logs_MKV.device)
            right_MK = logs_MKV.gather(-1, targets_K.expand(len(members), -1)[..., None])[..., 0]
            score_K = right_MK.std(0, correction=0)
        sums_B = torch.zeros(len(batch)).index_add_(0, rows_K, score_K.cpu())
        counts_B = judged_BT.sum(1).clamp(min=1)
        scores_B[batch] = (sums_B / counts_B).double().numpy()
    return scores_B


def _batches(conversations: Sequence[Conversation], row_elements: int) -> Iterator[list[int]]:
    """Indices of examples of like length, so many at a time that their answers fit in memory, of
    which each token takes so many elements."""
    batch: list[int] = []
    elements = 0
    for i in sorted(range(len(conversations)), key=lambda i: len(conversations[i].tokens)):
        more = sum(conversations[i].is_answer) * row_elements
        if batch and (len(batch) == _BATCH_EXAMPLES or elements + more > _BATCH_ELEMENTS):
            yield batch
            batch, elements = [], 0
        batch.append(i)
        elements += more
    if batch:
        yield batch


def _log_probabilities(
    member: PreTrainedModel, tokens_BT: Tensor, mask_BT: Tensor, judged_BT: Tensor
) -> Tensor:
    """Log-probabilities `[K, V]` at the judged positions; the head runs on these alone."""
    device = member.device
    hidden_BTD = member.get_submodule("model")(
        input_ids=tokens_BT.to(device), attention_mask=mask_BT.long().to(device), use_cache=False
    ).last_hidden_state
    logits_KV: Tensor = member.get_submodule("lm_head")(hidden_BTD[judged_BT.to(device)])
    return logits_KV.float().log_softmax(-1)


def _mutual_information(logs_MKV: Tensor) -> Tensor:
    """H(mean_m p_m) - mean_m H(p_m), `[K]`, in nats."""
    mean_KV = logs_MKV.exp().mean(0)
    entropy_MK = -(logs_MKV.exp() * logs_MKV).sum(-1)
    return -torch.xlogy(mean_KV, mean_KV).sum(-1) - entropy_MK.mean(0)


def _num_kept(count: int, keep: float) -> int:
    return max(1, round(keep * count))


_CANDIDATES: Final = np.linspace(0.0, 0.9, 181)


class Point(TypedDict):
    """One judgement of one run."""

    domain: str
    general_share: float
    parameters: int
    tokens: int
    domain_loss: float
    general_loss: float


def mixture_losses(points: Sequence[Point], kind: Kind) -> tuple[list[float], list[float]]:
    """Of each point the share of the corpus on which the loss is measured, and that loss.

    Losses of several domains are pooled after division by their domain's mean, times the mean of
    all.
    """
    if kind == "general":
        return [p["general_share"] for p in points], [p["general_loss"] for p in points]
    mean = float(np.mean([p["domain_loss"] for p in points]))
    means = {
        domain: float(np.mean([p["domain_loss"] for p in points if p["domain"] == domain]))
        for domain in {p["domain"] for p in points}
    }
    losses = [p["domain_loss"] * mean / means[p["domain"]] for p in points]
    return [1 - p["general_share"] for p in points], losses


def fit_mixture(
    points: Sequence[Point], *, seed: int, num_resamples: int
) -> tuple[Fitted[MixtureLaw], Fitted[MixtureLaw]]:
    """The law of the domains' own losses and that of the general loss; see `mixture_losses`.

    Raises:
        LawError: too few points.
    """

    def fit(kind: Kind) -> Fitted[MixtureLaw]:
        shares, losses = mixture_losses(points, kind)
        return MixtureLaw.fit(
            parameters=[point["parameters"] for point in points],
            tokens=[point["tokens"] for point in points],
            shares=shares,
            losses=losses,
            seed=seed,
            num_resamples=num_resamples,
        )

    return fit("domain"), fit("general")


def best_share(
    domain: MixtureLaw,
    general: MixtureLaw,
    *,
    parameters: float,
    tokens: float,
    general_weight: float,
) -> float:
    """The general share with the least domain loss + `general_weight` · general loss.

    Raises:
        LawError: the laws predict no finite loss.
    """
    with np.errstate(all="ignore"):
        cost = np.array(
            [
                domain.predict(parameters, tokens, float(1 - share))
                + general_weight * general.predict(parameters, tokens, float(share))
                for share in _CANDIDATES
            ]
        )
    if not np.isfinite(cost).any():
        raise LawError("the mixture laws predict no finite loss; more short runs are needed")
    return float(_CANDIDATES[int(np.nanargmin(cost))])


NUM_TOP_TOKENS: Final = 8
_IDS, _LOGS, _STARTS = "ids.npy", "log_probabilities.npy", "starts.npy"


def write_lessons(
    base: PreTrainedModel,
    corpora: Mapping[str, Sequence[Conversation]],
    folder: Path,
    *,
    scorer: Scorer,
    progress: Callable[[int], None] = lambda _: None,
    num_top: int = NUM_TOP_TOKENS,
) -> int:
    """Run the base over every distinct conversation; returns how many tokens that were.

    `scorer` is the base's. `progress` is told how many conversations each batch held.
    """
    distinct = _distinct(corpora)
    num_top = min(num_top, int(base.config.vocab_size))
    small = int(base.config.vocab_size) <= np.iinfo(np.uint16).max
    starts = np.cumsum([0, *(len(tokens) for tokens in distinct)])
    shape = (int(starts[-1]), num_top)

    def likeliest(logits: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        top = logits.log_softmax(-1).topk(num_top, dim=-1)
        return top.indices, top.values

    conversations = list(distinct.values())
    types = (np.uint16 if small else np.int32, np.float16)
    with (folder / _IDS).open("wb") as ids, (folder / _LOGS).open("wb") as logs:
        for file, dtype in zip((ids, logs), types, strict=True):
            # Written from first to last, not through a memory map: a full disk is then an error.
            facts = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, facts)
        # In pieces, so that what is in memory stays small.
        for first in range(0, len(conversations), 8192):
            part = conversations[first : first + 8192]
            for found in scorer.map(part, likeliest, progress=progress):
                for file, values, dtype in zip((ids, logs), found, types, strict=True):
                    file.write(values.astype(dtype).tobytes())
    np.save(folder / _STARTS, starts)
    return int(starts[-1])


def with_lessons(
    corpora: Mapping[str, Sequence[Conversation]], folder: Path
) -> dict[str, list[Conversation]]:
    """The same conversations with what `write_lessons` stored of them (on disk, not in memory)."""
    ids: NDArray[Any] = np.load(folder / _IDS, mmap_mode="r")
    logs: NDArray[Any] = np.load(folder / _LOGS, mmap_mode="r")
    starts = np.load(folder / _STARTS)
    distinct = _distinct(corpora)
    taught = {
        tokens: replace(
            conversation,
            teacher=TopTokens(
                ids=ids[starts[i] : starts[i + 1]],
                log_probabilities=logs[starts[i] : starts[i + 1]],
            ),
        )
        for i, (tokens, conversation) in enumerate(distinct.items())
    }
    return {
        name: [
            replace(conversation, teacher=taught[tuple(conversation.tokens)].teacher)
            for conversation in conversations
        ]
        for name, conversations in corpora.items()
    }


def _distinct(
    corpora: Mapping[str, Sequence[Conversation]],
) -> dict[tuple[int, ...], Conversation]:
    """By their tokens: the general corpus may repeat the domains'."""
    return {
        tuple(conversation.tokens): conversation
        for name in sorted(corpora)
        for conversation in corpora[name]
    }
