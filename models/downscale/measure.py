"""What every model makes of the held-out questions: its own answers, and the right ones' odds.

Each model is measured as it ships, in bf16-rounded weights, once; everything else (losses of all
subsets, accuracy of routes, fits) is arithmetic on what is stored here.

Shapes: `Q` questions, `M` members, `T` answer tokens (padded with NaN).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from models.downscale.baselines import FINETUNED, MERGED, SCRATCH
from models.downscale.progress import progress_bar
from models.downscale.questions import Question, questions, texts
from models.downscale.run import Run, load_chunk
from models.downscale.stage import write_json
from models.tasks import check
from models.training.generate import Completion, complete, log_probability_facts
from models.training.score import Scorer, target_log_probabilities

Floats = NDArray[np.float64]

BASE: Final = "base"
_ANSWERS, _ODDS = "answers.json", "odds.npz"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model on the questions `asked` (indices into all of them).

    `right` says whether its greedy answer is right; `answers` holds text, token count and
    log-probability features. `answer_QT` are the log-probabilities of the right answers' tokens,
    `prompt_Q` of the prompts, in nats; a fused model has none.
    """

    name: str
    asked: NDArray[np.int64]
    right: NDArray[np.bool_]
    answers: list[dict[str, Any]]
    answer_QT: Floats | None
    prompt_Q: Floats | None

    @property
    def losses(self) -> Floats:
        """Nats per answer token of each question, [Q]."""
        assert self.answer_QT is not None
        loss: Floats = -np.nanmean(self.answer_QT, axis=1)
        return loss


def run_measurements(run: Run, *, upstream: Sequence[str]) -> list[str]:
    """Stages "measure/<model>"; returns the names of the models that were measured.

    Chunks are called like their domains, from-scratch chunks "scratch-<domain>"; those are asked
    the questions of their own domain only.
    """
    asked = questions(run)
    everything = list(range(len(asked)))
    tests = [i for i in everything if asked[i].is_test]
    models: dict[str, tuple[Callable[[], PreTrainedModel], list[int], list[str]]] = {
        BASE: (run.fresh_base, everything, ["base"])
    }
    for domain in run.domains:
        load: Callable[[], PreTrainedModel] = partial(run.chunk, domain)
        models[domain] = (load, everything, [f"adapt/{domain}"])
    wanted = run.recipe.baselines
    for name in (FINETUNED, *MERGED):
        if name in wanted:
            stage = f"baselines/{name}"
            models[name] = (partial(load_chunk, run.stages.folder(stage)), tests, [stage])
    if SCRATCH in wanted:
        for domain in run.domains:
            own = [i for i in tests if asked[i].domain == domain]
            stage = f"baselines/{SCRATCH}/{domain}"
            load = partial(load_chunk, run.stages.folder(stage))
            models[f"{SCRATCH}-{domain}"] = (load, own, [stage])
    for name, (load, indices, needs) in models.items():
        _measure(run, name, asked, indices, load=load, upstream=[*needs, *upstream])
    return list(models)


def read_measured(run: Run, names: Sequence[str]) -> dict[str, Measured]:
    """What the stages stored."""
    return {name: _read(run.stages.folder(f"measure/{name}"), name) for name in names}


def measure_settings(run: Run) -> dict[str, Any]:
    """What all measurements of a run depend on."""
    return {"measure": run.recipe.measure.model_dump(), "row_tokens": run.recipe.adapt.row_tokens}


def _measure(
    run: Run,
    name: str,
    asked: Sequence[Question],
    indices: list[int],
    *,
    load: Callable[[], PreTrainedModel],
    upstream: Sequence[str],
) -> None:
    def action(folder: Path) -> None:
        model = as_shipped(load())
        mine = [asked[i] for i in indices]
        scorer = Scorer(model, row_tokens=run.recipe.adapt.row_tokens)
        conversations = [question.conversation for question in mine]
        logs = [found for (found,) in scorer.map(conversations, target_log_probabilities)]
        answer_QT, prompt_Q = odds(conversations, logs)
        np.savez(folder / _ODDS, answer=answer_QT, prompt=prompt_Q)
        with progress_bar(len(mine), f"measure/{name}", unit="questions") as advance:
            completions = complete(
                model,
                run.tokenizer,
                texts(mine),
                max_new_tokens=run.recipe.measure.max_new_tokens,
                progress=advance,
            )
        write_measured(run, name, folder, indices=indices, asked=mine, completions=completions)

    run.stages.run(f"measure/{name}", action, settings=measure_settings(run), upstream=upstream)


def as_shipped(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its weights rounded to bf16 in place, still in fp32 for arithmetic."""
    with torch.no_grad():
        # Not model.to: that would round the rotary embedding's frequencies too.
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return model


def odds(conversations: Sequence[Any], logs: Sequence[NDArray[Any]]) -> tuple[Floats, Floats]:
    """Log-probabilities of the answers' tokens [Q, T] and of the prompts [Q], in nats."""
    answers, prompts_found = [], []
    for conversation, values in zip(conversations, logs, strict=True):
        is_answer = np.asarray(conversation.is_answer[1:], bool)
        answers.append(values[:-1][is_answer])
        prompts_found.append(float(values[:-1][~is_answer].sum()))
    longest = max(map(len, answers))
    padded = np.full((len(answers), longest), np.nan)
    for row, found in zip(padded, answers, strict=True):
        row[: len(found)] = found
    return padded, np.array(prompts_found)


def answer_odds(members: Mapping[str, Measured]) -> Floats:
    """The members' log-probabilities of the right answers' tokens, [Q, T, M]."""
    columns = [member.answer_QT for member in members.values()]
    assert all(column is not None for column in columns)
    return np.stack([column for column in columns if column is not None], axis=-1)


def prompts(members: Mapping[str, Measured]) -> Floats:
    """The members' log-likelihoods of the prompts, [Q, M]."""
    columns = [member.prompt_Q for member in members.values()]
    return np.stack([column for column in columns if column is not None], axis=-1)


def write_measured(
    run: Run,
    name: str,
    folder: Path,
    *,
    indices: Sequence[int],
    asked: Sequence[Question],
    completions: Sequence[Completion],
) -> None:
    """Store a model's answers in its stage's `folder`, and say how many are right."""
    answers = [
        {
            "right": check(question.answer, completion.text),
            "text": completion.text,
            "prompt_tokens": completion.num_prompt_tokens,
            "output_tokens": len(completion.log_probabilities),
            "logprobs": log_probability_facts(completion),
        }
        for question, completion in zip(asked, completions, strict=True)
    ]
    write_json(folder / _ANSWERS, {"asked": list(indices), "answers": answers})
    tests = [answer for question, answer in zip(asked, answers, strict=True) if question.is_test]
    share = sum(bool(answer["right"]) for answer in tests) / len(tests)
    run.report(f"measure/{name}: {share:.1%} of {len(tests)} test questions right")


def _read(folder: Path, name: str) -> Measured:
    content = json.loads((folder / _ANSWERS).read_text())
    answer_QT: Floats | None = None
    prompt_Q: Floats | None = None
    if (folder / _ODDS).exists():
        with np.load(folder / _ODDS, allow_pickle=False) as arrays:
            answer_QT, prompt_Q = arrays["answer"], arrays["prompt"]
    return Measured(
        name=name,
        asked=np.array(content["asked"], np.int64),
        right=np.array([answer["right"] for answer in content["answers"]], bool),
        answers=content["answers"],
        answer_QT=answer_QT,
        prompt_Q=prompt_Q,
    )
