"""What a pool file says: the schema of pool.yaml, and a model with what its checkpoint tells.

Engines are made from these; `models.pool` reads, checks and joins them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, field_validator

from models.adapter import AdapterSource
from models.answer_format import AnswerFormat, FormatName, ReasoningTags, detect_format
from models.card import ModelCard
from models.chat_template import Message, open_conversation, read_prompt_facts
from policies.base import ModelFacts
from policies.footprint import Rates
from policies.kinds import Strict

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class DeploymentSpec(Strict):
    """How many replicas an engine gets, and what each holds of the machine.

    With `max_replicas` above `min_replicas` the engine scales with its load, aiming at
    `target_ongoing_requests` per replica. A replica that is taken down gets no new requests and has
    `drain_s` to finish what it runs. Where an engine spreads over several devices, `num_gpus` are
    shared among them.
    """

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(16, gt=0)
    num_cpus: float = Field(0.1, ge=0)
    num_gpus: float = Field(0, ge=0)
    drain_s: float = Field(10, ge=0)


Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16", "int8", "int4"]


class EngineSpec(Strict):
    """One engine: `kind` picks the implementation, `options` are that implementation's own.

    `kv_memory_bytes` bounds the key/value cache; requests beyond it wait, at most
    `max_queued_requests` of them. `device` "auto" takes CUDA where there is one. `leads` are models
    of other engines, smaller than its own, of which it keeps a copy: "gated" answers may begin with
    one of them.
    """

    name: Name
    kind: str
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    dtype: Dtype = "auto"
    kv_memory_bytes: int = Field(256 * 2**20, gt=0)
    max_queued_requests: int = Field(256, ge=0, le=1_000_000)
    leads: tuple[Name, ...] = ()
    options: dict[str, Any] = Field(default_factory=dict)
    deployment: DeploymentSpec = Field(default_factory=DeploymentSpec)


class RemoteModelSpec(Strict):
    """A model behind another server, as far as the pool file can tell.

    `model` is its name there (default: its name here). `tokenizer` is a source like `checkpoint`,
    with its tokenizer and chat template: without one, prompts count as one token per four bytes
    until the server has counted them. With `parameters`, and the hardware of its engine in the
    configuration's `carbon.engines`, its energy and carbon are modelled; else they are unknown, and
    footprints say so. One that `encodes` tells vectors or scores of texts, and writes no answers.
    """

    model: str | None = None
    tokenizer: str | None = None
    context_tokens: int | None = Field(None, ge=1)
    parameters: int | None = Field(None, ge=1)
    encodes: tuple[Literal["vector", "score"], ...] = ()


class SamplingSpec(Strict):
    """How a model's answers are drawn where a request does not say; the names are requests' own."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=2)


class ModelSpec(Strict):
    """One model: where its checkpoint is, who runs it, its price.

    `checkpoint` is a source as `sources.locate` reads it: a folder or a .gguf file (relative to the
    pool file), `hf:ORG/NAME[@REVISION]`, `package:DISTRIBUTION/FILE`.

    A low-rank adapter has a `base`, another model of the pool, and an `adapter` in the checkpoint's
    place: a source of the folder that PEFT wrote. What it does not say of itself (its engine,
    system message, sampling, tools, reasoning, prices) is its base's.

    `remote` takes the checkpoint's place where a `remote` engine asks another server. `system`
    opens conversations that bring no system message of their own. Where a request does not say how
    its answer is drawn, `sampling` does, and what that leaves open the checkpoint (see
    `ModelCard.sampling`) unless `generation_config` is false; of a fusion in one engine, the first
    member's settings count.

    How the model writes calls of `tools` and what its `reasoning` stands between is read off its
    chat template, unless it is named here; false says that it does not.

    With `otherwise`, the pool does without the model on a machine that lacks its package, its file
    or its engine's library; policies that name it then take the model `otherwise` in its place.
    """

    name: Name
    engine: str
    checkpoint: str | None = None
    base: Name | None = None
    adapter: str | None = None
    remote: RemoteModelSpec | None = None
    system: str | None = None
    sampling: SamplingSpec = SamplingSpec()
    generation_config: bool = True
    tools: FormatName | Literal[False] | None = None
    reasoning: ReasoningTags | Literal[False] | None = None
    otherwise: Name | None = None
    domains: tuple[str, ...] = ()
    description: str = ""
    usd_per_million_input_tokens: float = Field(0, ge=0, le=1e6)
    usd_per_million_output_tokens: float = Field(0, ge=0, le=1e6)


# What an adapter has of its base where it does not say otherwise.
_OF_BASE = (
    *("engine", "system", "sampling", "generation_config", "tools", "reasoning"),
    *("usd_per_million_input_tokens", "usd_per_million_output_tokens"),
)


class PoolFile(Strict):
    """The schema of pool.yaml. `policies` and `scorers` map names to specifications.

    The policy "auto" is the default; plans name the scorers beside those that policies bring along.
    """

    name: Name
    engines: tuple[EngineSpec, ...] = Field(min_length=1)
    models: tuple[ModelSpec, ...] = Field(min_length=1)
    policies: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    scorers: dict[Name, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("models", mode="before")
    @classmethod
    def _complete_adapters(cls, models: object) -> object:
        """Give adapters what they have of their bases."""
        if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
            return models
        named = {str(model.get("name")): model for model in models}
        completed = []
        for model in models:
            base = named.get(str(model.get("base")), {})
            if "base" in model and not base:
                raise ValueError(
                    f"{model.get('name')}.base: {model['base']!r} is unknown; allowed are "
                    f"{', '.join(named)}"
                )
            completed.append({**{key: base[key] for key in _OF_BASE if key in base}, **model})
        return completed


@dataclass(frozen=True, kw_only=True)
class Model:
    """A pool's model: what the file says and, where it has a checkpoint, what that says.

    `tokenizer` is the folder or .gguf file that holds its tokenizer; None where nobody knows it.
    """

    spec: ModelSpec
    card: ModelCard | None
    tokenizer: Path | None = None

    @property
    def name(self) -> str:
        """The name clients use."""
        return self.spec.name

    @property
    def context_tokens(self) -> int | None:
        """How many tokens prompt and answer may have together; None where it isn't known."""
        if self.card is not None:
            return self.card.context_tokens
        return self.spec.remote.context_tokens if self.spec.remote else None

    @property
    def sampling(self) -> dict[str, Any]:
        """How answers are drawn where a request does not say, by the names of `SamplingOptions`."""
        stated = self.card.sampling if self.card and self.spec.generation_config else {}
        return {**stated, **self.spec.sampling.model_dump(exclude_none=True)}

    @cached_property
    def answer_format(self) -> AnswerFormat:
        """How its answers are read, as the pool file or the chat template says.

        Raises `PoolError` for a template that cannot be read.
        """
        found = AnswerFormat()
        if self.card is not None:
            found = detect_format(read_prompt_facts(self.card.path).templates.values())
        spec = self.spec
        return AnswerFormat(
            calls=found.calls if spec.tools is None else spec.tools or None,
            reasoning=found.reasoning if spec.reasoning is None else spec.reasoning or None,
        )

    @property
    def adapter(self) -> AdapterSource | None:
        """Where its adapter is, if it is one."""
        adapter = self.card.adapter if self.card else None
        return adapter.origin if adapter else None

    def opened(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return a conversation as the model gets it: with its `system` message, if it has none."""
        return open_conversation(messages, self.spec.system)

    def facts(self) -> ModelFacts:
        """Return what policies may know about this model."""
        stated = self.spec.remote.parameters if self.spec.remote else None
        return ModelFacts(
            name=self.name,
            parameters=self.card.parameters if self.card else stated,
            remote=self.spec.remote is not None,
            domains=self.spec.domains,
            rates=Rates(
                usd_per_input_token=self.spec.usd_per_million_input_tokens / 1e6,
                usd_per_output_token=self.spec.usd_per_million_output_tokens / 1e6,
            ),
        )
