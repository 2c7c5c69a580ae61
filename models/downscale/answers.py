"""What every model makes of the held-out questions: its own answers, and the right ones' odds.

Each model is measured once, as it ships and as it is served: by the engine that the pool names,
through the checkpoint's own chat template, greedily, and fusion is the engine's. Everything else
(losses of all subsets, accuracy of routes, fits) is arithmetic on what is stored here.

Shapes: `Q` questions, `M` members, `T` answer tokens (padded with NaN).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from models.adapter import ADAPTER_CONFIG
from models.card import read_card
from models.downscale.chunks import BASE, load_model
from models.downscale.members import base_of, member
from models.downscale.questions import Question, questions
from models.downscale.stage import Run, progress_bar, read_json, remembered, stage, write_json
from models.engines.base import Chunk, Engine, GenerationRequest, SamplingOptions
from models.engines.registry import create_engine
from models.engines.requests import fusion_of
from models.pool import load_adapter
from models.spec import EngineSpec, Model, ModelSpec
from models.tasks.base import check
from models.tokenizer import CheckpointTokenizer
from models.training.data import Conversation
from models.training.forward import Scorer, target_log_probabilities
from policies.outcomes import AnswerLogprobs, Outcome
from policies.plan import Answer

ENGINE_KIND: Final = "stacked"
_NUM_AT_ONCE: Final = 64


@dataclass(frozen=True, kw_only=True)
class Written:
    """A greedy answer: its text, and what its tokens' probabilities tell of it."""

    text: str
    logprobs: AnswerLogprobs
    num_prompt_tokens: int


def ask(
    checkpoints: Mapping[str, Path],
    asked: Sequence[tuple[str | tuple[int, ...], Answer]],
    *,
    max_new_tokens: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Written]:
    """Answer each query of `asked` by its plan, in order.

    A query is a question, which the chat template is put around, or the tokens of a whole prompt.
    `checkpoints` are the members' folders by name; they share tokenizer and shape, or are one base
    and its adapters. `progress` is told of every answer.

    Raises:
        PoolError: the engine does not take a checkpoint.
    """
    spec = EngineSpec(
        name="measured", kind=ENGINE_KIND, dtype="float32", max_queued_requests=_NUM_AT_ONCE
    )
    models = _models(checkpoints, spec)
    folder = models[0].tokenizer
    assert folder is not None
    tokenizer, card = CheckpointTokenizer(folder), read_card(folder)

    def request(number: int, query: str | tuple[int, ...], plan: Answer) -> GenerationRequest:
        if isinstance(query, str):
            query = tokenizer.encode_chat([{"role": "user", "content": query}])
        max_tokens = min(max_new_tokens, card.context_tokens - len(query))
        return GenerationRequest(
            request_id=f"question-{number}",
            prompt_tokens=query,
            **fusion_of(plan),
            sampling=SamplingOptions(temperature=0.0, max_tokens=max_tokens),
        )

    requests = [request(number, *one) for number, one in enumerate(asked)]
    return asyncio.run(_ask(create_engine(spec, models), requests, progress))


def _models(checkpoints: Mapping[str, Path], spec: EngineSpec) -> list[Model]:
    """The models in `checkpoints`, their base first where some are adapters."""
    adapters = {n: path for n, path in checkpoints.items() if (path / ADAPTER_CONFIG).exists()}
    models = [
        Model(
            spec=ModelSpec(name=name, engine=spec.name, checkpoint=str(folder)),
            card=read_card(folder),
            tokenizer=folder,
        )
        for name, folder in checkpoints.items()
        if name not in adapters
    ]
    bases = {model.name: model for model in models}
    return models + [
        load_adapter(
            ModelSpec(name=name, engine=spec.name, base=models[0].name, adapter=str(folder)),
            bases,
            folder=folder,
            where=name,
        )
        for name, folder in adapters.items()
    ]


async def _ask(
    engine: Engine, requests: Sequence[GenerationRequest], progress: Callable[[int], None]
) -> list[Written]:
    slots = asyncio.Semaphore(_NUM_AT_ONCE)

    async def one(request: GenerationRequest) -> Written:
        async with slots, aclosing(engine.generate(request)) as stream:  # type: ignore[type-var]
            chunks = [chunk async for chunk in stream]
        progress(1)
        return _written(request, chunks)

    await engine.start()
    try:
        return await asyncio.gather(*map(one, requests))
    finally:
        await engine.stop()


def _written(request: GenerationRequest, chunks: Sequence[Chunk]) -> Written:
    tokens = [token for chunk in chunks for token in chunk.tokens]
    logprobs = [token.logprob or 0.0 for token in tokens]
    entropies = [token.entropy or 0.0 for token in tokens]
    return Written(
        text="".join(chunk.text for chunk in chunks),
        logprobs=AnswerLogprobs(
            mean=round(sum(logprobs) / len(logprobs), 3),
            min=round(min(logprobs), 3),
            num_tokens=len(logprobs),
            entropy=round(max(sum(entropies) / len(entropies), 0.0), 3),
        ),
        num_prompt_tokens=len(request.prompt_tokens),
    )


Floats = NDArray[np.float64]

_ANSWERS, _ODDS = "answers.json", "odds.npz"


def score(asked: Sequence[Question], written: Sequence[Written], nll_Q: Floats) -> Floats:
    """How good each answer is, in [0, 1]: 1 if it is the right one, 0 if not; where the loss is
    measured, e^(-nats per byte), as the grader `loss` has it. [Q]

    `nll_Q` are the right answers' negative log-likelihoods, in nats.
    """
    return np.array(
        [
            np.exp(-nll / len(question.answer.encode()))
            if question.by_loss
            else float(check(question.answer, one.text))
            for question, one, nll in zip(asked, written, nll_Q, strict=True)
        ]
    )


def summary(asked: Sequence[Question], score_Q: Floats) -> str:
    """Scores of the test's questions in words."""
    pairs = [(one, value) for one, value in zip(asked, score_Q, strict=True) if one.is_test]
    right = [value for one, value in pairs if not one.by_loss]
    losses = [-np.log(value) for one, value in pairs if one.by_loss]
    parts = [f"{np.mean(right):.1%} of {len(right)} test questions right"] if right else []
    parts += [f"{np.mean(losses):.4f} nats per byte on {len(losses)} test texts"] if losses else []
    return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """The answers that a model or a fusion wrote to all questions, and how good each is, [Q]."""

    written: tuple[Written, ...]
    score_Q: Floats


@dataclass(frozen=True, kw_only=True)
class Measured(Answered):
    """One model on all questions.

    `answer_QT` are the log-probabilities of the right answers' tokens, `prompt_Q` of the prompts,
    in nats.
    """

    name: str
    answer_QT: Floats
    prompt_Q: Floats

    @property
    def losses(self) -> Floats:
        """Nats per answer token of each question, [Q]."""
        loss: Floats = -np.nanmean(self.answer_QT, axis=1)
        return loss


@stage("measure")
def measure(run: Run, folder: Path, name: str) -> None:
    """Stage: a member's answers to all questions."""
    base = base_of(run, name)
    measure_model(run, folder, name, member(run, name), questions(run), base=base)


def measure_model(
    run: Run,
    folder: Path,
    name: str,
    checkpoint: Path,
    asked: Sequence[Question],
    *,
    base: Path | None = None,
) -> None:
    """Ask the model in `checkpoint`, or the adapter of `base` there, all of `asked`, and write what
    it says into `folder`."""
    scorer = Scorer(load_model(checkpoint, base=base), row_tokens=run.recipe.adapt.row_tokens)
    checkpoints = {name: checkpoint} if base is None else {BASE: base, name: checkpoint}
    conversations = [question.conversation for question in asked]
    logs = [found for (found,) in scorer.map(conversations, target_log_probabilities)]
    answer_QT, prompt_Q = _odds(conversations, logs)
    np.savez(folder / _ODDS, answer=answer_QT, prompt=prompt_Q)
    with progress_bar(len(asked), f"measure/{name}", unit="questions") as advance:
        written = tuple(
            ask(
                checkpoints,
                [(question.prompt, Answer(members=(name,))) for question in asked],
                max_new_tokens=run.recipe.measure.max_new_tokens,
                progress=advance,
            )
        )
    score_Q = score(asked, written, -np.nansum(answer_QT, axis=1))
    write_json(folder / _ANSWERS, answered_to_json(Answered(written=written, score_Q=score_Q)))
    run.report(f"measure/{name}: {summary(asked, score_Q)}")


@remembered
def measured(run: Run, name: str) -> Measured:
    """What the stage stored of a member."""
    return read_measured(name, measure(run, name))


def members_measured(run: Run) -> dict[str, Measured]:
    """What was stored of the chunks, and of the base, which comes last."""
    return {name: measured(run, name) for name in (*run.domains, BASE)}


def read_measured(name: str, folder: Path) -> Measured:
    """Read what `measure_model` wrote."""
    answered = answered_from_json(read_json(folder / _ANSWERS))
    with np.load(folder / _ODDS, allow_pickle=False) as arrays:
        return Measured(
            name=name,
            written=answered.written,
            score_Q=answered.score_Q,
            answer_QT=arrays["answer"],
            prompt_Q=arrays["prompt"],
        )


def answer_odds(members: Sequence[Measured]) -> Floats:
    """The members' log-probabilities of the right answers' tokens, [Q, T, M]."""
    return np.stack([member.answer_QT for member in members], axis=-1)


def prompt_odds(members: Sequence[Measured]) -> Floats:
    """The members' log-likelihoods of the prompts, [Q, M]."""
    return np.stack([member.prompt_Q for member in members], axis=-1)


def outcomes(asked: Sequence[Question], answered: Mapping[str, Answered]) -> list[Outcome]:
    """One outcome per question: what routers, cascades and scorers are trained and judged on."""
    return [_outcome(number, question, answered) for number, question in enumerate(asked)]


def _outcome(number: int, question: Question, answered: Mapping[str, Answered]) -> Outcome:
    written = {name: one.written[number] for name, one in answered.items()}
    scores = {name: float(one.score_Q[number]) for name, one in answered.items()}
    grades: dict[str, dict[str, float]] = {}
    if question.by_loss:
        grades = {"loss": {name: float(np.log(score)) for name, score in scores.items()}}
    return Outcome(
        id=f"{question.example.split}-{number}",
        query=question.text,
        tags=(question.domain,),
        split=str(question.example.split),
        answer=question.answer,
        scores=scores,
        outputs={name: one.text for name, one in written.items()},
        logprobs={name: one.logprobs for name, one in written.items()},
        prompt_tokens=next(iter(written.values())).num_prompt_tokens,
        output_tokens={name: one.logprobs.num_tokens for name, one in written.items()},
        format=2 if question.by_loss else 1,
        grades=grades,
    )


def _odds(
    conversations: Sequence[Conversation], logs: Sequence[NDArray[Any]]
) -> tuple[Floats, Floats]:
    """Log-probabilities of the answers' tokens [Q, T] and of the prompts [Q], in nats."""
    answers, prompts = [], []
    for conversation, values in zip(conversations, logs, strict=True):
        is_answer = np.asarray(conversation.is_answer[1:], bool)
        answers.append(values[:-1][is_answer])
        prompts.append(float(values[:-1][~is_answer].sum()))
    padded = np.full((len(answers), max(map(len, answers))), np.nan)
    for row, found in zip(padded, answers, strict=True):
        row[: len(found)] = found
    return padded, np.array(prompts)


def answered_to_json(answered: Answered) -> dict[str, Any]:
    """What `answered_from_json` reads."""
    answers = [asdict(one) for one in answered.written]
    return {"answers": answers, "scores": answered.score_Q.tolist()}


def answered_from_json(content: Mapping[str, Any]) -> Answered:
    """What `answered_to_json` made JSON of."""
    written = TypeAdapter(tuple[Written, ...]).validate_python(content["answers"])
    return Answered(written=written, score_Q=np.array(content["scores"]))
