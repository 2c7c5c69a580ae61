"""Assembles the pool: checkpoints with their cards, pool file, outcomes, laws and report."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from models.downscale.adapters import has_adapters
from models.downscale.answers import ENGINE_KIND, members_measured, outcomes
from models.downscale.chunks import BASE
from models.downscale.figures import collect
from models.downscale.laws import laws
from models.downscale.members import member
from models.downscale.policies import CASCADE_FILE, ROUTER_FILE, policies, policies_of, prices
from models.downscale.questions import questions
from models.downscale.report import all_tables, write_report
from models.downscale.stage import MARKS, Run, stage, write_json
from models.pool_text import as_yaml
from policies.laws.file import LAWS_FILE
from policies.outcomes import write_outcomes
from policies.pages import markdown
from policies.tables import markdown_table

OUTCOMES_FILE: Final = "outcomes.jsonl"
RESULTS_FILE: Final = "results.json"
TRAINING_FACTS: Final = "training.json"
_KV_MEMORY_BYTES: Final = 256 * 2**20
_HEADING: Final = "# Written by shoal downscale; prices are examples.\n"


@stage("pool")
def pool(run: Run, folder: Path) -> None:
    """Stage: the whole pool, ready to be moved to where it is served from."""
    figures, measured = collect(run), members_measured(run)
    write_json(folder / RESULTS_FILE, figures)
    sampled = run.recipe.sampled_members
    for name in measured:
        shutil.copytree(
            member(run, name),
            folder / name,
            ignore=shutil.ignore_patterns(*MARKS, *sampled),
            dirs_exist_ok=True,
        )
        facts = figures["models"][name]
        write_json(
            folder / name / TRAINING_FACTS, {k: v for k, v in facts.items() if k != "by_skill"}
        )
        (folder / name / "README.md").write_text(_member_card(name, figures))
    for name, domain in sampled.items():
        shutil.copytree(member(run, domain) / name, folder / name, dirs_exist_ok=True)
    write_outcomes(folder / OUTCOMES_FILE, outcomes(questions(run), measured))
    for source, names in (
        (laws(run), (LAWS_FILE,)),
        (policies(run), (ROUTER_FILE, CASCADE_FILE)),
    ):
        for name in names:
            if (source / name).exists():
                shutil.copy(source / name, folder / name)
    write_report(figures, folder)
    (folder / "README.md").write_text(_readme(run, figures))
    (folder / "pool.yaml").write_text(_HEADING + _pool_file(run))
    for file in folder.iterdir():
        if file.is_file():  # what was written through temporary files is private to its owner
            file.chmod(0o644)


def _pool_file(run: Run) -> str:
    adapters = has_adapters(run)
    engines = [
        {
            "name": name,
            "kind": ENGINE_KIND,
            "device": "auto",
            "dtype": "float32",
            "kv_memory_bytes": _KV_MEMORY_BYTES,
        }
        for name in ((BASE,) if adapters else ("chunks", BASE))
    ]
    priced, sampled = prices(run), run.recipe.sampled_members
    models = [
        {
            "name": name,
            **(
                {"base": BASE, "adapter": f"./{name}"}
                if adapters and name != BASE
                else {"checkpoint": name, "engine": BASE if name == BASE else "chunks"}
            ),
            "domains": list(run.domains) if name == BASE else [sampled.get(name, name)],
            "usd_per_million_input_tokens": priced[sampled.get(name, name)][0],
            "usd_per_million_output_tokens": priced[sampled.get(name, name)][1],
        }
        for name in (*priced, *sampled)
    ]
    content = {
        "name": run.recipe.name,
        "engines": engines,
        "models": models,
        "policies": policies_of(run)["specs"],
    }
    return as_yaml(content)


def _member_card(name: str, figures: Mapping[str, Any]) -> str:
    facts = figures["models"][name]
    lines = [f"# {name}", "", f"A member of the pool `{figures['pool']}`: {facts['lineage']}.", ""]
    rows = {"parameters": f"{facts['parameters']:,}"}
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
            "data": f"{facts['corpus']}, {training['examples']:,} examples, "
            f"{training['general_share']:.1%} general data",
            "tokens": f"{training['tokens']:,} in {training['num_steps']:,} steps",
            "distilled from": facts["taught_by"],
            "energy": f"{footprint['wh']} Wh ({footprint['method']})",
            "carbon": f"{footprint['operational_gco2e']} gCO2e operational, "
            f"{footprint['embodied_gco2e']} gCO2e embodied",
        }
    if (teacher := facts.get("teacher")) is not None:
        rows["energy of its teacher's training"] = f"{teacher['footprint']['wh']} Wh"
    [system] = [s for s in figures["systems"] if s["name"] == name]
    for domain, share in system.get("by_domain", {}).items():
        low, high = (100 * v for v in share["interval_95"])
        right = f"{100 * share['exact_match']:.1f}% [{low:.1f}, {high:.1f}]"
        rows[f"exact match, {domain}"] = f"{right} of {share['asked']} test questions"
    for domain, loss in system.get("loss_by_domain", {}).items():
        per_token = figures["losses"][name][domain]
        rows[f"loss, {domain}"] = f"{loss:.4f} nats per byte, {per_token:.4f} per token"
    return "\n".join([*lines, markdown_table([("", ""), *rows.items()])]) + "\n"


def _kind(run: Run) -> str:
    return "adapters of it" if has_adapters(run) else "chunks that were cut from it"


def _cell(text: str) -> str:
    """`text` as code in a table's cell."""
    return f"`{' '.join(text.split()).replace('`', chr(39)).replace('|', ' ')}`"


def _readme(run: Run, figures: Mapping[str, Any]) -> str:
    skip = {"Fitted laws"}
    tables = [markdown(table) for table in all_tables(figures) if table.title not in skip]
    examples = [("domain", "question, or beginning", "answer, or how it goes on")]
    seen: set[tuple[str, str | None]] = set()
    for question in questions(run):
        kind = question.domain, question.example.skill
        if question.is_test and kind not in seen and sum(d == kind[0] for d, _ in seen) < 3:
            seen.add(kind)
            asked, answer = _cell(question.text[-80:]), _cell(question.answer[:80])
            examples.append((question.domain, asked, answer))
    head = [
        f"# The pool `{figures['pool']}`",
        "",
        f"One base and {len(run.domains)} {_kind(run)}, each trained on its own "
        "domain, by `shoal downscale`. The whole report, with plots, is in "
        "[report.html](report.html); every figure is in `results.json`, every answer in "
        "`outcomes.jsonl`, the fitted laws in `laws.npz`.",
        "",
        "The models know the kinds of questions and texts below and nothing else, and answer "
        "anything else with confident nonsense.",
        "",
        "![Quality against compute](plots/quality-compute.png)",
        "",
        "![Fused loss against the number of members](plots/fused-loss.png)",
        "",
        "## What they can be asked",
        "",
        markdown_table(examples),
        "",
    ]
    return "\n".join(head) + "\n" + "\n".join(tables)
