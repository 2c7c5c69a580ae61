"""Everything that the report, the card and `results.json` say, in one JSON object.

Rendering knows only this object, so a report can be drawn again without any model.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.downscale.architecture import num_parameters
from models.downscale.baselines import FINETUNED, MERGED, SCRATCH
from models.downscale.errors import RecipeError
from models.downscale.footprint import training_footprint
from models.downscale.fuse import FUSED, read_calibration
from models.downscale.latency import LATENCY_FILE
from models.downscale.laws import read_fits
from models.downscale.measure import BASE, Measured, read_measured
from models.downscale.questions import Question, questions
from models.downscale.routing import choices, chunk_choices
from models.downscale.run import ADAPT_FILE, CUT_FILE, SELECTION_FILE, Run
from models.downscale.systems import Comparison, Floats, System, claims
from models.downscale.variants import read_variants
from models.training.statistics import wilson_interval
from policies.laws import CompressionLaw, RecoveryLaw, RuntimeLaw

ORACLE, LEARNED, WHOLE_POOL = "routed (by domain)", "routed (learned)", "routed (with base)"


def collect(
    run: Run, names: Sequence[str], *, routed: bool, variants: Sequence[str]
) -> dict[str, Any]:
    """The figures of a finished run; `names` are the models that were measured."""
    asked = questions(run)
    tests = [i for i, question in enumerate(asked) if question.is_test]
    measured = read_measured(run, names)
    domain_Q = [asked[i].domain for i in tests]
    comparison = Comparison(domain_Q, seed=run.recipe.seed)
    systems = _systems(run, asked, tests, measured, routed=routed)
    fits = read_fits(run)
    systems |= _compared(run.recipe.compare, domain_Q)
    references = [name for name in systems if name == BASE or name.endswith(FINETUNED)]
    timings = _timings(run)
    return {
        "pool": run.recipe.name,
        "domains": list(run.domains),
        "num_test_questions": len(tests),
        "question_domains": _sizes(domain_Q),
        "seed": run.recipe.seed,
        "models": _models(run, asked, measured),
        "systems": [
            {
                "name": system.name,
                "kind": system.kind,
                "parameters": system.parameters,
                "accuracy": comparison.accuracy(system.right_Q),
                "by_domain": _by_domain(system.right_Q, domain_Q),
                "right": "".join("01"[int(right)] for right in system.right_Q),
            }
            for system in systems.values()
        ],
        "claims": claims(
            systems,
            comparison,
            routed=[name for name in systems if name.endswith((ORACLE, LEARNED))],
            fused=[name for name, system in systems.items() if system.kind == "fused"],
            references=references,
            curve=fits["curves"]["loss/evidence/all"],
        ),
        "losses": _losses(asked, measured),
        "fits": fits,
        "fusion": {
            name: read_calibration(run, name.removeprefix(FUSED))
            for name in systems
            if name.startswith(FUSED) and not name.endswith("uniform")
        },
        "compression": _compression(run, systems, timings),
        "timings": timings,
        "selection": [_selection(run, domain) for domain in run.domains],
        "variants": read_variants(run, variants),
    }


def _systems(
    run: Run,
    asked: Sequence[Question],
    tests: Sequence[int],
    measured: Mapping[str, Measured],
    *,
    routed: bool,
) -> dict[str, System]:
    base_parameters = num_parameters(run.base)
    chunk_parameters = num_parameters(run.chunk(run.domains[0]))
    everyone = len(run.domains) * chunk_parameters
    right = {name: _right_on(one, tests) for name, one in measured.items()}
    found: list[System] = []

    def add(name: str, kind: str, right_Q: Floats, parameters: float) -> None:
        found.append(System(name=name, kind=kind, right_Q=right_Q, parameters=parameters))

    add(BASE, "base", right[BASE], base_parameters)
    if FINETUNED in right:
        add(FINETUNED, "base", right[FINETUNED], base_parameters)
    for domain in run.domains:
        add(domain, "chunk", right[domain], chunk_parameters)
    add(ORACLE, "routed", _routed(right, [asked[i].domain for i in tests]), chunk_parameters)
    if routed:
        queries = [asked[i].text for i in tests]
        chosen = chunk_choices(run, queries)
        add(LEARNED, "routed", _routed(right, chosen), chunk_parameters)
        chosen = choices(run, queries)
        used = np.mean([base_parameters if c == BASE else chunk_parameters for c in chosen])
        add(WHOLE_POOL, "routed", _routed(right, chosen), float(used))
    for name, right_Q in right.items():
        if name.startswith(FUSED):
            add(name, "fused", right_Q, everyone)
    for name in MERGED:
        if name in right:
            add(f"merged ({name})", "merged", right[name], base_parameters)
    if f"{SCRATCH}-{run.domains[0]}" in right:
        fresh = {domain: right[f"{SCRATCH}-{domain}"] for domain in run.domains}
        by_domain = _routed(fresh, [asked[i].domain for i in tests])
        add("from scratch (by domain)", "scratch", by_domain, chunk_parameters)
    return {system.name: system for system in found}


def _compared(files: Mapping[str, str], domain_Q: Sequence[str]) -> dict[str, System]:
    """The systems of other runs on the same questions, the shared base and single chunks aside."""
    found: dict[str, System] = {}
    for label, file in files.items():
        try:
            content = json.loads(Path(file).read_text())
            others = content["systems"]
        except (OSError, ValueError, KeyError) as error:
            raise RecipeError(f"compare.{label}: {file} holds no results: {error}") from None
        if content["question_domains"] != _sizes(domain_Q):
            raise RecipeError(f"compare.{label}: {file} was measured on other questions")
        for system in others:
            if system["kind"] != "chunk" and system["name"] != BASE:
                name = f"{label}: {system['name']}"
                found[name] = System(
                    name=name,
                    kind=system["kind"],
                    right_Q=np.array([float(right) for right in system["right"]]),
                    parameters=system["parameters"],
                )
    return found


def _sizes(domain_Q: Sequence[str]) -> dict[str, int]:
    return {domain: list(domain_Q).count(domain) for domain in dict.fromkeys(domain_Q)}


def _right_on(one: Measured, tests: Sequence[int]) -> Floats:
    """Right or not on the test questions; NaN where the model was not asked."""
    right_Q = np.full(int(max(*one.asked, *tests)) + 1, np.nan)
    right_Q[one.asked] = one.right
    found: Floats = right_Q[list(tests)]
    return found


def _routed(right: Mapping[str, Floats], chosen: Sequence[str]) -> Floats:
    return np.array([right[name][i] for i, name in enumerate(chosen)])


def _by_domain(right_Q: Floats, domain_Q: Sequence[str]) -> dict[str, Any]:
    found: dict[str, list[float]] = defaultdict(list)
    for right, domain in zip(right_Q, domain_Q, strict=True):
        if not np.isnan(right):
            found[domain].append(right)
    return {
        domain: share([bool(value == 1) for value in values]) for domain, values in found.items()
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


def _losses(
    asked: Sequence[Question], measured: Mapping[str, Measured]
) -> dict[str, dict[str, float]]:
    """Nats per answer token on the test questions, by model and domain."""
    found: dict[str, dict[str, float]] = {}
    for name, one in measured.items():
        if one.answer_QT is None:
            continue
        by_domain: dict[str, list[float]] = defaultdict(list)
        for index, loss in zip(one.asked, one.losses, strict=True):
            if asked[index].is_test:
                by_domain[asked[index].domain].append(float(loss))
        found[name] = {d: round(float(np.mean(losses)), 5) for d, losses in by_domain.items()}
    return found


def _models(
    run: Run, asked: Sequence[Question], measured: Mapping[str, Measured]
) -> dict[str, Any]:
    """Size, lineage, training and its footprint of every model that is stored somewhere."""
    base_parameters = num_parameters(run.base)
    found: dict[str, Any] = {BASE: {"parameters": base_parameters, "lineage": "the base"}}
    stages = {domain: f"adapt/{domain}" for domain in run.domains}
    stages |= {FINETUNED: f"baselines/{FINETUNED}"}
    stages |= {f"{SCRATCH}-{domain}": f"baselines/{SCRATCH}/{domain}" for domain in run.domains}
    for name, stage in stages.items():
        if name not in measured:
            continue
        facts = json.loads((run.stages.folder(stage) / ADAPT_FILE).read_text())
        found[name] = {
            "parameters": base_parameters if name == FINETUNED else num_parameters(
                run.chunk(run.domains[0])
            ),
            "lineage": _lineage(name, run.domains),
            "training": facts,
            "footprint": training_footprint(
                cpu_s=facts.get("cpu_s") or facts["wall_clock_s"],
                flops=facts["flops"],
                device=facts["device"],
            ),
        }  # fmt: skip
        if name in run.domains:
            cut = json.loads((run.stages.folder(f"cut/{name}") / CUT_FILE).read_text())
            keys = ("shape", "parameters", "base_parameters", "layers", "pruned_share")
            found[name]["cut"] = {key: cut[key] for key in keys}
            found[name]["training_examples"] = len(run.selected(name))
            found[name]["corpus"] = run.recipe.domains[name].corpus
    for name, one in measured.items():
        rows = [(asked[i], r) for i, r in zip(one.asked, one.right, strict=True)]
        skills: dict[str, list[bool]] = defaultdict(list)
        for question, right in rows:
            if question.is_test and question.example.skill:
                skills[f"{question.domain}/{question.example.skill}"].append(bool(right))
        found.setdefault(name, {})["by_skill"] = {k: share(v) for k, v in sorted(skills.items())}
    return found


def _lineage(name: str, domains: Sequence[str]) -> str:
    if name in domains:
        return "cut from the base, then trained on its domain"
    return "the base, trained on" if name == FINETUNED else "a chunk's shape with fresh weights"


def _timings(run: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        (run.stages.folder("latency") / LATENCY_FILE).read_text()
    )["timings"]
    return found


def _compression(
    run: Run, systems: Mapping[str, System], timings: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the published compression laws say of such a cut, and what was measured."""
    base_parameters = num_parameters(run.base)
    removed = 1 - num_parameters(run.chunk(run.domains[0])) / base_parameters
    base = float(np.nanmean(systems[BASE].right_Q))
    routed = float(np.nanmean(systems[ORACLE].right_Q))
    alone = float(np.mean([np.nanmean(systems[domain].right_Q) for domain in run.domains]))
    by_name = {timing["name"]: timing["ms_per_token"] for timing in timings}
    billion = run.recipe.adapt.tokens / 1e9
    return {
        "removed_share": round(removed, 4),
        "base_accuracy": round(base, 4),
        "rows": [
            _row("accuracy, no recovery training", CompressionLaw.PUBLISHED.predict(base, removed),
                 alone, "a chunk on all domains"),
            _row("accuracy, with recovery training",
                 RecoveryLaw.PUBLISHED.predict(base, removed, billion), alone,
                 "a chunk on all domains; tokens in billions"),
            _row("accuracy, with recovery training",
                 RecoveryLaw.PUBLISHED.predict(base, removed, billion), routed,
                 "each chunk on its own domain"),
            _row("times faster", RuntimeLaw.PUBLISHED.speedup(removed),
                 by_name["base"] / by_name["chunk"], "one token at a time, batch 1"),
        ],
    }  # fmt: skip


def _row(what: str, predicted: float, measured: float, on: str) -> dict[str, Any]:
    return {
        "what": what,
        "on": on,
        "predicted": round(predicted, 4),
        "measured": round(measured, 4),
        "relative_error": round(predicted / measured - 1, 4) if measured else None,
    }


def _selection(run: Run, domain: str) -> dict[str, Any]:
    content = json.loads((run.stages.folder(f"select/{domain}") / SELECTION_FILE).read_text())
    return {
        "domain": domain,
        "kept": len(content["kept"]),
        "of": len(run.conversations(domain)),
        "switch": content["switch"],
        "trials": content["trials"],
    }
