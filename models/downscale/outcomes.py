"""Measured answers as outcomes: what routers, cascades and scorers are trained and judged on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from models.downscale.measure import Measured
from models.downscale.questions import Question
from policies.outcomes import Outcome
from policies.outcomes.base import AnswerLogprobs


def outcomes(asked: Sequence[Question], measured: Mapping[str, Measured]) -> list[Outcome]:
    """One outcome per question, with every model of `measured`, all of which were asked all."""
    found = []
    for i, question in enumerate(asked):
        answers = {name: one.answers[i] for name, one in measured.items()}
        found.append(
            Outcome(
                id=f"{question.example.split}-{i}",
                query=question.text,
                tags=(question.domain,),
                split=str(question.example.split),
                answer=question.answer,
                scores={name: float(answer["right"]) for name, answer in answers.items()},
                outputs={name: answer["text"] for name, answer in answers.items()},
                logprobs={
                    name: AnswerLogprobs(**answer["logprobs"]) for name, answer in answers.items()
                },
                prompt_tokens=next(iter(answers.values()))["prompt_tokens"],
                output_tokens={name: answer["output_tokens"] for name, answer in answers.items()},
            )
        )
    return found
