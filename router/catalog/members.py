"""The pool's members: which engine runs each, how it reads text, what it can answer and costs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from models.adapter import AdapterSource
from models.chat_template import Message
from models.engines.base import Encoding, SamplingOptions
from models.engines.kind import EngineTraits
from models.engines.registry import engine_traits
from models.errors import RequestError
from models.pool import Pool
from models.tokenizer import Tokenizer, load_tokenizers
from policies.carbon.economics import EconomicsSettings, device_price
from policies.carbon.grid import GridIntensity, GridReading
from policies.carbon.settings import CarbonSettings, LiveModels
from policies.errors import PolicyError
from policies.footprint import IdleRule, Rates
from policies.plan import Answer


class Members:
    """Engines and tokenizers of one pool's models."""

    def __init__(self, pool: Pool) -> None:
        """Load the tokenizers; raises `PoolError` for one that cannot be read."""
        self._pool = pool
        self._engine_of = {model.name: model.spec.engine for model in pool.models}
        self._traits = {
            engine.name: engine_traits(engine, pool.loaded_by(engine.name))
            for engine in pool.engines
        }
        self._tokenizers = load_tokenizers(pool.models)

    @property
    def tokenizer(self) -> Tokenizer:
        """The first model's tokenizer; policies count prompt tokens with it."""
        return self._tokenizers[self.first]

    def engine_of(self, name: str) -> str:
        """Return the engine that runs the member called `name`."""
        return self._engine_of[name]

    def traits_of(self, name: str) -> EngineTraits:
        """Return what the engine can do that runs the member called `name`."""
        return self._traits[self._engine_of[name]]

    def engines_with_metrics(self) -> tuple[str, ...]:
        """Return the engines whose libraries have metrics of their own."""
        return tuple(name for name, traits in self._traits.items() if traits.metrics)

    def tokenizer_of(self, name: str) -> Tokenizer:
        """Return the tokenizer of the member called `name`."""
        return self._tokenizers[name]

    def tokenizer_for(self, name: str) -> Tokenizer:
        """Return whose token ids a request for the served `name` has: a policy's, the first's."""
        return self._tokenizers.get(name, self.tokenizer)

    def check_ids(self, name: str) -> None:
        """Raise `RequestError` if token ids of the first model mean something else to `name`."""
        if self._vocabulary(name) != self._vocabulary(self.first):
            raise RequestError(
                f"token ids are those of {self.first}, and mean something else to {name}", "prompt"
            )

    def _vocabulary(self, name: str) -> object:
        """Return what is equal where token ids mean the same."""
        model = self._pool.model(name)
        if model.card is not None:
            return model.card.tokenizer_sha256
        return model.tokenizer or (name if model.spec.remote else None)

    def opened(self, name: str, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Return a conversation as the member called `name` gets it."""
        return tuple(self._pool.model(name).opened(messages))

    def adapters(self, names: Sequence[str]) -> dict[str, AdapterSource]:
        """Return where the adapters among the members called `names` are."""
        found = {name: self._pool.model(name).adapter for name in names}
        return {name: origin for name, origin in found.items() if origin is not None}

    def sampling(
        self, name: str, asked: SamplingOptions, body: Mapping[str, Any] | None
    ) -> SamplingOptions:
        """Return `asked` with the member's own settings where the client's `body` has none."""
        if body is None:
            return asked
        settings = self._pool.model(name).sampling
        own = {key: settings[key] for key in settings if body.get(key) is None}
        return replace(asked, **own) if own else asked

    def sent(self, name: str, body: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """Return a client's `body` as another server gets it that runs the member called `name`.

        None for a member of ours, which is asked in our own words.
        """
        if body is None or self._pool.model(name).spec.remote is None:
            return None
        return {**body, "messages": self.opened(name, body.get("messages", ()))}

    def context_tokens(self, answer: Answer) -> int | None:
        """Return the shortest context of `answer`'s members; None where it isn't known."""
        known = [self._pool.model(name).context_tokens for name in answer.members]
        known += [self._traits[self._engine_of[name]].context_tokens for name in answer.members]
        return min((tokens for tokens in known if tokens is not None), default=None)

    @property
    def most_context_tokens(self) -> int | None:
        """The longest context of any member that answers; None where one isn't known."""
        each = [
            self.context_tokens(Answer(members=(name,)))
            for name in self._engine_of
            if not self.encodes(name)
        ]
        return (
            None
            if None in each or not each
            else max(tokens for tokens in each if tokens is not None)
        )

    @property
    def most_token_bytes(self) -> int:
        """How long a token of any member can be."""
        return max(one.most_token_bytes for one in self._tokenizers.values())

    def engine_for(self, answer: Answer) -> str | None:
        """Return the engine that runs all members of `answer`; None where no single one does.

        One that is its others' lead in a "gated" answer may be another engine's.
        """
        first, *others = answer.members
        engines = {self._engine_of[name] for name in others or [first]}
        engine = engines.pop()
        traits = self._traits[engine]
        given = answer.weighting in ("static", "router")
        leads = answer.rule == "gated" and given and first in traits.leads
        together = traits.fuses and (leads or self._engine_of[first] == engine)
        return engine if not engines and (together or not others) else None

    def span_engines(self, answer: Answer) -> bool:
        """Return whether no single engine can fuse the members of `answer`."""
        return self.engine_for(answer) is None

    def check_answer(self, answer: Answer) -> None:
        """Raise `PolicyError` if the members of `answer` cannot give it together, saying why."""
        for name in answer.members:
            if name not in self._engine_of:
                raise PolicyError(
                    f"the plan names the model {name!r}, which the pool lacks; "
                    f"it has {', '.join(self._engine_of)}"
                )
        if not self.span_engines(answer):
            self._check_fusion(answer)
            return
        adapters = self.adapters(answer.members)
        if adapters and len({self._engine_of[name] for name in answer.members}) == 1:
            raise PolicyError(
                f"the plan fuses {', '.join(answer.members)}, but the engine "
                f"{self._engine_of[answer.members[0]]!r} runs one adapter per request; an engine "
                "of kind stacked fuses them"
            )
        simple = answer.rule in ("mixture", "product") and answer.weighting in ("static", "router")
        if not simple:
            raise PolicyError(
                f"the plan fuses {', '.join(answer.members)}, which no one engine runs "
                "together: there only the rules mixture and product are known, and weights "
                f"that are given or the router's{self._may_lead(answer)}"
            )
        for name in answer.members:
            self.check_tells(name, "fuses")
            if self._pool.model(name).spec.remote and self._pool.model(name).tokenizer is None:
                raise PolicyError(
                    f"the plan fuses {name!r}, whose tokenizer nobody knows; "
                    f"models.{name}.remote.tokenizer must name it"
                )

    def _may_lead(self, answer: Answer) -> str:
        if answer.rule != "gated":
            return ""
        engine = self._engine_of[answer.members[-1]]
        leads = ", ".join(self._traits[engine].leads) or "nobody"
        return f"; the first of a gated answer may be one of engines.{engine}.leads: {leads}"

    def check_tells(self, name: str, what: str) -> None:
        """Refuse a plan that needs log-probabilities of a member that gives none."""
        engine = self._engine_of[name]
        if not self._traits[engine].logprobs:
            raise PolicyError(
                f"the plan {what} {name!r}, whose engine {engine!r} returns no log-probabilities "
                "(options.logprobs: false)"
            )

    def readers(self) -> tuple[str, ...]:
        """Return the members here whose engines tell what they make of a prompt."""
        return tuple(
            name
            for name, engine in self._engine_of.items()
            if self._traits[engine].here
            and not self._traits[engine].encodes
            and self._traits[engine].reads
        )

    def check_reads(self, name: str) -> None:
        """Refuse a plan that needs what a member makes of a prompt, of one that does not tell."""
        engine = self._engine_of[name]
        if not self._traits[engine].reads:
            raise PolicyError(
                f"the plan has {name!r} read prompts, whose engine {engine!r} does not tell "
                "log-probabilities as it reads them"
            )

    def check_tools(self, answer: Answer) -> None:
        """Raise `RequestError` if the members of `answer` cannot be offered tools."""
        for name in answer.members:
            traits = self.traits_of(name)
            if not traits.calls([name]):
                raise RequestError(
                    f"tools: {name} cannot call any: its chat template shows no known way to write "
                    f"calls; models.{name}.tools names it",
                    "tools",
                )
        if self.span_engines(answer) or not traits.calls(answer.members):
            raise RequestError(
                f"tools: {', '.join(answer.members)} cannot be fused: they write calls in "
                "different ways, or on different engines",
                "tools",
            )

    def check_media(self, answer: Answer, kind: str, field: str) -> None:
        """Raise `RequestError` if `answer`'s members cannot read a part of that `kind`."""
        able = all(self.traits_of(name).media for name in answer.members)
        if self.span_engines(answer) or not able:
            raise RequestError(
                f"{field}: a part of type {kind!r} is not supported by "
                f"{', '.join(answer.members)}; only text is",
                field,
            )

    def encodes(self, name: str) -> bool:
        """Return whether the member called `name` is an encoder."""
        return name in self.traits_of(name).encodes

    @property
    def first(self) -> str:
        """The first model that answers, or the first encoder where none does."""
        names = [model.name for model in self._pool.models]
        return next((name for name in names if not self.encodes(name)), names[0])

    def check_encodes(self, answer: Answer, encoding: Encoding | None) -> None:
        """Raise `RequestError` if the members of `answer` cannot tell what is asked of them.

        Encoders write no answers, and others encode nothing.
        """
        kinds = {name: self.traits_of(name).encodes.get(name, ()) for name in self._engine_of}
        for name in answer.members:
            if encoding is None and kinds[name]:
                raise RequestError(f"{name} is an encoder, which writes no answers", "model")
            if encoding is not None and (encoding.kind not in kinds[name] or answer.members[1:]):
                able = [other for other, kind in kinds.items() if encoding.kind in kind]
                raise RequestError(
                    f"{', '.join(answer.members)} cannot tell a {encoding.kind} of a text; "
                    f"{', '.join(able) or 'no model of this pool'} can",
                    "model",
                )

    def _check_fusion(self, answer: Answer) -> None:
        """Refuse a fusion that the members' engine does not know."""
        engine = self.engine_for(answer)
        assert engine is not None, "answers that span engines are checked otherwise"
        traits = self._traits[engine]
        if len(answer.members) > 1 and answer.rule not in traits.rules:
            raise PolicyError(
                f"the plan fuses by the rule {answer.rule!r}, which the engine {engine!r} does not "
                f"know; allowed are {', '.join(traits.rules)}"
            )
        if answer.update and not traits.updates_evidence:
            raise PolicyError(
                f"the plan updates evidence as tokens come, which the engine {engine!r} cannot"
            )


class Prices:
    """The models' facts with their present rates.

    `grid` is where the grid's intensity comes from; its readings follow a live feed, where one is
    configured and started. `facts` are what policies know of each model, by name. `idle` is the
    rule for idle energy; `devices` says of engines whose price follows from their hardware what a
    busy hour costs, by what it pays for.
    """

    def __init__(
        self,
        pool: Pool,
        carbon: CarbonSettings,
        economics: EconomicsSettings | None = None,
        *,
        grid: GridIntensity | None = None,
    ) -> None:
        """Without a `grid` it is the one that `carbon` describes."""
        self.idle: IdleRule = carbon.idle
        self.devices = {
            engine.name: device_price(costs, device, pue=carbon.pue).usd_per_hour(device)
            for engine in pool.engines
            if economics is not None
            and (costs := economics.of(engine.name, remote=engine.kind == "remote")) is not None
            and (device := carbon.device_of(engine.name))
        }
        self.grid = grid or carbon.grid(pool.folder)
        self.facts = LiveModels(
            pool.facts(),
            engine_of={model.name: model.spec.engine for model in pool.models},
            settings=carbon,
            grid=self.grid,
            clock=time.time,
            economics=economics,
        )

    @property
    def rates(self) -> Mapping[str, Rates]:
        """What each model costs per token, at the grid's present intensity."""
        return self.facts.rates()

    def grid_reading(self) -> GridReading:
        """Return the grid's present intensity and where the figure comes from."""
        return self.grid.at(time.time())
