"""Gated and contrastive fusion and weights by evidence, against separate transformers models."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.engines.base import Chunk, Engine, Evidence, GenerationRequest
from models.errors import RequestError
from tests.models.engines.stacked.tiny import (
    answer,
    build_engine,
    load_reference,
    request,
    save_checkpoint,
    token_ids,
)

PROMPT = tuple(range(5, 45))
MEMBERS = ("m0", "m1", "m2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three random checkpoints of one shape (seeds 0 to 2)."""
    root = tmp_path_factory.mktemp("members")
    return [save_checkpoint(root / f"m{seed}", seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def references(folders: list[Path]) -> list[Any]:
    """The same checkpoints in transformers."""
    return [load_reference(folder) for folder in folders]


def build(folders: list[Path], **options: Any) -> Engine:
    """An engine that splits the prompt over several steps."""
    return build_engine(folders, step_rows=24, **options)


def logprobs(reference: Any, tokens: list[int]) -> Tensor:
    """Log-probabilities after each of `tokens`, [T, V]."""
    with torch.inference_mode():
        result: Tensor = reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return result


def greedy(
    references: list[Any], num_tokens: int, fuse: Callable[[list[Tensor]], Tensor]
) -> tuple[list[int], list[float]]:
    """Generate greedily from `fuse` of the members' [T, V]; tokens and their log-probabilities."""
    tokens, values = list(PROMPT), []
    for _ in range(num_tokens):
        fused = fuse([logprobs(reference, tokens) for reference in references])
        token = int(fused.argmax())
        tokens.append(token)
        values.append(float(fused[token]))
    return tokens[len(PROMPT) :], values


def check(chunks: list[Chunk], expected: tuple[list[int], list[float]]) -> None:
    """The engine's tokens and log-probabilities are the reference's."""
    got = [token.logprob for chunk in chunks for token in chunk.tokens]
    assert token_ids(chunks) == expected[0]
    assert got == pytest.approx(expected[1], abs=1e-4)


def mixture(last: list[Tensor], weights: list[float]) -> Tensor:
    """log Σ w p."""
    return torch.logsumexp(torch.stack(last) + torch.tensor(weights).log()[:, None], 0)


def prompt_log_likelihoods(references: list[Any], tokens: list[int]) -> list[float]:
    """Each member's log-likelihood of all tokens but the first."""
    targets = torch.tensor(tokens[1:])
    return [
        float(logprobs(reference, tokens)[:-1].gather(1, targets[:, None]).sum())
        for reference in references
    ]


def softmax(values: list[float]) -> list[float]:
    """Normalised exponentials."""
    result: list[float] = torch.tensor(values, dtype=torch.float64).softmax(0).tolist()
    return result


@pytest.mark.parametrize("gate", [0.0, 0.08, 1.0])
def test_gated_fuses_only_where_the_lead_is_unsure(
    folders: list[Path], references: list[Any], gate: float
) -> None:
    """The lead's own distribution where its best token passes the gate, the mixture elsewhere.

    The lead is the first member named, not the engine's first.
    """
    used = []

    def fuse(members: list[Tensor]) -> Tensor:
        m0, m1, m2 = (member[-1] for member in members)
        sure = float(m2.max().exp()) >= gate
        used.append(sure)
        return m2 if sure else mixture([m2, m0, m1], [0.2, 0.5, 0.3])

    wanted = replace(
        request(PROMPT, ("m2", "m0", "m1"), weights=(0.2, 0.5, 0.3), rule="gated", max_tokens=9),
        gate=gate,
    )
    [chunks] = answer(build(folders), wanted)
    check(chunks, greedy(references, 9, fuse))
    assert set(used) == {0.0: {True}, 0.08: {True, False}, 1.0: {False}}[gate]


@pytest.mark.parametrize(("members", "contrast"), [(("m1", "m0"), 0.5), (("m2", "m1", "m0"), 1.5)])
def test_contrastive_is_expert_minus_anti_expert(
    folders: list[Path], references: list[Any], members: tuple[str, ...], contrast: float
) -> None:
    """Powers of the members' distributions over the tokens that the first finds plausible."""

    def fuse(every: list[Tensor]) -> Tensor:
        named = [every[int(name[1])][-1] for name in members]
        if len(named) == 2:
            score = (1 + contrast) * named[0] - contrast * named[1]
        else:
            score = named[0] + contrast * (named[1] - named[2])
        plausible = named[0].exp() >= 0.1 * named[0].exp().max()
        return torch.where(plausible, score, -1e4).log_softmax(-1)

    wanted = replace(
        request(PROMPT, members, rule="contrastive", max_tokens=9, top_logprobs=20),
        contrast=contrast,
    )
    [chunks] = answer(build(folders), wanted)
    check(chunks, greedy(references, 9, fuse))
    assert all(
        math.isfinite(top.logprob)
        for chunk in chunks
        for token in chunk.tokens
        for top in token.top
    )


@pytest.mark.parametrize("per_token", [False, True])
def test_the_prompt_is_evidence(
    folders: list[Path], references: list[Any], per_token: bool
) -> None:
    """Weights are prior · exp(prompt log-likelihood / T), chunked prefill or not, and reported."""
    temperature = 0.5 if per_token else 40.0
    totals = prompt_log_likelihoods(references, list(PROMPT))
    scale = temperature * (len(PROMPT) - 1 if per_token else 1)
    prior = (0.5, 0.3, 0.2)
    weights = softmax([math.log(p) + t / scale for p, t in zip(prior, totals, strict=True)])
    wanted = replace(
        request(PROMPT, MEMBERS, weights=prior, max_tokens=8),
        evidence=Evidence(temperature=temperature, per_token=per_token),
    )
    for engine in (build(folders), build_engine(folders)):
        [chunks] = answer(engine, wanted)
        check(chunks, greedy(references, 8, lambda m: mixture([one[-1] for one in m], weights)))
        assert chunks[-1].weights == pytest.approx(weights, abs=1e-4)
        assert all(chunk.weights is None for chunk in chunks[:-1])


@pytest.mark.parametrize("temperature", [1.0, 40.0])
def test_a_prompt_is_scored_as_its_evidence_comes(
    folders: list[Path], references: list[Any], temperature: float
) -> None:
    """Each token has the mixture by what came before it; at 1, all have the members' mixture."""
    prior = torch.tensor((0.5, 0.3, 0.2))
    targets = torch.tensor(PROMPT[1:])[:, None]
    said_MT = torch.stack(
        [logprobs(one, list(PROMPT))[:-1].gather(1, targets)[:, 0] for one in references]
    )
    before_MT = said_MT.cumsum(1) - said_MT
    weights_MT = (prior.log()[:, None] + before_MT / temperature).softmax(0)
    expected = torch.logsumexp(weights_MT.log() + said_MT, 0)
    wanted = replace(
        request(PROMPT, MEMBERS, weights=(0.5, 0.3, 0.2), max_tokens=2, prompt_logprobs=0),
        evidence=Evidence(temperature=temperature),
    )
    for engine in (build(folders), build_engine(folders)):
        [chunks] = answer(engine, wanted)
        first, *rest = [token.logprob for token in chunks[0].prompt]
        assert first is None
        assert rest == pytest.approx(expected.tolist(), abs=1e-3)
    if temperature == 1:
        whole = torch.logsumexp(prior.log() + said_MT.sum(1), 0)
        assert sum(rest) == pytest.approx(float(whole), abs=1e-2)


def test_evidence_goes_on_with_the_answer(folders: list[Path], references: list[Any]) -> None:
    """With `update`, each generated token moves the weights like a token of the prompt."""
    temperature = 25.0
    seen: list[list[float]] = []

    def fuse(members: list[Tensor]) -> Tensor:
        # All tokens so far are evidence, those of the answer included.
        totals = prompt_log_likelihoods(references, tokens)
        seen.append(softmax([total / temperature for total in totals]))
        return mixture([member[-1] for member in members], seen[-1])

    tokens = list(PROMPT)
    expected: list[int] = []
    for _ in range(8):
        fused = fuse([logprobs(reference, tokens) for reference in references])
        expected.append(int(fused.argmax()))
        tokens.append(expected[-1])
    wanted = replace(
        request(PROMPT, MEMBERS, max_tokens=8),
        evidence=Evidence(temperature=temperature, update=True),
    )
    [chunks] = answer(build(folders), wanted)
    assert token_ids(chunks) == expected
    final = softmax([t / temperature for t in prompt_log_likelihoods(references, tokens)])
    assert chunks[-1].weights == pytest.approx(final, abs=1e-4)
    assert seen[0] != pytest.approx(final, abs=1e-3)


def test_every_way_to_fuse_shares_a_batch(folders: list[Path]) -> None:
    """Requests of all rules, leads and weightings in one batch get their solo answers."""

    def wanted() -> list[GenerationRequest]:
        base = request(PROMPT, MEMBERS, max_tokens=10)
        return [
            request(PROMPT[:7], ("m1",), max_tokens=10),
            replace(base, request_id="g", rule="gated", gate=0.08, members=("m2", "m1")),
            replace(base, request_id="c", rule="contrastive", members=("m2", "m0")),
            replace(base, request_id="e", evidence=Evidence(temperature=30.0, update=True)),
            replace(base, request_id="p", rule="product", weights=(0.0, 1.0, 3.0)),
            replace(base, request_id="m", evidence=Evidence(per_token=True), weights=(1, 0, 1)),
        ]

    solo = [answer(build(folders), one)[0] for one in wanted()]
    together = answer(build(folders), *wanted())
    assert [token_ids(chunks) for chunks in together] == [token_ids(chunks) for chunks in solo]
    for one, other in zip(solo, together, strict=True):
        assert one[-1].weights == pytest.approx(other[-1].weights, abs=1e-4)


def test_weights_follow_the_requests_order(folders: list[Path]) -> None:
    """Reported weights stand in the order in which the request names its members."""
    wanted = request(PROMPT, ("m2", "m0", "m1"), weights=(6, 0, 2), max_tokens=2)
    [chunks] = answer(build(folders), wanted)
    assert chunks[-1].weights == pytest.approx((0.75, 0.0, 0.25))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "contrastive", "members": ("m0",)}, "needs two members"),
        ({"rule": "contrastive", "members": ("m0", "m1"), "weights": (1, 1)}, "takes no weights"),
        ({"gate": 1.5}, r"gate: 1.5 is not in \[0, 1\]"),
        ({"evidence": Evidence(temperature=0.0)}, "temperature: 0.0"),
    ],
)
def test_senseless_fusions_are_refused(
    folders: list[Path], changes: dict[str, Any], message: str
) -> None:
    """What is wrong with the request stands in the error."""
    with pytest.raises(RequestError, match=message):
        answer(build(folders), replace(request(PROMPT, MEMBERS), **changes))
