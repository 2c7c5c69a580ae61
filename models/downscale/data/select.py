"""Active-learning pruning of a corpus: which of its examples are worth training on.

Examples are scored by how unsure an ensemble is of them: BALD (Houlsby et al. 2011), the mutual
information between the answer and which member gives it, or the members' disagreement about the
right answer. Which end to keep depends on how much data there is (Sorscher et al. 2022): with
plenty the hard examples, with little the easy ones.

Shapes: `M` members, `B` examples, `T` tokens, `K` answer tokens of a batch, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from models.downscale.cut.importance import pad
from models.training.data import Conversation

Switch = Literal["hard", "easy"]
Score = Literal["bald", "disagreement"]
Scores = NDArray[np.float64]

_BATCH_EXAMPLES: Final = 256
# Elements [K, V] of a batch at most: 256 MB in fp32, of which a few are held at a time.
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
    for batch in _batches(conversations, vocab_size=int(members[0].config.vocab_size)):
        tokens_BT, mask_BT = pad([conversations[i] for i in batch])
        # A token is judged where it is predicted: one position earlier.
        judged_BT = torch.zeros_like(mask_BT)
        for row, i in enumerate(batch):
            answers = torch.tensor(conversations[i].is_answer[1:], dtype=torch.bool)
            judged_BT[row, : len(answers)] = answers
        rows_K = judged_BT.nonzero()[:, 0]
        targets_K = tokens_BT.roll(-1, 1)[judged_BT]
        score = _Bald() if by == "bald" else _Disagreement()
        for member in members:
            logs_KV = _log_probabilities(member, tokens_BT, mask_BT, judged_BT)
            score.add(logs_KV, targets_K.to(logs_KV.device))
        sums_B = torch.zeros(len(batch)).index_add_(0, rows_K, score.result().float().cpu())
        counts_B = judged_BT.sum(1).clamp(min=1)
        scores_B[batch] = (sums_B / counts_B).double().numpy()
    return scores_B


def _batches(conversations: Sequence[Conversation], *, vocab_size: int) -> Iterator[list[int]]:
    """Indices of examples of like length, so many at a time that their answers fit in memory."""
    batch: list[int] = []
    elements = 0
    for i in sorted(range(len(conversations)), key=lambda i: len(conversations[i].tokens)):
        more = sum(conversations[i].is_answer) * vocab_size
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


class _Bald:
    """Mutual information between answer and member, from running sums over members."""

    def __init__(self) -> None:
        self._num = 0
        self._mean_KV: Tensor | float = 0.0
        self._entropy_K: Tensor | float = 0.0

    def add(self, logs_KV: Tensor, _: Tensor) -> None:
        p_KV = logs_KV.exp()
        self._num += 1
        self._mean_KV = self._mean_KV + p_KV
        self._entropy_K = self._entropy_K - (p_KV * logs_KV).sum(-1)

    def result(self) -> Tensor:
        assert isinstance(self._mean_KV, Tensor)
        mean_KV = self._mean_KV / self._num
        total_K = -torch.xlogy(mean_KV, mean_KV).sum(-1)
        return total_K - self._entropy_K / self._num


class _Disagreement:
    """Standard deviation over members of the right token's log-probability."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []

    def add(self, logs_KV: Tensor, targets_K: Tensor) -> None:
        self._found.append(logs_KV.gather(-1, targets_K[:, None])[:, 0])

    def result(self) -> Tensor:
        return torch.stack(self._found).std(0, correction=0)


def _num_kept(count: int, keep: float) -> int:
    return max(1, round(keep * count))
