"""Everything that the report, the cards and `results.json` say, in one JSON object.

Rendering knows only this object, so a report can be drawn again without any model. A *system* is
any way to get an answer: one model, a route to one of the chunks, a policy.

Shapes: `Q` test questions, `R` resamples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.downscale.answers import Measured, members_measured
from models.downscale.chunks import BASE, CUT_FILE, cut_out, selection_of
from models.downscale.examples import conversations
from models.downscale.laws import fits_of
from models.downscale.members import card_of, train_chunk
from models.downscale.policies import policies_of
from models.downscale.questions import Question, questions
from models.downscale.stage import Run, read_json
from models.downscale.teachers import (
    ADAPT_FILE,
    LABELS_ALONE,
    taught_by,
    teachers_training,
    trained_base,
)
from models.tasks.base import Split
from policies.carbon.grid import find_zone
from policies.carbon.llmcarbon import find_device, run_carbon
from policies.evaluation.metrics import wilson_interval

Floats = NDArray[np.float64]

ORACLE: Final = "routed (by domain)"
_NUM_RESAMPLES: Final = 2000
_ZONE: Final = "WORLD"
_GPU: Final = "h100"


@dataclass(frozen=True, kw_only=True)
class System:
    """`score_Q` is how good the answer is (see `answers.score`), `usd_Q` what it cost; `parameters`
    are those that work on each token, in the mean."""

    name: str
    kind: str  # base, chunk, routed, policy; a comparison may add others
    score_Q: Floats
    usd_Q: Floats
    parameters: float


def collect(run: Run) -> dict[str, Any]:
    """The figures of a run whose every model and policy was measured."""
    asked, measured = questions(run), members_measured(run)
    tests = [question for question in asked if question.is_test]
    domain_Q = [question.domain for question in tests]
    return {
        "pool": run.recipe.name,
        "domains": list(run.domains),
        "num_test_questions": len(tests),
        "question_domains": {d: domain_Q.count(d) for d in dict.fromkeys(domain_Q)},
        "seed": run.recipe.seed,
        "models": _models(run, asked, measured),
        "systems": describe(systems(run).values(), tests, seed=run.recipe.seed),
        "losses": {name: _losses(asked, one) for name, one in measured.items()},
        "fits": fits_of(run),
        "selection": [_selection(run, domain) for domain in run.domains],
    }


def systems(run: Run) -> dict[str, System]:
    """Every model alone, the chunk of each question's own domain, and the pool's policies."""
    asked, measured = questions(run), members_measured(run)
    tests = [i for i, question in enumerate(asked) if question.is_test]
    played = policies_of(run)["played"]
    sizes = {name: card_of(run, name).parameters for name in measured}
    found = []
    for name in (BASE, *run.domains):
        kind = BASE if name == BASE else "chunk"
        score_Q = measured[name].score_Q[tests]
        usd_Q = np.array(played["single"][name])
        found.append(
            System(name=name, kind=kind, score_Q=score_Q, usd_Q=usd_Q, parameters=sizes[name])
        )
    own = [run.domains.index(asked[i].domain) + 1 for i in tests]
    at = np.arange(len(tests))
    found.append(
        System(
            name=ORACLE,
            kind="routed",
            score_Q=np.stack([one.score_Q for one in found])[own, at],
            usd_Q=np.stack([one.usd_Q for one in found])[own, at],
            parameters=sizes[run.domains[0]],
        )
    )
    for name, one in played["policies"].items():
        score_Q, usd_Q = np.array(one["scores"]), np.array(one["usd"])
        parameters = float(np.mean(one["parameters"]))
        found.append(
            System(name=name, kind="policy", score_Q=score_Q, usd_Q=usd_Q, parameters=parameters)
        )
    return {system.name: system for system in found}


def describe(
    systems: Iterable[System], tests: Sequence[Question], *, seed: int
) -> list[dict[str, Any]]:
    """Figures of systems as JSON: size and price; with intervals, by domain and by question, how
    often they are right where that can be said, and where it cannot the loss in nats per byte."""
    domain_Q = [question.domain for question in tests]
    by_loss_Q = np.array([question.by_loss for question in tests])
    right = Comparison(domain_Q, seed=seed, among=~by_loss_Q)
    loss = Comparison(domain_Q, seed=seed, among=by_loss_Q)
    found = []
    for system in systems:
        figures: dict[str, Any] = {
            "name": system.name,
            "kind": system.kind,
            "parameters": system.parameters,
            "usd_per_1000": float(1000 * system.usd_Q.mean()),
        }
        if right.domains:
            by_domain: dict[str, list[bool]] = defaultdict(list)
            for score, domain, is_loss in zip(system.score_Q, domain_Q, by_loss_Q, strict=True):
                if not (is_loss or np.isnan(score)):
                    by_domain[domain].append(bool(score == 1))
            figures |= {
                "accuracy": right.mean(np.where(by_loss_Q, 0.0, system.score_Q)),
                "by_domain": {domain: share(values) for domain, values in by_domain.items()},
                "right": "".join("01"[int(s)] for s in system.score_Q[~by_loss_Q]),
            }
        if loss.domains:
            loss_Q = np.where(by_loss_Q, -np.log(np.where(by_loss_Q, system.score_Q, 1.0)), 0.0)
            figures |= {
                "loss": loss.mean(loss_Q),
                "loss_by_domain": {
                    domain: round(float(loss_Q[[d == domain for d in domain_Q]].mean()), 5)
                    for domain in loss.domains
                },
            }
        found.append(figures)
    return found


class Comparison:
    """Bootstrap over questions, within each domain, the same resamples for every system."""

    def __init__(
        self, domain_Q: Sequence[str], *, seed: int, among: NDArray[np.bool_] | None = None
    ) -> None:
        """`domain_Q` says which domain each test question is of; figures are means over the domains
        that those questions are of that are `among` the compared (None: all)."""
        domains = np.asarray(domain_Q)
        self.domains = [str(d) for d in dict.fromkeys(domains if among is None else domains[among])]
        rng = np.random.default_rng(seed)
        self._weights_RQ = np.zeros((_NUM_RESAMPLES, len(domains)))
        self._plain_Q = np.zeros(len(domains))
        for domain in self.domains:
            rows = np.flatnonzero(domains == domain)
            share = 1 / (len(self.domains) * len(rows))
            self._plain_Q[rows] = share
            counts = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), _NUM_RESAMPLES)
            self._weights_RQ[:, rows] = counts * share

    def mean(self, value_Q: Floats) -> dict[str, Any]:
        """Mean over domains, with its 95% interval."""
        return self.figure(lambda weights: weights @ value_Q)

    def figure(self, statistic: Callable[[Floats], Any]) -> dict[str, Any]:
        """What `statistic` makes of the questions' weights [..., Q], with its 95% interval."""
        low, high = np.quantile(statistic(self._weights_RQ), [0.025, 0.975])
        return {
            "value": round(float(statistic(self._plain_Q)), 4),
            "interval_95": [round(float(low), 4), round(float(high), 4)],
        }


def share(right: Sequence[bool]) -> dict[str, Any]:
    """How many of how many are right, with the 95% Wilson interval."""
    low, high = wilson_interval(sum(right), len(right))
    return {
        "right": sum(right),
        "asked": len(right),
        "exact_match": round(sum(right) / len(right), 4),
        "interval_95": [round(low, 4), round(high, 4)],
    }


def training_footprint(*, cpu_s: float, flops: float, device: str) -> dict[str, Any]:
    """Energy and carbon of a training: watt-hours, grams of CO2 equivalent, and how they were got.

    On a CPU the process's CPU time is measured and its power taken from the table of devices; on a
    GPU both come from the FLOPs (LLMCarbon). The grid is the world's mean, since nobody knows where
    a recipe is run.
    """
    grid = find_zone(_ZONE)
    if device == "cpu":
        vcpu = find_device("cpu")
        wh = cpu_s * vcpu.power_w / 3600
        operational = wh * grid.gco2e_per_kwh / 1000
        embodied = cpu_s * vcpu.embodied_gco2e_per_s
        method = "CPU time measured, power per vCPU from the table"
    else:
        run = run_carbon(
            flops, find_device(_GPU), num_devices=1, pue=1.0, gco2e_per_kwh=grid.gco2e_per_kwh
        )
        wh, operational = 1e6 * run.mwh, 1e6 * run.operational_tco2e
        embodied = 1e6 * run.embodied_tco2e
        method = f"modelled from FLOPs (LLMCarbon, {_GPU})"
    return {
        "wh": round(wh, 4),
        "operational_gco2e": round(operational, 4),
        "embodied_gco2e": round(embodied, 4),
        "method": f"{method}; grid {_ZONE}, {grid.gco2e_per_kwh:g} g/kWh",
    }


def training_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the training that left `facts` took."""
    footprint = training_footprint(
        cpu_s=facts["cpu_s"], flops=facts["flops"], device=facts["device"]
    )
    return {"training": facts, "footprint": footprint}


def _models(
    run: Run, asked: Sequence[Question], measured: Mapping[str, Measured]
) -> dict[str, Any]:
    """Size, lineage, training and its footprint of every member."""
    found: dict[str, Any] = {}
    for name, one in measured.items():
        found[name] = {"parameters": card_of(run, name).parameters}
        if name == BASE:
            found[name] |= _base_training(run)
        else:
            found[name] |= {
                **_lineage(run, name),
                "corpus": run.recipe.domains[name].corpus,
                "taught_by": taught_by(run),
                **training_facts(read_json(train_chunk(run, name) / ADAPT_FILE)),
            }
            if (school := teachers_training(run, name)) is not None:
                found[name]["teacher"] = training_facts(school)
        skills: dict[str, list[bool]] = defaultdict(list)
        for question, score in zip(asked, one.score_Q, strict=True):
            if question.is_test and question.example.skill and not question.by_loss:
                skills[f"{question.domain}/{question.example.skill}"].append(bool(score == 1))
        found[name]["by_skill"] = {skill: share(v) for skill, v in sorted(skills.items())}
    return found


def _base_training(run: Run) -> dict[str, Any]:
    """Where the pool's base comes from, and what it took after the chunks were cut."""
    tokens = run.recipe.adapt_tokens.get(BASE)
    if tokens is None:
        return {"lineage": "the base"}
    facts = read_json(trained_base(run, tokens) / ADAPT_FILE)
    examples = sum(len(conversations(run, domain, Split.TRAIN)) for domain in run.domains)
    return {
        "lineage": "the base, trained on all corpora after the chunks were cut from it",
        "corpus": "all corpora",
        "taught_by": LABELS_ALONE,
        **training_facts(facts | {"general_share": 0.0, "examples": examples}),
    }


def _lineage(run: Run, domain: str) -> dict[str, Any]:
    """Where a member comes from."""
    adapters = run.recipe.members.adapters
    if adapters is not None:
        lineage = f"the base with an adapter of rank {adapters.rank}, trained on its domain"
        return {"lineage": lineage}
    cut = read_json(cut_out(run, domain) / CUT_FILE)
    keys = ("shape", "parameters", "base_parameters", "layers", "pruned_share")
    return {
        "lineage": "cut from the base, then trained on its domain",
        "cut": {key: cut[key] for key in keys},
    }


def _losses(asked: Sequence[Question], one: Measured) -> dict[str, float]:
    """Nats per answer token on the test questions, by domain."""
    by_domain: dict[str, list[float]] = defaultdict(list)
    for question, loss in zip(asked, one.losses, strict=True):
        if question.is_test:
            by_domain[question.domain].append(float(loss))
    return {domain: round(float(np.mean(losses)), 5) for domain, losses in by_domain.items()}


def _selection(run: Run, domain: str) -> dict[str, Any]:
    found = selection_of(run, domain)
    return {
        "domain": domain,
        "kept": len(found["kept"]),
        "of": found["of"],
        "switch": found["switch"],
        "trials": found["trials"],
    }
