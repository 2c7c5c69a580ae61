"""Members with different tokenizers fuse at text boundaries, as transformers models would."""

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models

from models.engines.base import Chunk, Structure
from models.errors import RequestError
from models.pool import load_pool
from policies.errors import PolicyError
from policies.plan import from_json
from router.catalog.catalog import load_catalog
from router.executor.executor import Executor
from router.executor.task import Prompt
from router.executor.trace import Trace, tokens_of
from router.executor.union import Opinion, fuse_strings
from tests.models.engines.stacked.tiny import load_reference, save_checkpoint
from tests.router.executor.running import chunks_of, executor_of, task_of, workers_of

PROMPT = "the quick brown fox says hello"
STEPS = 8


def other_tokenizer() -> Tokenizer:
    """A byte-level BPE with other merges and ids than the tiny checkpoints' own."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a fox, quickly: helloo worldly brownish thee 77"] * 9, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two random checkpoints with different tokenizers (seeds 3 and 4)."""
    root = tmp_path_factory.mktemp("pool")
    made = [save_checkpoint(root / name, seed=seed) for name, seed in (("m", 3), ("n", 4))]
    (made[1] / "tokenizer.json").write_text(other_tokenizer().to_str())
    return made


@pytest.fixture(scope="module")
def executor(folders: list[Path]) -> Iterator[tuple[Executor, asyncio.AbstractEventLoop]]:
    """Each checkpoint in its own stacked engine, and the loop that they run on."""
    content = {
        "name": "p",
        "engines": [
            {"name": f"e{f.name}", "kind": "stacked", "device": "cpu", "kv_memory_bytes": 2**22}
            for f in folders
        ],
        "models": [{"name": f.name, "engine": f"e{f.name}", "checkpoint": f.name} for f in folders],
    }
    file = folders[0].parent / "pool.yaml"
    file.write_text(yaml.safe_dump(content))
    pool = load_pool(file)
    loop = asyncio.new_event_loop()
    with ExitStack() as stack:
        stack.callback(loop.close)
        workers = workers_of(pool)
        for worker in workers.values():
            loop.run_until_complete(worker.start())
            stack.callback(lambda worker: loop.run_until_complete(worker.stop()), worker)
        executor = executor_of(pool, workers)
        yield executor, loop


def run(
    executor: tuple[Executor, asyncio.AbstractEventLoop],
    answer: dict[str, Any],
    *,
    prompt: Prompt | None = None,
    max_tokens: int = STEPS,
    **sampling: Any,
) -> tuple[list[Chunk], Trace]:
    """Run an answer of both members on the prompt."""
    its, loop = executor
    plan = from_json({"answer": answer})
    trace = Trace()
    sampling = {"temperature": 0.0, **sampling}
    task = task_of(PROMPT, prompt=prompt, max_tokens=max_tokens, stream=True, **sampling)
    return loop.run_until_complete(chunks_of(its, plan, task, trace)), trace


def members_of(folders: list[Path]) -> list[tuple[Any, Tokenizer]]:
    """The members as transformers and the tokenizers library read them."""
    return [
        (load_reference(folder), Tokenizer.from_file(str(folder / "tokenizer.json")))
        for folder in folders
    ]


def union_of(
    members: list[tuple[Any, Tokenizer]],
    reads: list[list[int]],
    weights: list[float],
    *,
    product: bool,
) -> dict[str, float]:
    """What UniTE makes of the next string after what each member `reads`, not normalised."""
    distributions = []
    for (model, tokenizer), ids in zip(members, reads, strict=True):
        with torch.inference_mode():
            logp = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        top = logp.topk(20)
        named: dict[str, float] = {}
        for token, value in zip(top.indices.tolist(), top.values.tolist(), strict=True):
            string = tokenizer.decode([token])
            if "\ufffd" not in string:
                named.setdefault(string, value)
        left = 1 - float(top.values.exp().sum())
        distributions.append((named, math.log(left / (tokenizer.get_vocab_size() - 20))))
    union = {string for named, _ in distributions for string in list(named)[:10]}
    scores = {}
    for string in union:
        logs = []
        for (named, rest), (_, tokenizer) in zip(distributions, members, strict=True):
            first = tokenizer.decode(tokenizer.encode(string).ids[:1])
            logs.append(named.get(string, named.get(first, rest)))
        if product:
            scores[string] = sum(w * log for w, log in zip(weights, logs, strict=True))
        else:
            mixed = sum(w * math.exp(log) for w, log in zip(weights, logs, strict=True))
            scores[string] = math.log(mixed)
    return scores


def reference(folders: list[Path], weights: list[float], *, product: bool) -> tuple[str, float]:
    """UniTE with transformers and the tokenizers library: the text, and its log-likelihood."""
    members, text, likelihood = members_of(folders), "", 0.0
    for _ in range(STEPS):
        reads = [t.encode(PROMPT).ids + t.encode(text).ids for _, t in members]
        scores = union_of(members, reads, weights, product=product)
        total = math.log(sum(math.exp(score) for score in scores.values()))
        best = max(scores, key=lambda string: scores[string])
        text += best
        likelihood += scores[best] - total
        if not best:
            break
    return text, likelihood


@pytest.mark.parametrize("rule", ["mixture", "product"])
def test_two_tokenizers_fuse_as_their_models_would(
    executor: Any, folders: list[Path], rule: str
) -> None:
    """The greedy text and its log-likelihood equal those of a reference on transformers."""
    one, two = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in folders)
    assert one.encode(PROMPT).ids != two.encode(PROMPT).ids
    answer = {"members": ["m", "n"], "weights": [1, 2], "rule": rule}
    chunks, trace = run(executor, answer)
    text, likelihood = reference(folders, [1 / 3, 2 / 3], product=rule == "product")
    assert "".join(chunk.text for chunk in chunks) == text
    got = sum(token.logprob for chunk in chunks for token in chunk.tokens)
    assert got == pytest.approx(likelihood, abs=1e-3)
    assert chunks[-1].finish_reason is not None
    assert trace.runs[""].weights == pytest.approx((1 / 3, 2 / 3))
    assert tokens_of(trace.leaves())["n"].output_tokens == len(chunks)


def test_a_seed_repeats_the_answer(executor: Any) -> None:
    """Sampling is reproducible, and other seeds give other answers."""
    answer = {"members": ["m", "n"]}
    texts = [
        "".join(chunk.text for chunk in run(executor, answer, temperature=1.5, seed=seed)[0])
        for seed in (1, 1, 2, 3)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_nothing_is_drawn_where_nothing_is_wanted(executor: Any) -> None:
    """An answer of no tokens ends at once: its client has its own prompt echoed."""
    [chunk], _ = run(executor, {"members": ["m", "n"]}, max_tokens=0)
    assert (chunk.text, chunk.tokens, chunk.finish_reason) == ("", (), "length")


def test_a_stop_string_ends_the_answer(executor: Any) -> None:
    """Text from the stop string on is not shown."""
    whole = "".join(chunk.text for chunk in run(executor, {"members": ["m", "n"]})[0])
    stop = whole[2:4]
    chunks, _ = run(executor, {"members": ["m", "n"]}, stop=(stop,))
    assert "".join(chunk.text for chunk in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].finish_reason == "stop"


def scored_by_parts(
    folders: list[Path], fuse: Callable[[list[float]], float]
) -> list[tuple[str, float | None]]:
    """The prompt in the strings that both tokenizers have whole, with what `fuse` makes of the
    likelihoods that transformers says the two members have of each."""
    ends, sums = [], []
    for folder in folders:
        encoded = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT)
        with torch.inference_mode():
            logp_TV = load_reference(folder)(torch.tensor([encoded.ids])).logits[0].log_softmax(-1)
        drawn = [logp_TV[i, token].item() for i, token in enumerate(encoded.ids[1:])]
        ends.append([end for _, end in encoded.offsets])
        sums.append(
            dict(zip(ends[-1], torch.tensor([0.0, *drawn]).cumsum(0).tolist(), strict=True))
        )
    cuts = sorted(set(ends[0]) & set(ends[1]))
    parts: list[tuple[str, float | None]] = [(PROMPT[: cuts[0]], None)]
    for start, end in pairwise(cuts):
        parts.append((PROMPT[start:end], fuse([by_end[end] - by_end[start] for by_end in sums])))
    return parts


def test_a_text_has_a_likelihood(executor: Any, folders: list[Path]) -> None:
    """Strings that both read whole have their mean probability; an answer follows as usual."""
    answer = {"members": ["m", "n"], "weights": [1, 2]}
    [chunk], _ = run(executor, answer, max_tokens=0, prompt_logprobs=2)
    expected = scored_by_parts(
        folders, lambda logs: math.log(math.exp(logs[0]) / 3 + math.exp(logs[1]) * 2 / 3)
    )
    assert [token.raw.decode() for token in chunk.prompt] == [text for text, _ in expected]
    first, *rest = [token.logprob for token in chunk.prompt]
    assert first is None
    assert rest == pytest.approx([logprob for _, logprob in expected[1:]], abs=1e-3)
    assert [len(token.top) for token in chunk.prompt] == [0] + [2] * len(rest)
    chunks, _ = run(executor, answer, prompt_logprobs=0)
    assert [token.raw.decode() for token in chunks[0].prompt] == [text for text, _ in expected]
    alone, _ = run(executor, answer)
    assert "".join(one.text for one in chunks) == "".join(one.text for one in alone)


def test_a_product_has_a_likelihood(executor: Any, folders: list[Path]) -> None:
    """Strings that both read whole have their share of the union, to which they are put."""
    weights = [1 / 3, 2 / 3]
    answer = {"members": ["m", "n"], "weights": [1, 2], "rule": "product"}
    [chunk], _ = run(executor, answer, max_tokens=0, prompt_logprobs=0)
    parts = scored_by_parts(
        folders, lambda logs: sum(w * log for w, log in zip(weights, logs, strict=True))
    )
    assert [token.raw.decode() for token in chunk.prompt] == [text for text, _ in parts]
    members, start, expected = members_of(folders), 0, []
    for text, logprob in parts:
        if logprob is not None:
            # Where both end a token, what comes before is read as it is in the whole.
            reads = []
            for _, tokenizer in members:
                read = tokenizer.encode(PROMPT)
                reads.append(
                    [i for i, (_, e) in zip(read.ids, read.offsets, strict=True) if e <= start]
                )
            union = {text: logprob, **union_of(members, reads, weights, product=True)}
            expected.append(union[text] - math.log(sum(map(math.exp, union.values()))))
        start += len(text)
    assert [token.logprob for token in chunk.prompt[1:]] == pytest.approx(expected, abs=1e-3)


def test_a_text_is_as_likely_as_it_was_when_it_was_written(executor: Any) -> None:
    """A product scores a string that it drew as it drew it, if all members read it whole."""
    answer, num_whole = {"members": ["m", "n"], "rule": "product"}, 0
    for seed in range(12):
        chunks, _ = run(executor, answer, max_tokens=1, temperature=3.0, seed=seed)
        [drawn] = chunks[0].tokens
        whole = Prompt(text=PROMPT + drawn.raw.decode())
        [scored], _ = run(executor, answer, prompt=whole, max_tokens=0, prompt_logprobs=0)
        if drawn.raw and scored.prompt[-1].raw == drawn.raw:
            assert scored.prompt[-1].logprob == pytest.approx(drawn.logprob, abs=1e-3)
            num_whole += 1
    assert num_whole > 3


def test_alternatives_are_the_union_s(executor: Any) -> None:
    """The likeliest strings stand beside the drawn one, which at temperature 0 is their first."""
    chunks, _ = run(executor, {"members": ["m", "n"]}, top_logprobs=3)
    for chunk in chunks:
        [token] = chunk.tokens
        assert [token.top[0].raw, token.top[0].logprob] == [token.raw, token.logprob]
        assert len(token.top) == 3
        assert token.top[0].logprob >= token.top[1].logprob >= token.top[2].logprob


@pytest.mark.parametrize(
    "field",
    [
        {"logit_bias": {1: 2.0}},
        {"structure": Structure(kind="json", text="{}")},
        {"top_p": 0.5},
        {"prompt_logprobs": 1, "prompt": Prompt(text=PROMPT, keep_tokens=3)},
        {"prompt": Prompt(token_ids=(5, 6))},
        {"min_tokens": 3},
    ],
)
def test_what_needs_one_vocabulary_is_refused(executor: Any, field: dict[str, Any]) -> None:
    """Options that speak of token ids or a whole vocabulary are refused by name."""
    with pytest.raises(RequestError, match="different tokenizers"):
        run(executor, {"members": ["m", "n"]}, **field)


@pytest.mark.parametrize("changes", [{"rule": "gated"}, {"weights": "evidence"}])
def test_rules_that_need_one_vocabulary_are_refused_at_load(
    executor: Any, folders: Any, changes: dict[str, Any]
) -> None:
    """Across engines only mixture and product exist, with given or the router's weights."""
    plan = from_json({"answer": {"members": ["m", "n"], **changes}})
    with pytest.raises(PolicyError, match="only the rules mixture and product"):
        load_catalog(load_pool(folders[0].parent)).policies.check(plan)


class Words:
    """A tokenizer of single characters or of two, by length."""

    vocab_size = 100

    def __init__(self, length: int) -> None:
        self.length = length
        self.pieces: list[str] = []

    def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        """Return one id per piece; the pieces are remembered."""
        pieces = [text[i : i + self.length] for i in range(0, len(text), self.length)]
        self.pieces = pieces or self.pieces
        return tuple(range(len(pieces)))

    def decode(self, token_ids: Any) -> str:
        """Return the pieces."""
        return "".join(self.pieces[i] for i in token_ids)


def test_a_string_counts_as_its_first_token() -> None:
    """A member that writes a string in several tokens gives it the first one's probability."""
    short = Opinion(named={"h": math.log(0.6), "o": math.log(0.3)}, rest=math.log(0.001))
    long = Opinion(named={"he": math.log(0.7), "": math.log(0.2)}, rest=math.log(0.001))
    tokenizers: Any = [Words(1), Words(2)]
    fused = fuse_strings([short, long], tokenizers, [0.5, 0.5])
    raw = {
        "h": 0.5 * 0.6 + 0.5 * 0.001,
        "o": 0.5 * 0.3 + 0.5 * 0.001,
        "he": 0.5 * 0.6 + 0.5 * 0.7,
        "": 0.5 * 0.001 + 0.5 * 0.2,
    }
    expected = {text: math.log(value / sum(raw.values())) for text, value in raw.items()}
    assert fused == pytest.approx(expected)
