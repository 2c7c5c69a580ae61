"""Encoders: one contract for all, and what is particular to hashed n-grams."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from policies.encoders.base import Encoder, build_encoder, parse_encoder
from policies.encoders.ngrams import MAX_BYTES, NGrams, side_by_side
from policies.encoders.transformer import Neural, SentenceVectors
from policies.errors import PolicyError
from policies.outcomes import Outcome
from policies.routing.fit import fit_router
from policies.routing.router import load_router, save_router
from tests.tiny_bert import save_bert

TEXTS = [
    f"{verb} {a} {word} and {a + 3} more, then say how many"
    for a in range(10, 25)
    for verb, word in (("Add", "apples"), ("Take", "books"), ("Count", "grüne Äpfel"))
]
ODD = ["", " ", "a", "ab", "\ud800 lone surrogate", "🦈🦈", "中文问题", "\x00\x01", "x" * 1_000_000]

# What the first release made of "Spell shark, 2 times" with 16 bits.
PINNED = [1205, 16388, 33473, 35732, 42811, 48421, 52016, 65962, 68774, 69864, 71547, 76696, 81092]
PINNED += [81734, 89172, 91263, 99690, 106819, 108065, 108353, 116276, 123366, 125764, 126671]
PINNED += [126771, 129652]


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer with random weights (seed 0) and its tokenizer, as a folder."""
    words = sorted({word for text in TEXTS for word in text.lower().replace(",", " ,").split()})
    return save_bert(tmp_path_factory.mktemp("bert"), words, num_hidden_layers=2)


@pytest.fixture(scope="module", params=["ngrams", "neural", "finetuned"])
def encoder(request: pytest.FixtureRequest, tiny_bert: Path) -> Encoder:
    """Every kind of encoder, fitted."""
    if request.param == "neural":
        encoder = parse_encoder(f"neural:{tiny_bert}", {"bits": 10})
    if request.param == "finetuned":
        encoder = parse_encoder(f"finetuned:{tiny_bert}", {})
    else:
        encoder = build_encoder("ngrams", {"bits": 10, "num_dimensions": 8})
    encoder.fit_encode(TEXTS)
    return encoder


@pytest.mark.parametrize("text", ODD, ids=[repr(text[:10]) for text in ODD])
def test_any_text_has_features(encoder: Encoder, text: str) -> None:
    """No text raises; ids are distinct and in range, values finite, the point small."""
    weights = np.ones((encoder.num_features, 2), np.float32)
    features, sums, point = encoder.reader(weights)(text)
    assert len(set(features.ids.tolist())) == len(features.ids) == len(features.values)
    assert np.all((features.ids >= 0) & (features.ids < encoder.num_features))
    assert np.isfinite(features.values).all()
    np.testing.assert_allclose(sums, features.values.sum(), atol=1e-4)
    assert point.shape == (encoder.num_dimensions,)
    assert np.linalg.norm(point) < 1.01


def test_one_query_looks_the_same_alone_and_among_many(encoder: Encoder) -> None:
    """The fast path and training agree, but for features unknown to training (weights: seed 0)."""
    encoded = encoder.encode([*TEXTS[:5], *ODD[:4]])
    weights = np.random.default_rng(0).normal(size=(encoder.num_features, 3)).astype(np.float32)
    read = encoder.reader(weights)
    for row, text in enumerate([*TEXTS[:5], *ODD[:4]]):
        features, sums, point = read(text)
        np.testing.assert_array_equal(features.ids, encoder.features(text).ids)
        np.testing.assert_allclose(features.values, encoder.features(text).values, atol=1e-6)
        np.testing.assert_allclose(sums, features.values @ weights[features.ids], atol=1e-4)
        dense = np.zeros(encoder.num_features, np.float32)
        dense[features.ids] = features.values
        together = encoded.matrix_QF[row].toarray()[0]
        known = together != 0
        np.testing.assert_allclose(together[known], dense[known], atol=1e-5)
        np.testing.assert_allclose(encoded.points_QD[row], point, atol=1e-4)


def test_a_restored_encoder_is_the_same(encoder: Encoder) -> None:
    """Settings and arrays are all there is."""
    settings = json.loads(json.dumps(encoder.settings()))
    copy = build_encoder(encoder.kind, settings).restore(encoder.arrays())
    weights = np.ones((encoder.num_features, 1), np.float32)
    one, other = (each.reader(weights)("Add 12 apples, says nobody") for each in (encoder, copy))
    np.testing.assert_array_equal(one.features.ids, other.features.ids)
    np.testing.assert_array_equal(one.features.values, other.features.values)
    np.testing.assert_array_equal(one.point_D, other.point_D)


def test_training_queries_are_encoded_once(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fitting returns what encoding the same texts would, and no transformer sees a text twice."""
    seen: list[str] = []
    inner = SentenceVectors._encode

    def spied(self: SentenceVectors, texts: Sequence[str], *rest: Any) -> Any:
        seen.extend(texts)
        return inner(self, texts, *rest)

    monkeypatch.setattr(SentenceVectors, "_encode", spied)
    fresh = build_encoder(encoder.kind, encoder.settings())
    fitted = fresh.fit_encode(TEXTS)
    assert len(seen) == (0 if encoder.kind == "ngrams" else len(TEXTS))
    again = encoder.encode(TEXTS)
    np.testing.assert_allclose(fitted.points_QD, again.points_QD, atol=1e-5)
    np.testing.assert_allclose(fitted.matrix_QF.toarray(), again.matrix_QF.toarray(), atol=1e-5)


def test_a_single_query_computes_on_one_core(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the caller's threads; they are as before afterwards, and many texts may use them."""
    import torch

    used: list[int] = []
    vectors = SentenceVectors(tiny_bert, max_tokens=16)
    inner = SentenceVectors.pooled

    def spied(self: SentenceVectors, texts: Sequence[str]) -> Any:
        used.append(torch.get_num_threads())
        return inner(self, texts)

    monkeypatch.setattr(SentenceVectors, "pooled", spied)
    with threadpool_limits(2, user_api="openmp"):
        vectors(TEXTS[:1])
        vectors(TEXTS[:2])
        assert torch.get_num_threads() == 2
    assert used == [1, 2]


def test_arrays_of_other_settings_are_refused(encoder: Encoder) -> None:
    """Arrays whose shapes do not fit raise instead of predicting nonsense."""
    arrays = {name: array[:-1] for name, array in encoder.arrays().items()}
    with pytest.raises(PolicyError, match=r"arrays do not fit|has shape"):
        build_encoder(encoder.kind, encoder.settings()).restore(arrays)


def test_ngram_names_are_substrings_of_the_query() -> None:
    """Explanations show what stands in the text: words, pairs of words, windows."""
    encoder = NGrams(bits=16)
    text = "What is 37 + 58?"
    names = encoder.names(text)
    assert set(encoder.features(text).ids.tolist()) == set(names)
    assert {"what", "37 + 58", "58? "} <= set(names.values())


def test_ids_stay_what_stored_routers_know_them_by() -> None:
    """A version that hashed otherwise would read every stored router as noise."""
    ids = NGrams(bits=16).features("Spell shark, 2 times").ids.tolist()
    assert ids == PINNED
    assert all(feature < 1 << 16 for feature in ids[:7])
    assert all(feature >= 1 << 16 for feature in ids[7:])


@pytest.mark.parametrize("num_columns", [0, 1, 5, 8, 9, 16, 17])
def test_rows_of_a_table_touch_as_few_cache_lines_as_can_be(num_columns: int) -> None:
    """No row of a line or less crosses a line, longer ones start at one; the rest is zeros."""
    left = np.ones((7, num_columns), np.float32)
    table = side_by_side(left, 2 * np.ones((7, 1), np.float32))
    np.testing.assert_array_equal(table[:, :num_columns], left)
    assert (table[:, num_columns] == 2).all()
    assert not table[:, num_columns + 1 :].any()
    first = table.ctypes.data + table.strides[0] * np.arange(7)
    lines = (first + table.strides[0] - 1) // 64 - first // 64 + 1
    assert lines.tolist() == [-(-(num_columns + 1) // 16)] * 7


def test_case_digits_and_white_space_do_not_matter() -> None:
    """Two sums are the same to the router, whatever their digits."""
    encoder = NGrams(bits=16)
    one, other = encoder.features("WHAT is\n12 + 34?"), encoder.features("what is 56 + 78?")
    np.testing.assert_array_equal(one.ids, other.ids)


def test_a_word_hashes_alike_wherever_it_stands() -> None:
    """The span hash is independent of position, so that training carries over."""
    encoder = NGrams(bits=20)
    alone = {name: feature for feature, name in encoder.names("zebra").items()}
    later = {name: feature for feature, name in encoder.names("long before the zebra").items()}
    assert alone["zebra"] == later["zebra"]


def test_only_head_and_tail_of_a_long_query_count() -> None:
    """What stands beyond the limit changes nothing; head and tail do."""
    encoder = NGrams(bits=16)
    head, tail = "question " * 200, " answer" * 200
    long = encoder.features(head + "x" * 10_000 + tail)
    same = encoder.features(head + "y" * 20_000 + tail)
    other = encoder.features("task " * 400 + "x" * 10_000 + tail)
    assert len(head) > MAX_BYTES // 2
    np.testing.assert_array_equal(long.ids, same.ids)
    assert not np.array_equal(long.ids, other.ids)


def test_layers_are_spread_and_end_with_the_last(tiny_bert: Path) -> None:
    """Two of two layers are taken; the last layer's vectors are those of plain pooling."""
    vectors = SentenceVectors(tiny_bert, max_tokens=16)
    both = vectors.of_layers(TEXTS[:3], [1, 2])
    assert both.shape == (3, 2, 16)
    np.testing.assert_allclose(np.linalg.norm(both, axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(both[:, 1], vectors(TEXTS[:3]), atol=1e-6)
    assert not np.allclose(both[:, 0], both[:, 1], atol=1e-4)
    assert Neural(path=str(tiny_bert), num_layers=1).layers == [2]
    assert Neural(path=str(tiny_bert), num_layers=6).layers == [1, 2]
    with pytest.raises(PolicyError, match="num_layers: 0 is not at least 1"):
        Neural(path=str(tiny_bert), num_layers=0)


def test_a_distribution_may_ship_the_encoder(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router over it names the distribution, not where that lies on this machine."""
    about = tmp_path / "site" / "tiny_bert-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-bert\nVersion: 1.0\n")
    shipped = tmp_path / "site" / "tiny_bert" / "model"
    shutil.copytree(tiny_bert, shipped)
    files = [str(file.relative_to(tmp_path / "site")) for file in shipped.iterdir()]
    (about / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    monkeypatch.syspath_prepend(tmp_path / "site")
    source = "package:tiny-bert/tiny_bert/model"
    scores = [{"one": float(n % 2), "two": float(n % 3 > 0)} for n in range(len(TEXTS))]
    outcomes = [Outcome(query=text, scores=row) for text, row in zip(TEXTS, scores, strict=True)]
    router = fit_router(outcomes, encoder=parse_encoder(f"neural:{source}", {"bits": 10}))
    save_router(router, tmp_path / "router.npz")
    loaded = load_router(tmp_path / "router.npz")
    assert loaded.encoder.settings()["path"] == source
    np.testing.assert_allclose(loaded.qualities(TEXTS), router.qualities(TEXTS), atol=1e-6)
    with pytest.raises(PolicyError, match="its models are tiny_bert/model"):
        parse_encoder("neural:package:tiny-bert/other", {})


@pytest.mark.parametrize("names", [("dim", "n_layers"), ("d_model", "num_layers")])
def test_architectures_may_name_their_shape_differently(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    """DistilBERT's and T5's configurations are read too; one without any name is refused."""
    (tmp_path / "config.json").write_text(json.dumps(dict.fromkeys(names, 4)))
    vectors = SentenceVectors(tmp_path, max_tokens=16)
    assert (vectors.num_dimensions, vectors.num_layers) == (4, 4)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PolicyError, match="names none of hidden_size, dim, d_model"):
        SentenceVectors(tmp_path, max_tokens=16)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("word2vec", {}, "encoder: 'word2vec' is unknown; allowed are finetuned, neural, ngrams"),
        ("ngrams", {"bits": 4}, r"ngrams.bits: 4 is not in \[8, 22\]"),
        ("ngrams", {"window": 1}, "ngrams.window"),
        ("ngrams", {"num_dimensions": 0}, "ngrams.num_dimensions"),
        ("ngrams", {"size": 4}, "encoder ngrams: .*size"),
        ("neural", {"path": "/nowhere"}, "/nowhere is not a Hugging Face"),
        ("neural", {"path": "/nowhere", "weight": 1}, "encoder neural: .*weight"),
        ("finetuned", {"path": "."}, "is not a Hugging Face"),
        ("finetuned", {"path": "/nowhere", "bits": 4}, "encoder finetuned: .*bits"),
    ],
)
def test_bad_settings_are_refused(kind: str, settings: dict[str, object], message: str) -> None:
    """The error names the setting, the value and what is allowed."""
    with pytest.raises(PolicyError, match=message):
        build_encoder(kind, settings)
