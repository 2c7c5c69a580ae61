"""What a recipe says of the methods of training that this package has; it needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from policies.kinds import Strict

Share = Annotated[float, Field(ge=0, le=1)]


class BaseShape(Strict):
    """Width and heads of a base that is trained here; a stage adds the depth."""

    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(32, gt=0)


class BaseStage(Strict):
    """One stretch of the base's training; a deeper one grows from the shallower before it."""

    num_layers: int = Field(gt=0)
    steps: int = Field(gt=0)
    decay_steps: int = Field(0, ge=0)
    rows_per_step: int = Field(128, gt=0)
    row_tokens: int = Field(64, gt=0)
    learning_rate: float = Field(3e-3, gt=0)
    muon_learning_rate: float = Field(6e-3, gt=0)
    seed: int = 0


class BaseTraining(Strict):
    """Trains the base from scratch on the built-in task domains that the recipe names."""

    shape: BaseShape
    stages: tuple[BaseStage, ...] = Field(min_length=1)
    compiled: bool = True


class UnmaskSettings(Strict):
    """ID3: only this share of an adapter's parameters learns, chosen on the way.

    Each step adds those that are highest by |gradient| / (|weight| + epsilon)^exponent.
    """

    share: float = Field(0.25, gt=0, le=1)
    exponent: float = Field(0.0, ge=0, le=10)
    epsilon: float = Field(1e-3, gt=0)


class MonteCarloSettings(Strict):
    """MonteCLoRA: an adapter with a posterior, of which `members` draws are members of their own.

    The pool has them beside the mean, which is called like the domain: NAME-1, NAME-2 and so on.
    The others are what the noise starts from and is held to: `deviation` is about that of A's noise
    at the start, of one component; `components` are mixed, by weights whose Dirichlet has this
    `concentration` in the prior. `weight` multiplies the divergence in the loss.
    """

    members: int = Field(4, ge=1, le=64)
    deviation: float = Field(1e-2, gt=0)
    components: int = Field(4, ge=1, le=64)
    concentration: float = Field(1.0, gt=0)
    weight: float = Field(1e-5, ge=0)


class MetaDistillSettings(Strict):
    """MPDistil: the teacher's head goes on learning from a quiz, and the pupil ends by choosing
    what it learns next; see `models.training.mp_distil`.

    `quiz_share` of each domain's examples are its quiz. The head learns from it every `every_steps`
    steps, by the `collaborative` or `competitive` loss. The last `curriculum_share` of the steps
    are the pupil's own choices among all domains' quizzes, which are rewarded by whether it is
    surer than the teacher (`binary`) or by how much (`real`), `episode_steps` at a time.
    """

    loss: Literal["collaborative", "competitive"] = "collaborative"
    reward: Literal["binary", "real"] = "binary"
    hidden_weight: float = Field(100.0, ge=0)
    quiz_share: float = Field(0.1, gt=0, lt=1)
    learning_rate: float = Field(1e-3, gt=0)
    every_steps: int = Field(4, ge=1)
    curriculum_share: Share = 0.2
    episode_steps: int = Field(8, ge=1)


class DistillSettings(Strict):
    """Distillation: (1 - weight) of the loss is the labels', `weight` the teacher's.

    The teacher's part is temperature² · KL(teacher ‖ chunk), both softened by `temperature`
    (Hinton et al. 2015). `teacher` is the `base`, as the chunks are cut from it; the `trained` one,
    which `adapt_tokens.base` trains; or each `domain` has its own, the base trained on the domain
    alone, for `teacher_tokens` or by default as much compute as its member. `meta` makes it
    MPDistil. Off by default: a chunk trained on its domain outgrows the base there, and what
    teachers gained stands in docs/downscale/results.md.
    """

    temperature: float = Field(1.0, gt=0)
    weight: Share = 0.0
    teacher: Literal["base", "trained", "domain"] = "base"
    teacher_tokens: int | None = Field(None, gt=0)
    meta: MetaDistillSettings | None = None

    @model_validator(mode="after")
    def _of_use(self) -> DistillSettings:
        if self.weight == 0 and (self.teacher != "base" or self.meta is not None):
            raise ValueError("weight: 0 leaves a teacher nothing to say; give more, up to 1")
        if self.teacher_tokens is not None and self.teacher != "domain":
            raise ValueError(
                f"teacher_tokens: {self.teacher_tokens} trains nobody where teacher is "
                f"{self.teacher!r}; allowed where it is 'domain'"
            )
        return self
