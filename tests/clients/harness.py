"""How the tests run lm-evaluation-harness, the same way for a server and for checkpoints."""

import math
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

POOL = Path("models/pools/default")
TASKS = Path(__file__).parent / "tasks"
MEMBERS = (
    *("arithmetic", "stories", "conversion", "numerals", "dates", "text", "lists", "code"),
    "base",
)
PAIR = ("arithmetic", "code")


def evaluated(model: Any, *tasks: str) -> dict[str, Any]:
    """Return by task its accuracy, and by question what the model was asked and said.

    It says the log-likelihood of each choice, or the answer's text. All tasks by default.
    """
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks or ("pool_choices", "pool_answers")),
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        apply_chat_template=True,
        log_samples=True,
        bootstrap_iters=0,
        random_seed=0,
    )
    assert found is not None
    return {
        task: {
            "accuracy": next(
                value
                for name, value in found["results"][task].items()
                if name.split(",")[0] in ("acc", "exact_match")
            ),
            "asked": [sample["arguments"] for sample in samples],
            "said": [_said(sample["resps"]) for sample in samples],
        }
        for task, samples in found["samples"].items()
    }


def _said(responses: list[Any]) -> Any:
    """Return what a sample holds: one text, or a log-likelihood per choice."""
    first = [response[0] for response in responses]
    if isinstance(first[0], str):
        return first[0]
    values = [float(value) for value, _ in first]
    assert all(map(math.isfinite, values))
    return values
