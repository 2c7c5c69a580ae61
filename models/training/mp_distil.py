"""MPDistil (Sengupta et al., ICLR 2024, "A Good Learner can Teach Better"): the teacher's head
learns how to teach, and the student ends by choosing what to learn from.

The steps of that paper (section 3), the fine-tuned teacher T being given:

1. *Distillation.* The student learns (1-α)·label + α·τ²·|p_T'(τ) - p_S(τ)|² + β·|u(h_T) - u(h_S)|²,
   with h hidden states, u scaling them to length 1, and T' the meta-teacher.
2. *Meta-teacher.* T' is a head of its own on the teacher's last state, starting as the teacher's.
   It learns from quiz data, the bodies fixed, both from the teacher's states and the student's:
   collaboratively by ½CE(T'(h_T)) + ½CE(T'(h_S)), or competitively by
   CE(T'(h_T)) - mean p_T'(h_T)(y) + mean p_T'(h_S)(y), the distance of a Wasserstein GAN.
3. *Curriculum.* A policy sees a state of the student and draws a task; the student learns from quiz
   data of that task by CE - mean p_S(y). The reward is measured on quiz data of its own task: how
   often (binary) or by how much (real) p_S(y) is above p_T'(y). REINFORCE trains the policy, on
   rewards discounted by .99 less their mean.

What that is for language models: a task is a domain, and each token of an answer is one
classification, y the right one. The squared distance of distributions is summed over the vocabulary
(the mean over two or three classes there would be next to nothing over thousands). A student that
is narrower than its teacher has no h of the same width: a linear bridge, trained with it, maps its
states; each of its layers but the last is matched with the teacher's at the same share of the depth
(as PKD skips), and the last state, since T' reads that. The state that the policy sees is, as in
the authors' code, a fixed projection of the last matrix before the head, here scaled to a mean
square of 1. Where their code adds up gradients over an episode, the student learns after each
choice, and it is kept as it is at the end, not as it was best; since a training here has hardly an
epoch, head and student take turns by steps. T' in the student's loss of step 3 has no gradient
there, and is left out.

Shapes: `B` rows, `T` tokens a row, `N` = B·T, `S` student's width, `D` teacher's, `V` vocabulary,
`C` domains.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.errors import CorpusError
from models.training.checkpoint import load_optimizer, optimizer_tensors
from models.training.data import Conversation, Rows, fill_rows, lay_out
from models.training.forward import (
    Weights,
    compile_shapes,
    geometry,
    head_of,
    low_precision,
    packed_states,
    rotary_tables,
    to_tensors,
)
from models.training.loop import Method
from models.training.mp_parts import Parts, matched, meta_loss, outdoing_loss, taught_loss
from models.training.settings import DistillSettings

_DISCOUNT: Final = 0.99
_LESSONS: Final = ("teacher_ids_BTK", "teacher_log_probabilities_BTK")
_INPUTS: Final = ("tokens_BT", "segments_BT", "positions_BT")


@dataclass(frozen=True, kw_only=True)
class Running:
    """The training that it takes part in."""

    num_steps: int
    rows_per_step: int
    row_tokens: int
    device: str
    dtype: torch.dtype
    compiled: bool
    seed: int


class MPDistil(Method):
    """Steps of a student's training, taught by `teacher`; `own` is its domain among the quizzes.

    `choices` are the domains that it chose, one for each step of the curriculum so far, `rewards`
    what it had for all of them but the last.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        own: str,
        quizzes: Mapping[str, Sequence[Conversation]],
        *,
        settings: DistillSettings,
        running: Running,
    ) -> None:
        """Prepare; `student` is only looked at, `teacher` is moved to the device and read.

        Of the `settings`, whose `meta` there must be, `weight` is α, `temperature` τ and
        `meta.hidden_weight` β; `meta.learning_rate` is that of head, bridge and policy.
        """
        assert settings.meta is not None
        meta = self._meta = settings.meta
        self._settings, self._running, self._own = settings, running, own
        self._quizzes = _fitting(quizzes, running.row_tokens)
        self.choices: list[str] = []
        self.rewards: list[float] = []
        self._seen: list[Tensor] = []
        self._first_choice = round((1 - meta.curriculum_share) * running.num_steps)
        self._step = 0
        teacher.to(running.device)  # type: ignore[arg-type]
        with torch.no_grad():
            weights = low_precision(teacher, running.dtype)
        self._teacher = {name: weight.detach() for name, weight in weights.items()}
        self._teachers = _constants(teacher, running.row_tokens)
        self._students = _constants(student.to(running.device), running.row_tokens)  # type: ignore[arg-type]
        self._pairs = matched(geometry(student), geometry(teacher))
        self._parts = Parts(student, teacher, len(quizzes), seed=running.seed).to(running.device)
        self._optimizers = {
            name: torch.optim.AdamW(part.parameters(), lr=meta.learning_rate, weight_decay=0.0)
            for name, part in self._parts.named_children()
        }
        generator = torch.Generator().manual_seed(running.seed)
        width = int(student.config.intermediate_size)
        self._projection_F = torch.randn(width, generator=generator).to(running.device)
        functions: Any = (packed_states, taught_loss, outdoing_loss)
        if running.compiled:
            functions = map(compile_shapes, functions)
        self._states, self._taught, self._alone = functions

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `Method`."""
        digest = hashlib.sha256(self._own.encode())
        for name, weight in self._teacher.items():
            digest.update(name.encode() + weight.float().cpu().numpy().tobytes())
        for name, quiz in self._quizzes.items():
            digest.update(repr([name, *(list(one.tokens) for one in quiz)]).encode())
        return {
            "mp_distil": {**self._settings.model_dump(), "teacher and quizzes": digest.hexdigest()}
        }

    def rows(self, model: PreTrainedModel, rows: Rows, step: int) -> Rows:
        """Let the meta-teacher learn first where it is its turn; in the curriculum, choose."""
        self._step = step
        if step < self._first_choice:
            if step % self._meta.every_steps == 0:
                self._teach_teacher(model, step)
            return rows
        if step > self._first_choice:
            self.rewards.append(self._reward(model, step))
        if len(self._seen) == self._meta.episode_steps:
            self._learn_to_choose()
        return self._chosen(model, step)

    def loss(
        self,
        compute: Callable[..., tuple[Tensor, Tensor]],
        weights: Weights,
        **arguments: Any,  # noqa: ANN401 - as `packed_loss` takes them
    ) -> tuple[Tensor, Tensor]:
        """See `Method`; `compute` is not asked."""
        del compute
        inputs = {n: v for n, v in arguments.items() if n not in ("distillation", *_LESSONS)}
        if self._step >= self._first_choice:
            alone: tuple[Tensor, Tensor] = self._alone(weights, **inputs)
            return alone
        with torch.no_grad():
            states = self._states(self._teacher, **_of(inputs), **self._teachers)
        settings = self._settings
        taught: tuple[Tensor, Tensor] = self._taught(
            weights,
            **inputs,
            states=states,
            head_VD=self._parts.head.weight.detach(),
            bridge_DS=self._parts.bridge.weight,
            pairs=self._pairs,
            weight=settings.weight,
            temperature=settings.temperature,
            hidden_weight=self._meta.hidden_weight,
        )
        return taught

    def before_update(self, step: int, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """The bridge learns with the student."""
        del step, optimizers
        self._update("bridge")

    def state(self) -> Mapping[str, Tensor]:
        """See `Method`."""
        names = list(self._quizzes)
        kept = {f"parts/{name}": tensor for name, tensor in self._parts.state_dict().items()}
        for name, optimizer in self._optimizers.items():
            kept |= optimizer_tensors(optimizer, f"optimizer/{name}/")
        kept["choices"] = torch.tensor(
            [names.index(one) for one in self.choices], dtype=torch.int64
        )
        kept["rewards"] = torch.tensor(self.rewards, dtype=torch.float64)
        kept["seen"] = torch.stack(self._seen) if self._seen else torch.zeros(0, 1)
        return kept

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Method`."""
        names = list(self._quizzes)
        self._parts.load_state_dict(
            {n.removeprefix("parts/"): t for n, t in state.items() if n.startswith("parts/")}
        )
        for name, optimizer in self._optimizers.items():
            load_optimizer(optimizer, state, f"optimizer/{name}/")
        self.choices = [names[int(index)] for index in state["choices"]]
        self.rewards = state["rewards"].tolist()
        self._seen = [one.to(self._running.device) for one in state["seen"]]

    def _teach_teacher(self, model: PreTrainedModel, step: int) -> None:
        """One update of T' on a batch of the own quiz (step 2)."""
        tensors, shares_N = self._batch(self._own, f"meta/{step}")
        with torch.no_grad():
            told_ND, heard_ND, _ = self._last_states(model, tensors)
        targets_N = tensors["targets_BT"].flatten()
        loss = meta_loss(
            self._parts.head.weight,
            told_ND,
            heard_ND,
            targets_N,
            shares_N,
            competitive=self._meta.loss == "competitive",
        )
        loss.backward()  # type: ignore[no-untyped-call]
        self._update("head")

    @torch.no_grad()
    def _reward(self, model: PreTrainedModel, step: int) -> float:
        """What the last choice was worth: the student beside T' on a batch of the own quiz."""
        tensors, shares_N = self._batch(self._own, f"reward/{step}")
        told_ND, _, logits_NV = self._last_states(model, tensors)
        targets_N = tensors["targets_BT"].flatten()
        theirs_N = _right(told_ND @ self._parts.head.weight.T, targets_N)
        ours_N = _right(logits_NV, targets_N)
        gain_N = (ours_N > theirs_N).float() if self._meta.reward == "binary" else ours_N - theirs_N
        return float((gain_N * shares_N).sum())

    def _learn_to_choose(self) -> None:
        """REINFORCE on the episode that has ended."""
        count, names = len(self._seen), list(self._quizzes)
        rewards = torch.tensor(self.rewards[-count:])
        discounted = rewards * _DISCOUNT ** torch.arange(count)
        returns = discounted.flip(0).cumsum(0).flip(0)
        drawn = torch.tensor([names.index(one) for one in self.choices[-count:]])
        odds = self._parts.policy(torch.stack(self._seen)).log_softmax(-1).cpu()
        gained = (returns - returns.mean()) * odds.gather(1, drawn[:, None])[:, 0]
        (-gained.mean()).backward()
        self._update("policy")
        self._seen.clear()

    def _chosen(self, model: PreTrainedModel, step: int) -> Rows:
        """Draw a domain by the policy, and a batch of its quiz."""
        matrix: Any = model.get_submodule("model.layers")[-1].mlp.down_proj.weight  # type: ignore[index]
        with torch.no_grad():
            state_S = matrix.float() @ self._projection_F
            state_S = state_S * torch.rsqrt(state_S.pow(2).mean() + 1e-12)
            odds = self._parts.policy(state_S).softmax(-1).cpu()
        generator = torch.Generator().manual_seed((self._running.seed << 32) + step)
        name = list(self._quizzes)[int(torch.multinomial(odds, 1, generator=generator))]
        self._seen.append(state_S)
        self.choices.append(name)
        return self._rows_of(name, f"choice/{step}")

    def _last_states(
        self, model: PreTrainedModel, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's last state and, over the bridge, the student's, `[N, D]`; its logits."""
        ours = low_precision(model, self._running.dtype)
        told = self._states(self._teacher, **_of(tensors), **self._teachers)[-1]
        last = self._states(ours, **_of(tensors), **self._students)[-1]
        heard = self._parts.bridge(last.float())
        logits = (last @ head_of(ours).T).float()
        return told.float().flatten(0, 1), heard.flatten(0, 1), logits.flatten(0, 1)

    def _batch(self, name: str, lot: str) -> tuple[dict[str, Tensor], Tensor]:
        """A batch of a quiz, and the share `[N]` of each position: only answers count."""
        tensors = to_tensors(self._rows_of(name, lot), self._running.device)
        weights_N = tensors["loss_weights_BT"].flatten()
        return tensors, weights_N / weights_N.sum()

    def _rows_of(self, name: str, lot: str) -> Rows:
        """A batch of the quiz of a domain, always the same of this seed and lot."""
        running, quiz = self._running, self._quizzes[name]
        rng = random.Random(f"{name}/{lot}/{running.seed}")

        def endless() -> Iterator[Conversation]:
            while True:
                yield rng.choice(quiz)

        rows = list(islice(fill_rows(endless(), running.row_tokens), running.rows_per_step))
        return lay_out(rows, row_tokens=running.row_tokens, question_weight=0.0)

    def _update(self, name: str) -> None:
        self._optimizers[name].step()
        self._optimizers[name].zero_grad()


def _constants(model: PreTrainedModel, row_tokens: int) -> dict[str, Any]:
    """What the forward pass of a model takes beside its weights and rows."""
    cos, sin = rotary_tables(model, row_tokens)
    return {"cos": cos, "sin": sin, "geometry": geometry(model)}


def _fitting(
    quizzes: Mapping[str, Sequence[Conversation]], row_tokens: int
) -> dict[str, list[Conversation]]:
    found = {
        name: [one for one in quiz if len(one.tokens) <= row_tokens]
        for name, quiz in quizzes.items()
    }
    for name, quiz in found.items():
        if not quiz:
            raise CorpusError(
                f"adapt.row_tokens: no example of the quiz of {name} fits {row_tokens} tokens"
            )
    return found


def _of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in _INPUTS}


def _right(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return logits_NV.softmax(-1).gather(-1, targets_N[:, None])[:, 0]
