"""The fused ensemble inside real vLLM answers what it must: the `stacked` engine's tokens, and
those of transformers with the fusion rules as the papers have them."""

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from tests.models.engines.stacked.tiny import answer, build_engine, request, token_ids
from tests.vllm import fused_world
from tests.vllm.fused_world import Ask, Reference, World, generate, random_prompt, vllm_engine

CASES = [("llama", 2), ("qwen3", 4), ("llama", 8), ("qwen3", 2), ("llama", 4), ("qwen3", 8)]
OTHER_ARCHITECTURES = [("mistral", 2), ("qwen2", 2), ("llama3-rope", 2)]


@pytest.fixture(
    scope="module", params=[*CASES, *OTHER_ARCHITECTURES], ids=lambda case: f"{case[0]}-{case[1]}"
)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Members and their folder."""
    kind, num_members = request.param
    return fused_world.make_world(tmp_path_factory.mktemp("world"), kind, num_members)


@pytest.fixture(scope="module")
def llm(world: World) -> Iterator[Any]:
    """One vLLM engine per world."""
    with vllm_engine(world.folder) as engine:
        yield engine


def _asks(world: World) -> list[Ask]:
    """Prompts of different lengths, one longer than a step, each with other weights (seed 1)."""
    rng, m = random.Random(1), len(world.members)
    return [
        Ask(prompt=random_prompt(rng, 3)),
        Ask(prompt=random_prompt(rng, 90)),
        Ask(prompt=random_prompt(rng, 40), weights=[1.0] + [0.0] * (m - 1)),
        Ask(prompt=random_prompt(rng, 17), weights=[0.0] * (m - 1) + [2.0]),
        Ask(prompt=random_prompt(rng, 7), weights=[0.0, *range(1, m)]),
        Ask(prompt=random_prompt(rng, 100), weights=[5.0, 3.0] + [0.1] * (m - 2)),
        Ask(prompt=random_prompt(rng, 21), weights=[2.0, 1.0] + [0.0] * (m - 2), rule="product"),
        Ask(prompt=random_prompt(rng, 5), weights=[1.0] * m, rule="product"),
    ]


def test_greedy_tokens(world: World, llm: Any) -> None:
    """In one batch, chunked prefill and decode mixed, every request gets the tokens of the
    transformers reference and of the `stacked` engine, for its own weights (zeros too) and rule;
    again from the prefix cache."""
    asks, reference = _asks(world), Reference(world)
    expected = [reference.answer(ask) for ask in asks]
    first = generate(llm, asks)
    assert fused_world.token_ids(first) == expected
    again = generate(llm, asks)
    assert fused_world.token_ids(again) == expected
    # The long prompts fill whole blocks of the cache.
    assert max(output.num_cached_tokens for output in again) >= 32
    engine = build_engine(world.members)
    wanted = [
        request(
            ask.prompt,
            engine.members,
            weights=None if ask.weights is None else tuple(ask.weights),
            rule=ask.rule,
            max_tokens=fused_world.MAX_TOKENS,
            ignore_eos=True,
        )
        for ask in asks
    ]
    assert [token_ids(chunks) for chunks in answer(engine, *wanted)] == expected


def test_logprobs_are_the_fused_ones(world: World, llm: Any) -> None:
    """The log-probability of a token is that under the fused distribution."""
    asks, reference = _asks(world), Reference(world)
    for ask, output in zip(asks, generate(llm, asks, max_tokens=1, logprobs=1), strict=True):
        [entry] = output.outputs[0].logprobs
        weights = ask.weights or [1.0] * len(world.members)
        fused_V = reference.fuse(reference.logp_MTV(ask.prompt)[:, -1], weights, ask.rule)
        for token, got in entry.items():
            assert got.logprob == pytest.approx(float(fused_V[token]), abs=2e-3)


@pytest.mark.parametrize("kind", ["sum", "mean"])
def test_evidence(world: World, llm: Any, kind: str) -> None:
    """Weights from the prompt's log-probabilities are w_m ∝ prior_m · exp(l_m / T), over several
    steps of prefill, beside other requests, and although the prompt is in the prefix cache."""
    from vllm import SamplingParams

    rng, m, reference = random.Random(2), len(world.members), Reference(world)
    prompts = [random_prompt(rng, num_tokens) for num_tokens in (9, 120, 2, 1)]
    prior = [2.0] + [1.0] * (m - 1)
    temperature = 8.0 if kind == "sum" else 0.2
    extra_args = {
        "shoal_weights": prior,
        "shoal_evidence": kind,
        "shoal_evidence_temperature": temperature,
    }
    for _ in range(2):
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in [*prompts, [7] * 30]],
            [
                *[SamplingParams(max_tokens=1, logprobs=1, extra_args=extra_args)] * len(prompts),
                SamplingParams(max_tokens=1),
            ],
            use_tqdm=False,
        )
        for prompt, output in zip(prompts, outputs[:-1], strict=True):
            logp_MTV = reference.logp_MTV(prompt)
            following = torch.tensor(prompt[1:], dtype=torch.long)
            heard_MT = logp_MTV[:, range(len(following)), following]
            heard_M = heard_MT.sum(-1) if kind == "sum" else heard_MT.mean(-1).nan_to_num()
            weights_M = (torch.tensor(prior).log() + heard_M / temperature).softmax(0)
            fused_V = reference.fuse(logp_MTV[:, -1], weights_M.tolist(), "mixture")
            for token, got in output.outputs[0].logprobs[0].items():
                assert got.logprob == pytest.approx(float(fused_V[token]), abs=5e-3)


class TestOneEngine:
    """What need not be repeated for every shape."""

    @pytest.fixture(scope="class")
    def world(self, tmp_path_factory: pytest.TempPathFactory) -> World:
        """Three Llamas."""
        return fused_world.make_world(tmp_path_factory.mktemp("world"), "llama", 3)

    @pytest.fixture(scope="class")
    def llm(self, world: World) -> Iterator[Any]:
        """One engine."""
        with vllm_engine(world.folder) as engine:
            yield engine

    def test_plain_chunk(self, world: World, llm: Any) -> None:
        """A member alone answers as its own checkpoint does in transformers."""
        prompt = random_prompt(random.Random(3), 11)
        for index, folder in enumerate(world.members):
            alone = Reference(World(members=[folder], folder=world.folder))
            weights = [float(place == index) for place in range(3)]
            [output] = generate(llm, [Ask(prompt=prompt, weights=weights)])
            assert list(output.outputs[0].token_ids) == alone.answer(Ask(prompt=prompt))

    @pytest.mark.parametrize("rule", ["mixture", "product"])
    def test_samples_follow_the_fused_distribution(self, world: World, llm: Any, rule: str) -> None:
        """1,000 samples (the engine's seed, 0): χ² finds no difference from the distribution."""
        from vllm import SamplingParams

        reference = Reference(world)
        ask = Ask(prompt=random_prompt(random.Random(4), 6), weights=[1.0, 0.0, 3.0], rule=rule)
        fused_V = reference.fuse(reference.logp_MTV(ask.prompt)[:, -1], [1.0, 0.0, 3.0], rule)
        outputs = llm.generate(
            [{"prompt_token_ids": ask.prompt}] * 1000,
            SamplingParams(max_tokens=1, extra_args=ask.extra_args),
            use_tqdm=False,
        )
        counts = Counter(output.outputs[0].token_ids[0] for output in outputs)
        expected = (fused_V.exp() * 1000).tolist()
        often = [token for token, times in enumerate(expected) if times >= 5]
        assert len(often) >= 5
        observed_n = [counts[token] for token in often]
        expected_n = [expected[token] for token in often]
        test = chisquare(
            [*observed_n, 1000 - sum(observed_n)],
            [*expected_n, 1000 - sum(expected_n)],
            sum_check=False,
        )
        assert test.pvalue > 0.001

    def test_32_concurrent_requests(self, world: World, llm: Any) -> None:
        """32 requests at once (seed 5), each with its own weights, members and rule, come and go at
        different times and get the `stacked` engine's tokens."""
        from vllm import SamplingParams

        rng = random.Random(5)
        engine = build_engine(world.members)
        wanted, prompts, sampling = [], [], []
        for _ in range(32):
            prompt, num_tokens = random_prompt(rng, rng.randint(1, 80)), rng.randint(1, 20)
            members = rng.sample(engine.members, rng.randint(1, 3))
            weights = tuple(rng.randint(1, 9) for _ in members)
            rule = rng.choice(["mixture", "product"])
            prompts.append({"prompt_token_ids": prompt})
            sampling.append(
                SamplingParams(
                    temperature=0,
                    max_tokens=num_tokens,
                    ignore_eos=True,
                    extra_args={
                        "shoal_members": members,
                        "shoal_weights": list(weights),
                        "shoal_rule": rule,
                    },
                )
            )
            wanted.append(
                request(
                    prompt,
                    members,
                    weights=weights,
                    rule=rule,
                    max_tokens=num_tokens,
                    ignore_eos=True,
                )
            )
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        expected = [token_ids(chunks) for chunks in answer(engine, *wanted)]
        assert fused_world.token_ids(outputs) == expected

    def test_refusals(self, llm: Any) -> None:
        """Bad arguments are refused, and the engine goes on."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        for sampling in (
            {"extra_args": {"shoal_weights": [1]}},
            {"extra_args": {"shoal_members": ["m9"]}},
        ):
            with pytest.raises(VLLMValidationError, match="shoal_"):
                llm.generate([{"prompt_token_ids": [5]}], SamplingParams(**sampling))
        assert len(generate(llm, [Ask(prompt=[5])])) == 1

    def test_prompt_logprobs_are_the_fused_ones(self, world: World, llm: Any) -> None:
        """Every request's prompt is scored by its own weights and rule, over several steps and
        beside others; where weights follow the prompt, each token under what came before it."""
        from vllm import SamplingParams

        rng, reference = random.Random(6), Reference(world)
        asks = [
            Ask(prompt=random_prompt(rng, 70)),
            Ask(prompt=random_prompt(rng, 90), weights=[5.0, 1.0, 0.0]),
            Ask(prompt=[9, 8, 7], weights=[1.0, 0.0, 0.0]),
            Ask(prompt=random_prompt(rng, 20), weights=[1.0, 2.0, 3.0], rule="product"),
            Ask(prompt=random_prompt(rng, 1), weights=[0.0, 1.0, 0.0]),
        ]
        evidence = {"shoal_evidence": "sum", "shoal_evidence_temperature": 4.0}
        told = [(ask, ask.extra_args) for ask in asks]
        told += [(ask, {**(ask.extra_args or {}), **evidence}) for ask in asks]
        told.append((Ask(prompt=random_prompt(rng, 12), weights=[0.0, 0.0, 1.0]), None))
        outputs = llm.generate(
            [{"prompt_token_ids": ask.prompt} for ask, _ in told],
            [SamplingParams(max_tokens=3, prompt_logprobs=2, extra_args=args) for _, args in told],
            use_tqdm=False,
        )
        for (ask, args), output in zip(told, outputs, strict=True):
            logp_MTV = reference.logp_MTV(ask.prompt)
            prior_M = torch.tensor((args or {}).get("shoal_weights", [1.0] * 3)).double()
            heard_M = torch.zeros(3, dtype=torch.float64)
            for place in range(1, len(ask.prompt)):
                weights_M = (
                    (prior_M.log() + heard_M / 4).softmax(0)
                    if "shoal_evidence" in (args or {})
                    else prior_M
                )
                fused_V = reference.fuse(logp_MTV[:, place - 1], weights_M.tolist(), ask.rule)
                for token, got in output.prompt_logprobs[place].items():
                    assert got.logprob == pytest.approx(float(fused_V[token]), abs=5e-3)
                heard_M += logp_MTV[:, place - 1, ask.prompt[place]]
