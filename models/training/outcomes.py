"""What every model of a pool answers to fixed held-out questions, and how often it is right.

Writes `outcomes.jsonl` (one object per question, for training and judging routers) and
`results.json` (exact match per model and domain, on the test split only).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from models.tasks import DOMAINS, Split, Task, check
from models.training.generate import Completion, complete, log_probability_facts
from models.training.statistics import wilson_interval

OUTCOMES: Final = "outcomes.jsonl"
RESULTS: Final = "results.json"
SAMPLE_SEED: Final = 2026
SAMPLE_SIZES: Final = {Split.ROUTER: 800, Split.TEST: 400}


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A task and every model's completion, by model name."""

    task: Task
    completions: Mapping[str, Completion]


def measure_pool(
    models: Mapping[str, LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
    *,
    out: Path,
    report: Callable[[str], None],
    sizes: Mapping[Split, int] = SAMPLE_SIZES,
) -> None:
    """Ask all models all questions and write both files into `out`."""
    tasks = [
        task
        for split, size in sizes.items()
        for domain in DOMAINS.values()
        for task in domain.distinct(split, size, seed=SAMPLE_SEED)
    ]
    questions = [task.question for task in tasks]
    answers: dict[str, list[Completion]] = {}
    for name, model in models.items():
        answers[name] = complete(model, tokenizer, questions)
        report(f"{name}: answered {len(questions)} held-out questions")
    asked = [
        Asked(task=task, completions={name: answers[name][i] for name in models})
        for i, task in enumerate(tasks)
    ]
    lines = [json.dumps(_outcome(i, a), separators=(",", ":")) for i, a in enumerate(asked)]
    (out / OUTCOMES).write_text("\n".join(lines) + "\n")
    results = _results(asked, list(models))
    (out / RESULTS).write_text(json.dumps(results, indent=1) + "\n")


def _outcome(index: int, asked: Asked) -> dict[str, Any]:
    task, by_model = asked.task, asked.completions
    first = next(iter(by_model.values()))
    return {
        "id": f"{task.split}-{index}",
        "query": task.question,
        "tags": [task.domain],
        "split": str(task.split),
        "answer": task.answer,
        "scores": {name: int(check(task.answer, c.text)) for name, c in by_model.items()},
        "outputs": {name: c.text for name, c in by_model.items()},
        "logprobs": {name: log_probability_facts(c) for name, c in by_model.items()},
        "prompt_tokens": first.num_prompt_tokens,
        "output_tokens": {name: len(c.log_probabilities) for name, c in by_model.items()},
    }


def _results(asked: list[Asked], names: list[str]) -> dict[str, Any]:
    tests = [a for a in asked if a.task.split is Split.TEST]
    results: dict[str, Any] = {"split": "test", "exact_match": {}, "by_skill": {}}
    for name in names:
        right = [(a.task, check(a.task.answer, a.completions[name].text)) for a in tests]
        results["exact_match"][name] = {
            domain: _share([ok for task, ok in right if task.domain == domain])
            for domain in DOMAINS
        }
        skills = dict.fromkeys(f"{task.domain}/{task.skill}" for task, _ in right)
        results["by_skill"][name] = {
            skill: _share([ok for task, ok in right if f"{task.domain}/{task.skill}" == skill])
            for skill in sorted(skills)
        }
    return results


def _share(right: list[bool]) -> dict[str, Any]:
    low, high = wilson_interval(sum(right), len(right))
    return {
        "right": sum(right),
        "asked": len(right),
        "exact_match": round(sum(right) / len(right), 4),
        "interval_95": [round(low, 4), round(high, 4)],
    }
