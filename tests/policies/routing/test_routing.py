"""Trained routers as policies: what they choose, refuse, store and explain."""

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit

from policies.base import ModelFacts, Policy, Query, members_of
from policies.encoders.ngrams import NGrams
from policies.errors import ArtifactError, PolicyError
from policies.footprint import Rates
from policies.outcomes import Outcome, content_sha256
from policies.plan import Answer
from policies.registry import build_policy
from policies.routing.fit import FitSettings, fit_router
from policies.routing.policy import Clusters, Learned, Trade
from policies.routing.router import Router, load_router, save_router

RIGHT = {"sums": "adder", "words": "speller", "easy": "both"}


def make_outcomes(num_queries: int = 240, seed: int = 0) -> list[Outcome]:
    """Return sums that `adder` knows, words that `speller` knows, and easy ones that both know.

    `large` knows everything and is dear; a tenth of the scores are flipped at random.
    """
    rng = np.random.default_rng(seed)
    words = ["shark", "coral", "plankton", "seaweed", "urchin", "lobster", "anemone"]
    outcomes = []
    for _ in range(num_queries):
        task = list(RIGHT)[rng.integers(3)]
        a, b = rng.integers(100, size=2)
        word = words[rng.integers(len(words))]
        query = {
            "sums": f"What is {a} + {b}?",
            "words": f"Spell the word {word} backwards",
            "easy": f"Say hello to me {a} times please",
        }[task]
        right = {
            "adder": task != "words",
            "speller": task != "sums",
            "large": True,
        }
        scores = {name: float(ok != (rng.random() < 0.1)) for name, ok in right.items()}
        tokens = {"adder": 4, "speller": 4, "large": 40}
        outcomes.append(Outcome(query=query, scores=scores, tags=(task,), output_tokens=tokens))
    return outcomes


def encoder() -> NGrams:
    """Return a small encoder."""
    return NGrams(bits=12, num_dimensions=8)


OUTCOMES = make_outcomes()
SETTINGS = FitSettings(num_clusters=6)
FACTS = {
    name: ModelFacts(name=name, rates=Rates(usd_per_input_token=usd, usd_per_output_token=usd))
    for name, usd in (("adder", 1e-7), ("speller", 1e-7), ("large", 1e-5))
}


@pytest.fixture(scope="module")
def router() -> Router:
    """A router over three models."""
    return fit_router(OUTCOMES, encoder=encoder(), settings=SETTINGS)


@pytest.fixture(scope="module", params=[Learned, Clusters])
def policy(request: pytest.FixtureRequest, router: Router) -> Learned:
    """Both policies, for which a right answer is worth a tenth of a cent."""
    return request.param(router, models=FACTS, trade=Trade(answer_value_usd=1e-3))


@pytest.mark.parametrize(
    ("query", "member"),
    [("What is 37 + 58?", "adder"), ("Spell the word shark backwards", "speller")],
)
def test_the_cheap_model_that_knows_the_task_is_chosen(
    policy: Learned, query: str, member: str
) -> None:
    """The expert answers what it knows, the dear model is not worth its price there."""
    decision = policy.decide(Query(text=query))
    assert decision.plan == Answer(members=(member,))
    assert decision.scores[member] > 0.7
    assert member in decision.reason
    assert isinstance(policy, Policy)


def test_without_a_price_quality_alone_counts(router: Router) -> None:
    """Limited to two experts and no price, each query goes to the better one."""
    policy = Learned(router, models=FACTS, trade=Trade(members=("speller", "adder")))
    assert members_of(policy) == ("speller", "adder")
    decision = policy.decide(Query(text="What is 12 + 55?"))
    assert decision.plan == Answer(members=("adder",))
    assert set(decision.scores) == {"speller", "adder"}


def test_the_dear_model_is_chosen_when_an_answer_is_worth_it(router: Router) -> None:
    """As a right answer gains value, sums move from the cheapest model to the best."""
    dear = replace(FACTS["adder"], rates=Rates(usd_per_input_token=9e-4, usd_per_output_token=9e-4))
    facts = {**FACTS, "adder": dear}
    sums = Query(text="What is 37 + 58?", prompt_tokens=20)
    cheap = Learned(router, models=facts, trade=Trade(answer_value_usd=1e-3)).decide(sums)
    rich = Learned(router, models=facts, trade=Trade(answer_value_usd=1e3)).decide(sums)
    assert cheap.plan != Answer(members=("adder",))
    assert rich.scores == cheap.scores
    assert isinstance(rich.plan, Answer)
    [best] = rich.plan.members
    assert best == max(rich.scores, key=lambda name: rich.scores[name])


@pytest.mark.parametrize("text", ["", "x" * 1_000_000, "\ud800", "那只鲨鱼会唱歌吗", "\x00"])
def test_odd_queries_get_the_safe_plan(router: Router, text: str) -> None:
    """Empty, huge, broken and foreign queries never raise and are known to be unfamiliar."""
    policy = Learned(router, models=FACTS, unfamiliar=Answer(members=("large",)))
    decision = policy.decide(Query(text=text))
    assert decision.plan == Answer(members=("large",))
    assert "unlike the training queries" in decision.reason
    # By default it is the member that did best on tasks that training had not seen.
    assert Learned(router, models=FACTS).decide(Query(text=text)).plan == decision.plan


def test_familiar_queries_do_not_fall_back(router: Router) -> None:
    """New numbers and other words around a known question are familiar."""
    policy = Learned(router, models=FACTS, unfamiliar=Answer(members=("large",)))
    for text in ("What is 91 + 14?", "Spell the word crab backwards"):
        assert "unlike" not in policy.decide(Query(text=text)).reason, text


def test_predictions_are_calibrated_and_beat_the_best_single_model(router: Router) -> None:
    """On new queries (seed 1), two experts together come near the oracle."""
    fresh = make_outcomes(seed=1)
    quality = router.qualities([outcome.query for outcome in fresh])
    experts = [router.models.index(name) for name in ("adder", "speller")]
    scores = np.array([[outcome.scores[name] for name in router.models] for outcome in fresh])
    chosen = np.take_along_axis(scores[:, experts], quality[:, experts].argmax(1)[:, None], 1)
    assert chosen.mean() > scores[:, experts].mean(0).max() + 0.1
    assert abs(quality.mean() - scores.mean()) < 0.05


def test_the_fast_path_predicts_what_the_batch_predicts(router: Router) -> None:
    """One query at a time or all at once, the numbers are the same."""
    texts = [outcome.query for outcome in OUTCOMES[:20]]
    batch, clusters = router.qualities(texts), router.cluster_qualities(texts)
    for row, text in enumerate(texts):
        prediction = router.predict(text)
        np.testing.assert_allclose(prediction.quality_M, batch[row], atol=1e-5)
        np.testing.assert_allclose(router.topics.scores_KM[prediction.cluster], clusters[row])
        # What an explanation shows adds up to the prediction.
        ids, values = prediction.features.ids, prediction.features.values
        logits = values @ router.weights_FM[ids] + prediction.likeness_M + router.bias_M
        np.testing.assert_allclose(expit(logits), prediction.quality_M, atol=1e-5)
        assert np.abs(prediction.likeness_M).max() > 0.01


def test_a_stored_router_decides_the_same(router: Router, tmp_path: Path) -> None:
    """Saving and loading changes no prediction, and the file says what it was trained on."""
    save_router(router, tmp_path / "router.npz")
    loaded = load_router(tmp_path / "router.npz")
    texts = [outcome.query for outcome in OUTCOMES[:50]]
    np.testing.assert_array_equal(loaded.qualities(texts), router.qualities(texts))
    np.testing.assert_array_equal(loaded.cluster_qualities(texts), router.cluster_qualities(texts))
    assert loaded.facts["data_sha256"] == content_sha256(OUTCOMES)
    assert loaded.facts["num_queries"] == len(OUTCOMES)
    assert 0 <= loaded.facts["held_out"]["ece"] <= 1
    assert [file.name for file in tmp_path.iterdir()] == ["router.npz"]


def test_training_is_reproducible(router: Router) -> None:
    """The same outcomes, settings and seed give the same router."""
    again = fit_router(OUTCOMES, encoder=encoder(), settings=SETTINGS)
    np.testing.assert_allclose(again.weights_FM, router.weights_FM, atol=1e-5)


def test_sparse_feedback_is_enough_to_learn() -> None:
    """With one score per query, as a ledger has, the experts are still told apart (seed 2)."""
    rng = np.random.default_rng(2)
    sparse = []
    for outcome in make_outcomes(600, seed=2):
        name = list(outcome.scores)[rng.integers(3)]
        sparse.append(Outcome(query=outcome.query, scores={name: outcome.scores[name]}))
    router = fit_router(sparse, encoder=encoder(), settings=SETTINGS)
    assert router.facts["held_out"]["accuracy"] is None
    policy = Learned(router, models=FACTS, trade=Trade(members=("adder", "speller")))
    assert policy.decide(Query(text="What is 1 + 2?")).plan == Answer(members=("adder",))
    spelling = Query(text="Spell the word coral backwards")
    assert policy.decide(spelling).plan == Answer(members=("speller",))


def test_what_lies_outside_goes_to_who_answers_there(tmp_path: Path) -> None:
    """Outcomes from outside the field teach who answers there, and what sounds like the field's
    questions and is none."""
    towns = ["Lisbon", "Oslo", "Cairo", "Lima", "Quito", "Riga", "Delhi", "Accra"]
    scores = {"adder": 0.0, "speller": 0.0, "large": 0.0, "guide": 1.0}
    outside = [
        Outcome(query=f"{how} the town of {town}", scores=scores, tags=("towns",))
        for town in towns
        for how in ("Where lies", "Describe", "Tell me about", "Who founded")
    ]
    home = [
        replace(one, scores={**one.scores, "guide": 0.0}) if row % 8 == 0 else one
        for row, one in enumerate(OUTCOMES)
    ]
    router = fit_router(home, encoder=encoder(), settings=SETTINGS, outside=outside)
    save_router(router, tmp_path / "router.npz")
    policy = Learned(load_router(tmp_path / "router.npz"), models=FACTS)
    for text in ("Where lies the town of Vienna", "What is the town of Vienna", "ferries to Malta"):
        decision = policy.decide(Query(text=text, explain=True))
        assert decision.plan == Answer(members=("guide",))
        assert decision.details["doubt"]["familiar"] is False
        assert decision.scores == pytest.approx(scores)
    assert policy.decide(Query(text="What is 1 + 2?")).plan != Answer(members=("guide",))
    assert (router.facts["num_queries"], router.facts["num_outside"]) == (240, 32)


def test_too_few_outcomes_are_refused() -> None:
    """A handful of queries trains nothing."""
    with pytest.raises(PolicyError, match="5 outcomes are too few"):
        fit_router(OUTCOMES[:5], encoder=encoder())


def test_an_explanation_names_members_cluster_and_ngrams(policy: Learned) -> None:
    """The details are JSON and only come when asked for."""
    query = Query(text="What is 37 + 58?")
    explained = policy.decide(replace(query, explain=True))
    assert policy.decide(query).details == {}
    assert explained.plan == policy.decide(query).plan
    details = json.loads(json.dumps(explained.details))
    assert {entry["model"] for entry in details["members"]} == set(FACTS)
    assert details["nearest_cluster"]["num_training_queries"] > 0
    ngrams = [entry["ngram"] for entry in details["strongest_ngrams"]]
    assert ngrams
    assert all(ngram in " what is 37 + 58? " for ngram in ngrams)
    assert isinstance(details["likeness_logit"], float)


def damage(file: Path, how: str) -> None:
    """Spoil a router file in one of several ways."""
    raw = file.read_bytes()
    if how == "truncated":
        file.write_bytes(raw[: len(raw) // 2])
    elif how == "text":
        file.write_text("not a router")
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "flipped":
        middle = len(raw) // 2
        file.write_bytes(raw[:middle] + bytes([raw[middle] ^ 0xFF]) + raw[middle + 1 :])
    else:
        with np.load(file) as arrays:
            parts = {name: arrays[name] for name in arrays.files}
        meta = json.loads(parts["meta"].tobytes())
        if how == "incomplete":
            del parts["bias"]
        elif how == "misshapen":
            parts["bias"] = parts["bias"][:-1]
        elif how == "newer":
            meta["schema"] = 99
        elif how == "cascade":
            meta["kind"] = "cascade"
        elif how == "infinite":
            parts["weights"] = np.full_like(parts["weights"], np.inf)
        elif how == "words":
            parts["bias"] = parts["bias"].astype("U5")
        elif how == "nameless":
            meta["settings"]["models"] = [1, 2, 3]
        elif how == "blunt":
            meta["settings"]["sharpness"] = float("inf")
        elif how == "pickled":
            parts["bias"] = np.array([{"evil": 1}], dtype=object)
        parts["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        np.savez(file, **parts)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "not a router file, or is damaged"),
        ("text", "not a router file, or is damaged"),
        ("empty", "not a router file, or is damaged"),
        ("flipped", "not a router file, or is damaged"),
        ("incomplete", "not a complete router file: 'bias'"),
        ("misshapen", "the array 'bias' has shape"),
        ("newer", "a router file of schema 99, not a router file of schema"),
        ("cascade", "a cascade file of schema"),
        ("pickled", "not a router file, or is damaged"),
        ("infinite", "the array 'weights' holds numbers that are not finite"),
        ("words", "the array 'bias' holds <U5, not numbers"),
        ("nameless", r"models: \[1, 2, 3\] are not names"),
        ("blunt", "sharpness: inf is not finite"),
    ],
)
def test_a_damaged_file_is_named(router: Router, tmp_path: Path, how: str, message: str) -> None:
    """Whatever is wrong with the file, the error is ours and names it."""
    file = tmp_path / "router.npz"
    save_router(router, file)
    damage(file, how)
    assert how in ("text", "empty", "truncated", "flipped") or zipfile.is_zipfile(file)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_router(file)
    assert "router.npz" in str(caught.value)


def test_no_wrong_byte_gets_past_the_reader(router: Router, tmp_path: Path) -> None:
    """Wherever bytes are wrong, the file is refused with our error, or predicts (seed 0)."""
    file = tmp_path / "router.npz"
    save_router(router, file)
    good = file.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    # The archive's directory, at the end, is where most kinds of damage can be done.
    for start in [*rng.integers(len(good), size=100), *rng.integers(1, 2000, size=200)]:
        bad = bytearray(good)
        bad[-start] ^= int(rng.integers(1, 256))
        file.write_bytes(bad)
        try:
            quality = load_router(file).predict("What is 37 + 58?").quality_M
        except ArtifactError:
            refused += 1
        else:
            assert np.isfinite(quality).all()
    assert refused > 100


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "the key 'path' is missing"),
        ({"path": "nowhere.npz"}, "nowhere.npz cannot be read"),
        ({"path": "router.npz", "temperature": 1}, "the key 'temperature' is unknown"),
        ({"path": "router.npz", "members": ["eve"]}, "the router knows nothing of 'eve'"),
        (
            {"path": "router.npz", "members": []},
            r"learned.members: \[\] is refused|clusters.members: \[\] is refused",
        ),
        ({"path": "router.npz", "answer_value_usd": "much"}, "answer_value_usd: 'much' is refused"),
        (
            {"path": "router.npz", "answer_value_usd": -1},
            "answer_value_usd: -1 is refused: it should be greater than 0",
        ),
        ({"path": "router.npz", "unfamiliar": {"answer": {}}}, "'members' is missing"),
        (
            {"path": "router.npz", "unfamiliar": "eve"},
            "names the model 'eve', which the pool lacks",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["learned", "clusters"])
def test_bad_specifications_are_refused(
    router: Router, tmp_path: Path, kind: str, spec: dict[str, object], message: str
) -> None:
    """The error names the key, the value and what is allowed."""
    save_router(router, tmp_path / "router.npz")
    with pytest.raises(PolicyError, match=message):
        build_policy({"kind": kind, **spec}, folder=tmp_path, models=FACTS)


def test_a_router_may_know_more_models_than_the_pool(router: Router, tmp_path: Path) -> None:
    """A pool that lost a model is refused, until `members` names those it still has."""
    save_router(router, tmp_path / "router.npz")
    pool = {name: FACTS[name] for name in ("adder", "large")}
    spec = {"kind": "learned", "path": "router.npz"}
    with pytest.raises(PolicyError, match="'speller', which the pool lacks"):
        build_policy(spec, folder=tmp_path, models=pool)
    smaller = build_policy({**spec, "members": ["adder", "large"]}, folder=tmp_path, models=pool)
    assert members_of(smaller) == ("adder", "large")
