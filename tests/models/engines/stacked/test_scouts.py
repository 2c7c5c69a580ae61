"""Leads of another shape: a speculative cascade has the tokens of running everybody everywhere."""

import asyncio
import json
import random
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from models.answer_format import PLAIN
from models.engines.answer_grammar import answer_grammar, compile_answer
from models.engines.base import Chunk, Engine, Evidence, GenerationRequest, Structure
from models.engines.stacked.cache import BLOCK_TOKENS
from models.engines.stacked.fusion import Fusion, fuse
from models.engines.stacked.runner import Runner
from models.engines.stacked.sampler import Grammar, SamplerState, draw
from models.errors import EngineFailed, PoolError, RequestError
from tests.models.engines.stacked.tiny import (
    END,
    VOCAB_SIZE,
    answer,
    build_engine,
    build_tokenizer,
    load_reference,
    read,
    request,
    running,
    save_checkpoint,
    token_ids,
)

LEADS = ("m2", "m3")
PROMPT = list(range(20, 20 + 3 * BLOCK_TOKENS))
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two random checkpoints of one shape, and two of another, sure of some tokens."""
    root = tmp_path_factory.mktemp("scouts")
    small: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
    return [
        *(save_checkpoint(root / f"{seed}", seed=seed) for seed in range(2)),
        *(
            save_checkpoint(root / f"s{s}", seed=s, initializer_range=0.4, **small)
            for s in range(2)
        ),
    ]


@pytest.fixture(scope="module", name="references")
def loaded(folders: list[Path]) -> dict[str, Any]:
    """The same in transformers, by name."""
    return {f"m{i}": load_reference(folder) for i, folder in enumerate(folders)}


def build(folders: list[Path], **options: Any) -> Engine:
    """An engine of two members, with two leads of another shape."""
    return build_engine(folders, leads=LEADS, **options)


def led(
    prompt: Seq[int], members: Seq[str] = ("m2", "m0"), *, gate: float, **options: Any
) -> GenerationRequest:
    """A request whose lead writes where it is sure; with two members a speculative cascade."""
    options.setdefault("weights", (0.0, *[1.0] * (len(members) - 1)))
    return replace(request(prompt, members, rule="gated", **options), gate=gate)


def everybody(references: dict[str, Any], wanted: GenerationRequest) -> list[tuple[int, float]]:
    """Tokens and log-probabilities, where all compute every token and are fused."""
    weights = tuple(w / sum(wanted.weights or ()) for w in wanted.weights or ())
    fusion, tokens = Fusion("gated", weights, 0, wanted.gate), list(wanted.prompt_tokens)
    state = SamplerState(
        wanted.sampling,
        grammar_of(wanted),
        random.Random(wanted.sampling.seed),
        prompt=wanted.prompt_tokens,
        ends=[END],
    )
    said: list[tuple[int, float]] = []
    while len(said) < wanted.sampling.max_tokens:
        with torch.inference_mode():
            rows = [references[n](torch.tensor([tokens])).logits[0, -1] for n in wanted.members]
        drawn = draw(
            fuse(torch.stack(rows).log_softmax(-1), [list(range(len(rows)))], [fusion]), [state]
        )
        [token] = drawn.token_ids
        tokens.append(token)
        said.append((token, drawn.logprobs[0]))
        if state.accept(token) or token == END:
            break
    return said


def grammar_of(wanted: GenerationRequest) -> Grammar | None:
    """The grammar of an answer that has a form."""
    grammar = answer_grammar(wanted, PLAIN, lambda mark: mark, opened=False)
    if grammar is None:
        return None
    tokenizer = LLTokenizer(build_tokenizer().to_str(), n_vocab=VOCAB_SIZE, eos_token=[END])
    return Grammar(compile_answer(tokenizer, grammar, wanted))


def told(chunks: Seq[Chunk]) -> list[tuple[int, float]]:
    """Tokens and log-probabilities of an answer."""
    tokens = [token for chunk in chunks for token in chunk.tokens]
    return [(token.token_id, token.logprob or 0.0) for token in tokens]


requests = st.builds(
    led,
    st.lists(st.integers(2, VOCAB_SIZE - 1), min_size=1, max_size=50),
    st.sampled_from([("m2", "m0"), ("m3", "m0"), ("m2", "m1", "m0")]),
    gate=st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]),
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
    top_p=st.sampled_from([1.0, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    min_tokens=st.sampled_from([0, 8]),
    structure=st.sampled_from([None, None, Structure(kind="json", text=json.dumps(SCHEMA))]),
    logit_bias=st.sampled_from([{}, {7: 5.0}]),
    seed=st.integers(0, 99),
    max_tokens=st.integers(1, 20),
)


# Shrinking would run into the test's time limit.
@settings(max_examples=15, phases=[Phase.explicit, Phase.generate])
@given(
    wanted=st.lists(requests, min_size=1, max_size=5),
    rows=st.sampled_from([120, 4000]),
    step_rows=st.sampled_from([8, 2048]),
)
def test_tokens_are_those_of_computing_everybody_at_every_token(
    folders: list[Path],
    references: dict[str, Any],
    wanted: list[GenerationRequest],
    rows: int,
    step_rows: int,
) -> None:
    """Greedy or drawn with a seed, whatever gate, penalties, biases and grammars, in one batch,
    with room for all or for one at a time: what transformers, fused, says of every token.
    """
    engine = build(folders, step_rows=step_rows, kv_memory_bytes=rows * 2 * 2 * 2 * 16 * 4 * 2)
    for one, chunks in zip(wanted, answer(engine, *wanted), strict=True):
        expected = everybody(references, one)
        assert [token for token, _ in told(chunks)] == [token for token, _ in expected]
        said, due = ([logprob for _, logprob in tokens] for tokens in (told(chunks), expected))
        assert said == pytest.approx(due, abs=1e-3)


@pytest.fixture(name="steps")
def counted_steps(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[tuple[int, int]]]:
    """Tokens and guesses of each part of each step, by the model's number of layers."""
    steps: dict[int, list[tuple[int, int]]] = {1: [], 2: []}
    step = Runner.step

    def counting(self: Runner, parts: Any) -> Any:
        steps[self.architecture.shape.num_layers].extend(
            (part.num_tokens, len(part.draft)) for part in parts
        )
        return step(self, parts)

    monkeypatch.setattr(Runner, "step", counting)
    return steps


def asked(engine: Engine, wanted: GenerationRequest, steps: Any) -> tuple[list[Chunk], int, int]:
    """Answer, counting steps from then on; also the tokens led, and those with others."""

    async def run() -> tuple[list[Chunk], int, int]:
        async with running(engine):
            for counted in steps.values():
                counted.clear()
            chunks = await read(engine, wanted)
            assert engine.stats().kv_bytes_used == 0
            return chunks, engine.stats().gated_tokens_total, engine.stats().fused_tokens_total

    return asyncio.run(run())


def test_a_sure_lead_runs_alone(folders: list[Path], steps: Any) -> None:
    """With a gate that it always passes the others compute nothing, and nobody pays for them."""
    wanted = led(PROMPT, gate=0.0, max_tokens=5, ignore_eos=True)
    chunks, num_led, num_fused = asked(build(folders), wanted, steps)
    assert (num_led, num_fused) == (5, 0)
    assert (steps[1], steps[2]) == ([(len(PROMPT), 0), *[(1, 0)] * 4], [])
    assert chunks[-1].followed == (0, 0)
    assert chunks[-1].weights == (0.0, 1.0)


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A model of two layers whose second changes nothing, and the same without that."""
    root = tmp_path_factory.mktemp("twins")
    two = save_checkpoint(root / "two", initializer_range=0.9)
    one = save_checkpoint(root / "one", num_hidden_layers=1)
    weights = load_file(two / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.1.{name}.weight"].zero_()
        weights.get(f"model.layers.1.{name}.bias", torch.zeros(1)).zero_()
    save_file(weights, two / "model.safetensors", {"format": "pt"})
    kept = {name: value for name, value in weights.items() if ".layers.1." not in name}
    save_file(kept, one / "model.safetensors", {"format": "pt"})
    return [two, one]


def test_guesses_are_checked_several_at_a_time(twins: list[Path], steps: Any) -> None:
    """A lead that is right though never sure: who follows it reads every token once, in half as
    many steps, and what is not guessed twice is not computed twice.
    """
    wanted = led(PROMPT, ("m1", "m0"), gate=1.0, max_tokens=40, ignore_eos=True)
    chunks, num_led, num_fused = asked(build_engine(twins, leads=("m1",)), wanted, steps)
    assert (num_led, num_fused) == (40, 40)
    assert sum(num_tokens for num_tokens, _ in steps[2]) == len(PROMPT) + 39
    assert sum(num_tokens for num_tokens, _ in steps[1]) == len(PROMPT) + 39
    assert len(steps[2]) < 20
    assert chunks[-1].followed == (len(PROMPT), 40)
    alone = answer(build_engine(twins[:1]), request(PROMPT, max_tokens=40, ignore_eos=True))
    assert token_ids(chunks) == token_ids(alone[0])


def distributions(model: Any, tokens: Seq[int]) -> NDArray[np.float64]:
    """What transformers says of each next token of a text, [T, V], as probabilities."""
    with torch.inference_mode():
        logits_TV = model(torch.tensor([list(tokens)])).logits[0]
    return np.asarray(logits_TV.double().softmax(-1))


@pytest.mark.parametrize(
    ("members", "weights"),
    [(("m2", "m0"), (0.0, 1.0)), (("m3", "m1", "m0"), (0.5, 0.2, 0.3))],
)
@pytest.mark.parametrize("options", [{}, {"step_rows": 8}], ids=["whole", "in chunks"])
def test_a_text_is_scored_as_it_would_be_drawn(
    folders: list[Path],
    references: dict[str, Any],
    members: tuple[str, ...],
    weights: tuple[float, ...],
    options: dict[str, Any],
) -> None:
    """Each token of a prompt, and of the answer, by the lead where its likeliest token passes the
    gate, else by the mixture; whoever else is in the batch.
    """
    text = [*PROMPT, *(5, 9, 7, 200, 31, 32) * 4]
    said_MTV = np.stack([distributions(references[name], text) for name in members])
    sure_T1 = said_MTV[0].max(-1, keepdims=True)
    wanted, expected = [], []
    for gate in (0.0, float(np.median(sure_T1)), 1.0):
        fused_TV = np.where(sure_T1 >= gate, said_MTV[0], np.tensordot(weights, said_MTV, 1))
        expected.append(np.log(fused_TV[np.arange(len(text) - 1), text[1:]]))
        one = led(text, members, gate=gate, weights=weights, prompt_logprobs=2, max_tokens=2)
        wanted.append(one)
    beside = led(PROMPT, gate=0.5), request(PROMPT, ("m1",), prompt_logprobs=0)
    answers = answer(build(folders, **options), *wanted, *beside)
    for one, chunks, due in zip(wanted, answers, expected, strict=False):
        prompt = [token for chunk in chunks for token in chunk.prompt]
        assert [token.token_id for token in prompt] == text
        assert prompt[0].logprob is None
        assert [token.logprob for token in prompt[1:]] == pytest.approx(due.tolist(), abs=1e-3)
        assert all(len(token.top) == 2 for token in prompt[1:])
        tokens, logprobs = zip(*told(chunks), strict=True)
        drawn, said = zip(*everybody(references, one), strict=True)
        assert tokens == drawn
        assert logprobs == pytest.approx(said, abs=1e-3)
        num_read, num_written = chunks[-1].followed or (0, 0)
        assert num_read + num_written >= len(text)


def test_leads_find_the_prefixes_that_they_have(folders: list[Path]) -> None:
    """A later turn starts from what the lead computed, and who follows it from what it did."""
    later = [*PROMPT, *range(100, 120)]

    async def turns(engine: Engine) -> list[list[Chunk]]:
        async with running(engine):
            return [
                await read(engine, led(prompt, gate=1.0, max_tokens=4, ignore_eos=True))
                for prompt in (PROMPT, later)
            ]

    kept, computed = (
        asyncio.run(turns(build(folders, prefix_cache=keeps))) for keeps in (True, False)
    )
    assert [token_ids(one) for one in kept] == [token_ids(one) for one in computed]
    assert [one[-1].cached_tokens for one in kept] == [0, len(PROMPT)]


def test_a_lead_that_fails_takes_nobody_along(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a lead's step raises, its request fails; those beside it are answered."""
    step = Runner.step
    bad, good = led(PROMPT, gate=0.5), led(PROMPT, gate=0.5, seed=1)

    def failing(self: Runner, parts: Any) -> Any:
        if any(part.sequence.request.request_id == bad.request_id for part in parts):
            raise ArithmeticError("the lead failed")
        return step(self, parts)

    monkeypatch.setattr(Runner, "step", failing)

    async def run() -> list[Any]:
        async with running(build(folders)) as engine:
            both = (read(engine, one) for one in (bad, good, led(PROMPT, gate=0.5, seed=2)))
            return await asyncio.gather(*both, return_exceptions=True)

    failed, *answered = asyncio.run(run())
    assert isinstance(failed, EngineFailed)
    assert all(one[-1].finish_reason for one in answered)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (request(PROMPT, ("m2",)), "'m2' is unknown"),
        (request(PROMPT, ("m2", "m0")), "'m2' is unknown"),
        (led(PROMPT, ("m0", "m2"), gate=0.5), "'m2' is unknown"),
        (led(PROMPT, ("m2", "m3"), gate=0.5), "'m3' is unknown"),
        (replace(led(PROMPT, gate=0.5), evidence=Evidence()), "evidence: m2 leads"),
    ],
)
def test_leads_do_nothing_else(
    folders: list[Path], wanted: GenerationRequest, message: str
) -> None:
    """A lead answers nothing alone, fuses by no other rule, and follows nobody."""
    with pytest.raises(RequestError, match=message):
        answer(build(folders), wanted)


def test_leads_of_another_vocabulary_are_refused(folders: list[Path], tmp_path: Path) -> None:
    """By name, before anything is loaded."""
    strange = save_checkpoint(tmp_path / "strange", num_hidden_layers=1, vocab_size=VOCAB_SIZE + 8)
    with pytest.raises(PoolError, match=r"tiny.leads: 'm1' has another vocabulary"):
        build_engine([folders[0], strange], leads=("m1",))
