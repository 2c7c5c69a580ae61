"""The recipe: one YAML file that says everything a pool depends on.

Relative paths start at the recipe's folder. Unknown keys are refused, and everything is validated
when the file is read, before any work. It knows the shape of the file, not what the stages do.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from models.errors import RecipeError
from models.precision import Precision
from models.sources.locate import HUB
from models.spec import Name
from models.training.settings import (
    BaseTraining,
    DistillSettings,
    MonteCarloSettings,
    Share,
    UnmaskSettings,
)
from policies.files import PACKAGE
from policies.kinds import Strict, read_yaml

TASKS: Final = "tasks:"
ALL_DOMAINS: Final = "domains"
_RECIPES: Final = Path(__file__).parent / "recipes"
DEFAULT_RECIPE: Final = _RECIPES / "default.yaml"
QUICK_RECIPE: Final = _RECIPES / "quick.yaml"


class CorpusSettings(Strict):
    """Where a corpus comes from.

    `corpus` is a file of JSON Lines or text, a folder of such files (Markdown and HTML are text),
    or `tasks:NAME` for a built-in generator, which draws `examples` training conversations. The
    general corpus may also be `domains`: all the domains' corpora in equal parts. `held_out` is a
    file or folder of its own for what is kept out of training; without it a tenth of the corpus is,
    by hash.
    """

    corpus: str = Field(min_length=1)
    held_out: str | None = None
    examples: int = Field(20_000, ge=1)


class BaseSettings(Strict):
    """The base: a checkpoint, or how to train one.

    `checkpoint` is a folder, a .gguf file, `hf:ORG/NAME[@REVISION]` or `package:DISTRIBUTION/FILE`.
    Of its `vocabulary` all is taken, or what training on the corpora uses (see `vocabulary`).
    """

    checkpoint: str | None = None
    train: BaseTraining | None = None
    vocabulary: Literal["all", "used"] = "all"

    @model_validator(mode="after")
    def _one_of_both(self) -> BaseSettings:
        if (self.checkpoint is None) == (self.train is None):
            raise ValueError("give either checkpoint or train")
        return self


class MemberShape(Strict):
    """What a chunk's shape is wished to be; what is left out is chosen, and the feed-forward
    width is always solved for the wanted number of parameters."""

    hidden_size: int | None = Field(None, gt=0)
    num_layers: int | None = Field(None, gt=0)
    num_heads: int | None = Field(None, gt=0)
    num_kv_heads: int | None = Field(None, gt=0)


class AdapterSettings(Strict):
    """A low-rank adapter of this rank on every matrix of the base's layers, trained by AdamW.

    What it adds is multiplied by `alpha` / `rank`; by default `alpha` is twice the rank.
    """

    rank: int = Field(16, ge=1, le=512)
    alpha: float | None = Field(None, gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    unmask: UnmaskSettings | None = None
    monte_carlo: MonteCarloSettings | None = None

    @model_validator(mode="after")
    def _one_way(self) -> AdapterSettings:
        if self.unmask is not None and self.monte_carlo is not None:
            raise ValueError("give either unmask or monte_carlo")
        return self


class MemberSettings(Strict):
    """The members, one per domain: chunks, how many parameters each has and optionally its shape;
    or with `adapters`, adapters of the whole base.

    `parameters` is a share of the base's, such as "1/8" or 0.125, or a number of parameters.
    """

    parameters: str | float = "1/8"
    shape: MemberShape = MemberShape()
    adapters: AdapterSettings | None = None

    @model_validator(mode="after")
    def _either(self) -> MemberSettings:
        if self.adapters is not None and self.model_fields_set & {"parameters", "shape"}:
            raise ValueError("adapters are of the whole base: leave out parameters and shape")
        return self

    @model_validator(mode="after")
    def _readable(self) -> MemberSettings:
        self.target(1_000_000)
        return self

    def target(self, base_parameters: int) -> int:
        """Return the number of parameters of a chunk; `ValueError` if it makes no sense."""
        try:
            wanted = Fraction(str(self.parameters).replace("_", ""))
        except (ValueError, ZeroDivisionError):
            wanted = Fraction(-1)
        if wanted <= 0:
            raise ValueError(
                f"parameters: {self.parameters!r} is neither a share of the base (1/8, 0.125) "
                "nor a positive number of parameters"
            )
        return round(base_parameters * wanted) if wanted <= 1 else round(wanted)


class CutSettings(Strict):
    """How many examples of a domain the importance of the base's parts is measured on."""

    calibration_examples: int = Field(512, ge=1)


class SelectSettings(Strict):
    """Which share of a corpus is kept for training, and how it is chosen.

    By default all of it: on this project's corpora a choice by uncertainty was worse than as many
    examples by lot (docs/downscale/results.md). "bald" and "disagreement" score examples by the
    members' uncertainty; `switch` keeps the most uncertain ("hard"),
    the least ("easy"), or whichever of both a short trial finds better ("auto"). Each of the
    `ensemble` members that score is first trained for `warmup_tokens` of the general corpus.
    """

    keep: Annotated[float, Field(gt=0, le=1)] = 1.0
    by: Literal["random", "bald", "disagreement"] = "random"
    switch: Literal["auto", "hard", "easy"] = "auto"
    ensemble: int = Field(3, ge=2)
    warmup_tokens: int = Field(100_000, gt=0)
    trial_tokens: int = Field(100_000, gt=0)


class AdaptSettings(Strict):
    """The chunks' continual training.

    `tokens` per chunk; `general_share` of them come from the general corpus, a number or "auto":
    from the D-CPT law fitted on short runs. A step sees `rows_per_step` rows of `row_tokens`, in
    `accumulate` parts. The schedule is warm-up, stable, decay, as shares of the steps.
    """

    tokens: int = Field(1_500_000, gt=0)
    general_share: Share | Literal["auto"] = "auto"
    distill: DistillSettings = DistillSettings()
    optimizer: Literal["muon", "adamw"] = "muon"
    learning_rate: float = Field(3e-3, gt=0)
    muon_learning_rate: float = Field(6e-3, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    question_weight: Share = 0.2
    clip_norm: float = Field(1.0, gt=0)
    warmup_share: Share = 0.03
    decay_share: Share = 0.25
    rows_per_step: int = Field(32, gt=0)
    row_tokens: int = Field(128, gt=0)
    accumulate: int = Field(1, gt=0)
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    precision: Precision = "auto"
    compiled: bool = True
    checkpoint_every_s: float = Field(60, gt=0)


class LawSettings(Strict):
    """The short runs that laws are fitted on, and the bootstrap behind their intervals.

    D-CPT: the chunks of the first `mixture_domains` domains are trained with each general share of
    `mixture_shares`, and judged after each number of `mixture_tokens`. The share that is taken has
    the least domain loss plus `general_weight` times the general loss. P2, if `pruning_shares` are
    given: chunks that keep each of them of the base, trained likewise and judged after
    `pruning_tokens`.
    """

    mixture_domains: int = Field(2, ge=1)
    mixture_shares: tuple[Share, ...] = (0.0, 0.05, 0.15, 0.3, 0.6)
    mixture_tokens: tuple[int, ...] = (50_000, 100_000, 150_000, 200_000)
    general_weight: float = Field(0.2, ge=0)
    pruning_shares: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    pruning_tokens: tuple[int, ...] = (100_000, 200_000, 400_000)
    bootstrap_samples: int = Field(100, ge=1)


class MeasureSettings(Strict):
    """How many held-out questions per domain are asked, or pieces of texts gone on with: to train
    routers on, and to test.

    The policy `cascade` is the most accurate one whose mean cost on the former is within
    `cascade_budget`, a share of what always asking the base costs.
    """

    router_questions: int = Field(800, ge=1)
    test_questions: int = Field(400, ge=1)
    max_new_tokens: int = Field(32, ge=1)
    cascade_budget: float = Field(0.4, gt=0)


# Names that a pool or a run gives to other things; on some disks case tells no names apart.
_RESERVED: Final = {
    "base": "the base",
    "general": "the general corpus",
    **dict.fromkeys(("auto", "cascade", "fused", "best-of"), "a policy of the pool"),
    **dict.fromkeys(
        ("pool.yaml", "router.npz", "cascade.npz", "outcomes.jsonl", "laws.npz", "results.json",
         "report.html", "readme.md", "plots"),
        "a file of the pool",
    ),
}  # fmt: skip


class Recipe(Strict):
    """Everything that a pool depends on.

    `adapt_tokens` gives the chunks that it names other tokens than `adapt.tokens`. What it gives to
    `base` the base is trained on, on all corpora, once the chunks are cut from it: the pool then
    has a base that learnt what they did. Without, its base is the one that they come from.
    """

    name: Name
    seed: int = 1
    base: BaseSettings
    general: CorpusSettings = CorpusSettings(corpus=ALL_DOMAINS)
    domains: dict[Name, CorpusSettings] = Field(min_length=2)
    members: MemberSettings = MemberSettings()
    cut: CutSettings = CutSettings()
    select: SelectSettings = SelectSettings()
    adapt: AdaptSettings = AdaptSettings()
    adapt_tokens: dict[str, Annotated[int, Field(gt=0)]] = Field(default_factory=dict)
    laws: LawSettings = LawSettings()
    measure: MeasureSettings = MeasureSettings()

    @property
    def corpora(self) -> dict[str, CorpusSettings]:
        """The corpora to read or generate, by name; the general one only if it has its own."""
        general = {} if self.general.corpus == ALL_DOMAINS else {"general": self.general}
        return {**self.domains, **general}

    @property
    def sampled_members(self) -> dict[str, str]:
        """The members that are draws of posteriors, by name, and their domains."""
        adapters = self.members.adapters
        if adapters is None or adapters.monte_carlo is None:
            return {}
        numbers = range(1, adapters.monte_carlo.members + 1)
        return {f"{domain}-{number}": domain for domain in self.domains for number in numbers}

    def adapt_of(self, domain: str) -> AdaptSettings:
        """The settings of the training of one chunk; its warm-up is as long as the others'."""
        return self._adapt_for(self.adapt_tokens.get(domain, self.adapt.tokens))

    def adapt_of_base(self, tokens: int) -> AdaptSettings:
        """The settings of training the base on for `tokens`, on all corpora as they are."""
        changes = {
            "general_share": 0.0,
            "rows_per_step": 4 * self.adapt.rows_per_step,  # of all domains, a larger batch
            "distill": DistillSettings(),
        }
        return self._adapt_for(tokens).model_copy(update=changes)

    def adapt_of_teacher(self, tokens: int) -> AdaptSettings:
        """The settings of training a domain's teacher, which nobody teaches, for `tokens`."""
        changes = {"general_share": 0.0, "distill": DistillSettings()}
        return self._adapt_for(tokens).model_copy(update=changes)

    def _adapt_for(self, tokens: int) -> AdaptSettings:
        if tokens == self.adapt.tokens:
            return self.adapt
        warmup_share = min(1.0, self.adapt.warmup_share * self.adapt.tokens / tokens)
        return self.adapt.model_copy(update={"tokens": tokens, "warmup_share": warmup_share})

    @model_validator(mode="after")
    def _teachable(self) -> Recipe:
        if self.adapt.distill.teacher == "trained" and "base" not in self.adapt_tokens:
            raise ValueError(
                "adapt.distill.teacher: 'trained' is the base that adapt_tokens.base trains, which "
                "is not given; allowed without are base, domain"
            )
        if self.adapt.distill.meta is not None and self.members.adapters is not None:
            raise ValueError("adapt.distill.meta: trains chunks; leave it out beside adapters")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.members.adapters is not None and self.select.by != "random":
            raise ValueError(
                f"select.by: {self.select.by!r} has chunks judge; allowed is 'random' where the "
                "members are adapters"
            )
        trained = self.domains if self.members.adapters is not None else (*self.domains, "base")
        for name in self.adapt_tokens:
            if name not in trained:
                why = "adapters need the base as it is" if name == "base" else "it is no domain"
                raise ValueError(f"adapt_tokens: {name!r}: {why}; allowed are {', '.join(trained)}")
        for name in self.sampled_members:
            if name in self.domains:
                raise ValueError(
                    f"domains: the name {name!r} is taken by a draw of members.adapters.monte_carlo"
                )
        seen: dict[str, str] = {}
        for name, settings in self.domains.items():
            if (use := _RESERVED.get(name.lower())) is not None:
                raise ValueError(f"domains: the name {name!r} is reserved for {use}")
            if (other := seen.setdefault(name.lower(), name)) != name:
                raise ValueError(f"domains: {other!r} and {name!r} differ in case alone")
            if settings.corpus == ALL_DOMAINS:
                raise ValueError(f"domains.{name}.corpus: only the general corpus may be 'domains'")
            if self.base.train is not None and not settings.corpus.startswith(TASKS):
                raise ValueError(
                    f"domains.{name}.corpus: base.train trains on built-in tasks only, "
                    f"got {settings.corpus!r}; give base.checkpoint, or a corpus 'tasks:NAME'"
                )
        return self


def read_recipe(file: Path) -> Recipe:
    """Read and validate a recipe, and make its paths absolute.

    Raises:
        RecipeError: it cannot be read; names the key, the value and what is allowed.
    """
    if not file.is_file():
        raise RecipeError(f"there is no recipe at {file}")
    recipe = read_yaml(file, Recipe, refused=RecipeError)
    return _with_absolute_paths(recipe, file.parent.resolve())


def _with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    base = recipe.base
    if base.checkpoint is not None and not base.checkpoint.startswith((HUB, PACKAGE)):
        base = base.model_copy(update={"checkpoint": str(folder / base.checkpoint)})
    domains = {name: _absolute(corpus, folder) for name, corpus in recipe.domains.items()}
    general = _absolute(recipe.general, folder)
    return recipe.model_copy(update={"base": base, "domains": domains, "general": general})


def _absolute(settings: CorpusSettings, folder: Path) -> CorpusSettings:
    changes: dict[str, str] = {}
    if not settings.corpus.startswith(TASKS) and settings.corpus != ALL_DOMAINS:
        changes["corpus"] = str(folder / settings.corpus)
    if settings.held_out is not None:
        changes["held_out"] = str(folder / settings.held_out)
    return settings.model_copy(update=changes)
