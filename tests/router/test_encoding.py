"""Embeddings and rankings by small random encoders, held to transformers' own arithmetic."""

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, BertForSequenceClassification, BertModel

from models.engines.base import Encoding, GenerationRequest
from models.engines.encoder.engine import EncoderEngine, TextReader
from models.errors import PoolError
from models.pool import load_pool
from models.spec import EngineSpec
from tests.router.conftest import Running, running, write_pool
from tests.tiny_bert import save_bert

BEST = {"best": {"candidates": ["plain", "alpha"], "select": "majority"}}
TEXTS = ["the cat sat", "a dog", "the the the cat dog sat on a mat", "mat"]
WORDS = ["the", "cat", "dog", "a", "sat", "on", "mat"]


def write_encoder(folder: Path, *, cross: bool = False, **pooling: bool) -> Path:
    """Write a tiny random BERT, as sentence-transformers does where a `pooling` is given."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"intermediate_size": 48, "max_position_embeddings": 24}
    save_bert(folder, WORDS, labels=1 if cross else None, seed=7, **shape)
    if pooling:
        kinds = ("Transformer", "1_Pooling", "2_Dense", "3_Normalize")
        modules = [
            {
                "idx": i,
                "name": str(i),
                "path": "" if i == 0 else kind,
                "type": f"sentence_transformers.models.{kind.rpartition('_')[2]}",
            }
            for i, kind in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        for kind in kinds[1:3]:
            (folder / kind).mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        activation = {"activation_function": "torch.nn.modules.activation.Tanh"}
        (folder / "2_Dense" / "config.json").write_text(json.dumps(activation))
        weights = {"linear.weight": torch.randn(8, 32), "linear.bias": torch.randn(8)}
        save_file(weights, folder / "2_Dense" / "model.safetensors")
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 10}')
    return folder


def pool_of(folder: Path) -> dict[str, Any]:
    """Return a pool with a scripted model and three encoders."""
    cls = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    folders = {
        "plain": write_encoder(folder / "plain"),
        "dense": write_encoder(folder / "dense", **cls),
        "cross": write_encoder(folder / "cross", cross=True),
    }
    return {
        "engines": [
            {"name": "one", "kind": "fake"},
            *(
                {"name": f"of-{name}", "kind": "encoder", "options": {"batch_size": 2}}
                for name in folders
            ),
        ],
        "models": [
            *(
                {
                    "name": name,
                    "engine": f"of-{name}",
                    "checkpoint": str(path),
                    "usd_per_million_input_tokens": 1,
                }
                for name, path in folders.items()
            ),
            {"name": "alpha", "engine": "one"},
        ],
        "policies": {"everyone": {"kind": "fixed", "plan": BEST}},
    }


@pytest.fixture(name="serving", scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path]]:
    """A server of the encoders, and where they lie."""
    folder = tmp_path_factory.mktemp("encoders")
    with running(folder, **pool_of(folder)) as server:
        yield server, folder


def reference(folder: Path, texts: list[str], *, cls: bool = False, most: int = 24) -> Any:
    """Return what transformers alone makes of each text by itself: unit vectors."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder)
    model.eval()
    rows = []
    for text in texts:
        batch = tokenizer(text, return_tensors="pt", truncation=True, max_length=most)
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state[0]
        rows.append(hidden[0] if cls else hidden.mean(0))
    return np.stack([(row / row.norm()).numpy() for row in rows])


def embed(server: Running, **fields: Any) -> Any:
    """Ask through OpenAI's client, which itself asks for base64."""
    return server.client.embeddings.create(**{"model": "plain", "input": TEXTS, **fields})


def test_vectors_are_the_mean_of_their_tokens(serving: tuple[Running, Path]) -> None:
    """As transformers computes them one by one, in the inputs' order, in every format."""
    server, folder = serving
    server.forget()
    wanted = reference(folder / "plain", TEXTS)
    told = embed(server)
    np.testing.assert_allclose([one.embedding for one in told.data], wanted, atol=1e-5)
    assert [one.index for one in told.data] == [0, 1, 2, 3]
    tokenizer = AutoTokenizer.from_pretrained(folder / "plain")
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert told.usage.prompt_tokens == told.usage.total_tokens == sum(map(len, ids))
    record = server.last_record()
    assert (record.endpoint, record.status, record.answered_by) == ("/v1/embeddings", 200, "plain")
    assert (record.prompt_tokens, record.output_tokens) == (sum(map(len, ids)), 0)
    assert record.usd == pytest.approx(sum(map(len, ids)) / 1e6)
    for fields in ({"encoding_format": "float"}, {"input": ids}):
        found = [one.embedding for one in embed(server, **fields).data]
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    raw = server.post("/v1/embeddings", model="plain", input="a dog", encoding_format="base64")
    packed = base64.b64decode(raw.json()["data"][0]["embedding"])
    np.testing.assert_allclose(np.frombuffer(packed, "<f4"), wanted[1], atol=1e-5)
    short = np.array(embed(server, dimensions=5).data[2].embedding)
    np.testing.assert_allclose(short, wanted[2, :5] / np.linalg.norm(wanted[2, :5]), atol=1e-5)


def test_what_sentence_transformers_writes_is_followed(serving: tuple[Running, Path]) -> None:
    """The first token's vector, a dense layer with its activation, and the folder's own length."""
    from safetensors.torch import load_file

    server, folder = serving
    tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
    model = BertModel.from_pretrained(folder / "dense").eval()
    weights = load_file(folder / "dense" / "2_Dense" / "model.safetensors")
    found = embed(server, model="dense", input=TEXTS[:2]).data
    for text, one in zip(TEXTS[:2], found, strict=True):
        with torch.no_grad():
            first = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0]
        row = torch.tanh(weights["linear.weight"] @ first + weights["linear.bias"])
        np.testing.assert_allclose(one.embedding, (row / row.norm()).numpy(), atol=1e-5)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 10"):
        embed(server, model="dense", input="cat " * 9)
    cut = embed(server, model="dense", input="cat " * 9, extra_body={"truncate_prompt_tokens": -1})
    whole = embed(server, model="dense", input="cat " * 8)
    assert cut.data[0].embedding == pytest.approx(whole.data[0].embedding, abs=1e-5)


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
def test_a_cross_encoder_ranks_pairs(serving: tuple[Running, Path], path: str) -> None:
    """Scores are transformers' own for query and document together, best first."""
    server, folder = serving
    tokenizer = AutoTokenizer.from_pretrained(folder / "cross")
    model = BertForSequenceClassification.from_pretrained(folder / "cross").eval()
    with torch.no_grad():
        wanted = [
            model(**tokenizer("a cat", text, return_tensors="pt")).logits[0, 0].sigmoid().item()
            for text in TEXTS
        ]
    documents = [TEXTS[0], {"text": TEXTS[1]}, *TEXTS[2:]]
    body = {"model": "cross", "query": "a cat", "documents": documents, "top_n": 3}
    told = server.http.post(path, json=body).json()
    order = sorted(range(4), key=lambda i: -wanted[i])[:3]
    assert [one["index"] for one in told["results"]] == order
    assert [one["document"]["text"] for one in told["results"]] == [TEXTS[i] for i in order]
    found = [one["relevance_score"] for one in told["results"]]
    assert found == pytest.approx([wanted[i] for i in order], abs=1e-5)
    bare = server.http.post(path, json={**body, "return_documents": False}).json()
    assert "document" not in bare["results"][0]
    long = {**body, "documents": ["cat " * 100]}
    assert len(server.http.post(path, json=long).json()["results"]) == 1, "long ones are cut"


def test_vectors_rank_by_their_angle(serving: tuple[Running, Path]) -> None:
    """Where there is no cross-encoder, a document's score is its cosine with the query."""
    server, folder = serving
    rows = reference(folder / "plain", ["a cat", *TEXTS])
    body = {"model": "plain", "query": "a cat", "documents": TEXTS}
    found = server.http.post("/v1/rerank", json=body).json()["results"]
    scores = {one["index"]: one["relevance_score"] for one in found}
    np.testing.assert_allclose([scores[i] for i in range(4)], rows[1:] @ rows[0], atol=1e-5)
    assert [one["relevance_score"] for one in found] == sorted(scores.values(), reverse=True)


def test_encoders_answer_no_chat(serving: tuple[Running, Path]) -> None:
    """No policy takes one, though they come first in the pool; asked by name they refuse."""
    server, _ = serving
    for name in ("auto", "policy/everyone"):
        told = server.post(model=name, shoal={"explain": True}).json()["shoal"]
        assert told["members"] == ["alpha"]
    assert "encoder" in told["details"]["left_out"]["plain"]
    refused = server.post(model="plain")
    assert refused.status_code == 400
    assert "encoder" in refused.json()["error"]["message"]
    plan = {"answer": {"members": ["plain"]}}
    assert server.post(model="auto", shoal={"plan": plan}).status_code == 400
    kinds = {
        one["id"]: one["shoal"]["kind"] for one in server.http.get("/v1/models").json()["data"]
    }
    assert kinds["plain"] == "encoder"
    assert kinds["alpha"] == "model"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", {"model": "alpha", "input": "x"}, "model"),
        ("/v1/embeddings", {"model": "auto", "input": "x"}, "model"),
        ("/v1/embeddings", {"model": "cross", "input": "x"}, "model"),
        ("/v1/embeddings", {"model": "plain", "input": ""}, "input"),
        ("/v1/embeddings", {"model": "plain", "input": []}, "input"),
        ("/v1/embeddings", {"model": "plain", "input": ["x"] * 2049}, "input"),
        ("/v1/embeddings", {"model": "plain", "input": ["x", [1]]}, "input"),
        ("/v1/embeddings", {"model": "plain", "input": [99]}, "input"),
        ("/v1/embeddings", {"model": "plain", "input": "cat " * 50}, "input"),
        ("/v1/embeddings", {"model": "plain", "input": "x", "dimensions": 33}, "dimensions"),
        (
            "/v1/embeddings",
            {"model": "plain", "input": "x", "encoding_format": "hex"},
            "encoding_format",
        ),
        ("/v1/rerank", {"model": "plain", "query": "x", "documents": []}, "documents"),
        ("/v1/rerank", {"model": "plain", "query": "x", "documents": [1]}, "documents"),
        ("/v1/rerank", {"model": "alpha", "query": "x", "documents": ["x"]}, "model"),
    ],
)
def test_bad_requests_are_named(
    serving: tuple[Running, Path], path: str, body: dict[str, Any], param: str
) -> None:
    """Who cannot encode says who can; inputs are bounded."""
    refused = serving[0].http.post(path, json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param


def test_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    """Modules that nobody knows, several poolings at once, labels that are no score."""
    modules = [{"type": "my.own.Module", "path": ""}]
    for name, change, error in (
        ("modules", {"modules.json": modules}, "my.own.Module"),
        (
            "pooling",
            {
                "1_Pooling/config.json": {
                    "pooling_mode_cls_token": True,
                    "pooling_mode_max_tokens": True,
                }
            },
            "no more",
        ),
    ):
        folder = write_encoder(tmp_path / name, pooling_mode_cls_token=True)
        for file, content in change.items():
            (folder / file).write_text(json.dumps(content))
        engines = [{"name": "e", "kind": "encoder"}]
        models = [{"name": "m", "engine": "e", "checkpoint": str(folder)}]
        with pytest.raises(PoolError, match=error):
            load_pool(write_pool(tmp_path, engines=engines, models=models, policies={}))


class SlowEncoder:
    """Tells a vector of ones for each row once it is let; knows what it was asked, in order."""

    reader = TextReader(
        Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]")),
        max_tokens=9,
    )

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.came = asyncio.Semaphore(0)
        self.may_go_on = asyncio.Event()

    async def vectors(self, rows: Any) -> Any:
        """Wait until it may go on."""
        self.asked.append(len(rows))
        self.came.release()
        await self.may_go_on.wait()
        return np.ones((len(rows), 4), np.float32)


def test_offline_texts_give_way() -> None:
    """Whoever waits for a vector gets it before the next few of a batch's many texts are read."""
    encoder = SlowEncoder()

    async def load() -> Any:
        return encoder

    spec = EngineSpec(name="e", kind="encoder")
    engine = EncoderEngine(spec, "m", ("vector",), load)

    async def tell(num_texts: int, *, offline: bool) -> Any:
        inputs = ((0,),) * num_texts
        request = GenerationRequest(
            request_id=f"{offline}",
            prompt_tokens=(),
            members=("m",),
            offline=offline,
            encoding=Encoding(inputs=inputs),
        )
        [chunk] = [chunk async for chunk in engine.generate(request)]
        return chunk

    async def main() -> None:
        await engine.start()
        batch = asyncio.create_task(tell(40, offline=True))
        await encoder.came.acquire()
        mine = asyncio.create_task(tell(3, offline=False))
        await encoder.came.acquire()
        encoder.may_go_on.set()
        assert (await mine).rows.shape == (3, 4)
        many = await batch
        assert (many.rows.shape, many.prompt_tokens) == ((40, 4), 40)
        first, second, *rest = encoder.asked
        assert second == 3
        assert sum([first, *rest]) == 40
        assert max(first, *rest) < 40

    asyncio.run(main())


def test_batches_embed(serving: tuple[Running, Path]) -> None:
    """`/v1/embeddings` is offline work, too."""
    from tests.router.test_batches import begin, ended, line, results

    server, _ = serving
    url = "/v1/embeddings"
    lines = [line("a", url=url, model="plain", input="a dog")]
    batch = ended(server.client, begin(server.client, lines, url=url).id)
    body = results(server.client, batch.output_file_id)["a"]["response"]["body"]
    assert len(body["data"][0]["embedding"]) == 32
