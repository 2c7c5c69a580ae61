"""Assembles the pool: checkpoints with their cards, pool file, outcomes, laws and report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from transformers import PreTrainedModel

from models.downscale.figures import collect
from models.downscale.fuse import read_calibration
from models.downscale.laws import LAWS
from models.downscale.measure import BASE, read_measured
from models.downscale.outcomes import outcomes
from models.downscale.questions import questions
from models.downscale.report import markdown, write_report
from models.downscale.routing import ROUTER_FILE, ROUTING
from models.downscale.run import Run
from models.downscale.stage import write_json
from models.downscale.tables import all_tables
from models.training.export import export_checkpoint
from policies.laws.file import LAWS_FILE
from policies.outcomes import write_outcomes

POOL: Final = "pool"
OUTCOMES_FILE: Final = "outcomes.jsonl"
RESULTS_FILE: Final = "results.json"
TRAINING_FACTS: Final = "training.json"
_KV_MEMORY_BYTES: Final = 256 * 2**20
# The base's price; a chunk costs its share of the base's parameters.
_USD_PER_MILLION_INPUT_TOKENS: Final = 0.04
_USD_PER_MILLION_OUTPUT_TOKENS: Final = 0.12
# Asking the base instead of a chunk must promise about seven more right answers in a hundred.
_ANSWER_VALUE_USD: Final = 0.00001
_HEADING: Final = "# Written by shoal downscale; prices are examples.\n"


def write_pool(
    run: Run,
    names: Sequence[str],
    *,
    routed: bool,
    variants: Sequence[str],
    upstream: Sequence[str],
) -> Path:
    """Stage "pool": returns the folder in which the whole pool stands.

    `names` are the models that were measured, `variants` the stages of the comparisons.
    """

    def action(folder: Path) -> None:
        figures = collect(run, names, routed=routed, variants=variants)
        write_json(folder / RESULTS_FILE, figures)
        for name in (*run.domains, BASE):
            model = run.fresh_base() if name == BASE else run.chunk(name)
            _write_member(run, name, model, figures, folder / name)
        rows = outcomes(questions(run), read_measured(run, [*run.domains, BASE]))
        write_outcomes(folder / OUTCOMES_FILE, rows)
        shutil.copy(run.stages.folder(LAWS) / LAWS_FILE, folder / LAWS_FILE)
        if routed:
            shutil.copy(run.stages.folder(ROUTING) / ROUTER_FILE, folder / ROUTER_FILE)
        write_report(figures, folder)
        (folder / "README.md").write_text(_readme(run, figures))
        (folder / "pool.yaml").write_text(_HEADING + _pool_file(run, figures, routed=routed))
        for file in folder.iterdir():
            if file.is_file():  # what was written through temporary files is private to its owner
                file.chmod(0o644)

    facts: dict[str, Any] = {"name": run.recipe.name, "measured": list(names), "routed": routed}
    facts["compare"] = run.recipe.compare
    files = [Path(file) for file in run.recipe.compare.values() if Path(file).is_file()]
    return run.stages.run(POOL, action, settings=facts, files=files, upstream=upstream)


def _write_member(
    run: Run, name: str, model: PreTrainedModel, figures: Mapping[str, Any], folder: Path
) -> None:
    export_checkpoint(model.to(torch.bfloat16), run.tokenizer, folder)  # type: ignore[arg-type]
    facts = figures["models"][name]
    write_json(folder / TRAINING_FACTS, {k: v for k, v in facts.items() if k != "by_skill"})
    (folder / "README.md").write_text(_member_card(run, name, figures))


def _pool_file(run: Run, figures: Mapping[str, Any], *, routed: bool) -> str:
    engines = [
        {
            "name": name,
            "kind": "stacked",
            "device": "auto",
            "dtype": "float32",
            "kv_memory_bytes": _KV_MEMORY_BYTES,
        }
        for name in ("chunks", BASE)
    ]
    parameters = {name: figures["models"][name]["parameters"] for name in (*run.domains, BASE)}
    models = [
        {
            "name": name,
            "checkpoint": name,
            "engine": BASE if name == BASE else "chunks",
            "domains": list(run.domains) if name == BASE else [name],
            "usd_per_million_input_tokens": round(
                _USD_PER_MILLION_INPUT_TOKENS * count / parameters[BASE], 4
            ),
            "usd_per_million_output_tokens": round(
                _USD_PER_MILLION_OUTPUT_TOKENS * count / parameters[BASE], 4
            ),
        }
        for name, count in parameters.items()
    ]
    content = {
        "name": run.recipe.name,
        "engines": engines,
        "models": models,
        "policies": _policies(run, routed=routed),
    }
    return yaml.safe_dump(content, sort_keys=False)


def _policies(run: Run, *, routed: bool) -> dict[str, Any]:
    """The learned router by default, and all chunks fused; without a router, the base."""
    evidence = read_calibration(run, "routed" if routed else "evidence")
    answer = {
        "members": list(run.domains),
        "weights": "evidence",
        "temperature": round(evidence["temperature"], 4),
    }
    if not routed:
        fixed = {"kind": "fixed", "plan": {"answer": {"members": [BASE]}}}
        return {"auto": fixed, "fused": {"kind": "fixed", "plan": {"answer": answer}}}
    learned = {
        "kind": "learned",
        "path": ROUTER_FILE,
        "answer_value_usd": _ANSWER_VALUE_USD,
        "fallback": BASE,
    }
    chunks = {"kind": "learned", "path": ROUTER_FILE, "members": list(run.domains)}
    fused = {
        "kind": "fused",
        "answer": answer,
        "prior_power": round(evidence["prior_power"], 4),
        "router": chunks,
    }
    return {"auto": learned, "fused": fused}


def _member_card(run: Run, name: str, figures: Mapping[str, Any]) -> str:
    facts = figures["models"][name]
    config = json.loads(json.dumps(run.base.config.to_dict(), default=str))
    lines = [f"# {name}", "", f"A member of the pool `{figures['pool']}`: {facts['lineage']}.", ""]
    rows = {"parameters": f"{facts['parameters']:,}", "architecture": config["model_type"]}
    cut = facts.get("cut")
    if cut:
        shape = ", ".join(f"{key} {value}" for key, value in cut["shape"].items())
        rows |= {
            "shape": shape,
            "base": f"{cut['base_parameters']:,} parameters, in `../base`",
            "pruned": f"{cut['pruned_share']:.1%} of the base; its layers {cut['layers']} are kept",
        }
    training = facts.get("training")
    if training:
        footprint = facts["footprint"]
        rows |= {
            "data": f"{facts.get('corpus', 'all domains')}, "
            f"{facts.get('training_examples', 0):,} examples, "
            f"{training.get('general_share', 0):.1%} general data",
            "tokens": f"{training['tokens']:,} in {training['num_steps']:,} steps",
            "distilled from": "the base",
            "energy": f"{footprint['wh']} Wh ({footprint['method']})",
            "carbon": f"{footprint['operational_gco2e']} gCO2e operational, "
            f"{footprint['embodied_gco2e']} gCO2e embodied",
        }
    [system] = [s for s in figures["systems"] if s["name"] == name]
    for domain, share in system["by_domain"].items():
        low, high = (100 * v for v in share["interval_95"])
        right = f"{100 * share['exact_match']:.1f}% [{low:.1f}, {high:.1f}]"
        rows[f"exact match, {domain}"] = f"{right} of {share['asked']} test questions"
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    return "\n".join(lines) + "\n"


def _readme(run: Run, figures: Mapping[str, Any]) -> str:
    skip = {"Fitted laws"}
    tables = [markdown(table) for table in all_tables(figures) if table.title not in skip]
    examples = ["| domain | question | answer |", "|---|---|---|"]
    seen: set[tuple[str, str | None]] = set()
    for question in questions(run):
        kind = question.domain, question.example.skill
        if question.is_test and kind not in seen and sum(d == kind[0] for d, _ in seen) < 3:
            seen.add(kind)
            examples.append(f"| {question.domain} | `{question.text}` | `{question.answer}` |")
    head = [
        f"# The pool `{figures['pool']}`",
        "",
        f"One base and {len(run.domains)} chunks that were cut from it, each trained on its own "
        "domain, by `shoal downscale`. The whole report, with plots, is in "
        "[report.html](report.html); every figure is in `results.json`, every answer in "
        "`outcomes.jsonl`, the fitted laws in `laws.npz`.",
        "",
        "The models know the kinds of questions below and nothing else: they hold no facts, and "
        "answer anything else with confident nonsense.",
        "",
        "![Quality against compute](plots/quality-compute.png)",
        "",
        "![Fused loss against the number of members](plots/fused-loss.png)",
        "",
        "## What they can be asked",
        "",
        *examples,
        "",
    ]
    return "\n".join(head) + "\n" + "\n".join(tables)
