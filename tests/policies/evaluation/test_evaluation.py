"""Metrics by hand, protocols that leak nothing, the harness on outcomes with a known answer."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from matplotlib.figure import Figure

from policies.encoders.ngrams import NGrams
from policies.errors import OutcomesError, PolicyError
from policies.evaluation.judge import evaluate_protocol, evaluate_router
from policies.evaluation.metrics import (
    Curve,
    aiq,
    apgr,
    bootstrap,
    cpt,
    two_model_curve,
    wilson_interval,
)
from policies.evaluation.report import draw_reliability, table
from policies.importers.benchmarks import import_routellm_mmlu
from policies.outcome_sets import near_duplicates
from policies.outcomes import Outcome
from policies.routing.fit import FitSettings, fit_router, reliability
from policies.routing.router import Router, load_router, save_router
from tests.bench.routing_harness import Protocol, draw_curves, evaluate, folds

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "routing"


def make_outcomes(num_queries: int = 200) -> list[Outcome]:
    """Return two tasks that one model each knows, a fifth of the queries split off (seed 0)."""
    rng = np.random.default_rng(0)
    outcomes = []
    for row in range(num_queries):
        sums = bool(rng.integers(2))
        a, b, c = rng.integers(1000, size=3)
        outcomes.append(
            Outcome(
                query=f"add {a} to {b} then {c}" if sums else f"spell {a} as words {b} or {c}",
                scores={"weak": float(not sums), "strong": float(sums)},
                tags=("sums" if sums else "words",),
                split="test" if row % 5 == 0 else "train",
            )
        )
    return outcomes


def fitted(outcomes: Sequence[Outcome], num_clusters: int = 4) -> Router:
    """Return a small router of these outcomes."""
    return fit_router(
        outcomes,
        encoder=NGrams(bits=10, num_dimensions=4),
        settings=FitSettings(num_clusters=num_clusters),
    )


def test_apgr_and_cpt_by_hand() -> None:
    """Four queries, two of which gain: a perfect order, a random-like one, the reverse."""
    weak, strong = np.array([0.0, 0, 1, 1]), np.array([1.0, 1, 1, 1])
    perfect = two_model_curve(np.array([4.0, 3, 2, 1]), weak, strong)
    np.testing.assert_allclose(perfect.quality_P, [0.5, 0.75, 1, 1, 1])
    assert apgr(perfect) == pytest.approx(0.75)
    assert (cpt(perfect, 0.5), cpt(perfect, 0.8)) == (0.25, 0.5)
    reverse = two_model_curve(np.array([1.0, 2, 3, 4]), weak, strong)
    assert apgr(reverse) == pytest.approx(0.25)
    assert apgr(perfect) + apgr(reverse) == pytest.approx(1)


@pytest.mark.parametrize("reverse", [1, -1])
def test_the_order_of_the_file_gains_a_router_nothing(reverse: int) -> None:
    """Who prefers all alike is a coin, though those that gain stand first, or last."""
    weak, strong = np.array([0.0, 0, 1, 1, 1])[::reverse], np.ones(5)
    alike = two_model_curve(np.zeros(5), weak, strong)
    assert apgr(alike) == pytest.approx(0.5)
    assert cpt(alike, 0.5) == 0.6  # of five calls, the third is the first to recover half
    two_kinds = two_model_curve(np.array([1.0, 0, 0, 1, 0])[::reverse], weak, strong)
    np.testing.assert_allclose(two_kinds.quality_P, [9 / 15, 0.7, 0.8, 13 / 15, 14 / 15, 1])


def test_aiq_is_the_area_under_the_non_decreasing_hull() -> None:
    """Points below the hull and worse dearer ones do not count."""
    curve = Curve(cost_P=np.array([0.0, 0.5, 1.0, 2.0]), quality_P=np.array([0.0, 0.1, 1.0, 0.5]))
    assert aiq(curve, 2.0) == pytest.approx((0.5 + 1.0) / 2)


def test_bootstrap_covers_the_mean() -> None:
    """The interval of a mean is about ±1.96 standard errors (seed 0)."""
    values = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap(lambda rows: float(values[rows].mean()), 400)
    assert (high - low) / 2 == pytest.approx(1.96 / 20, rel=0.15)
    assert low < values.mean() < high


def test_near_duplicates_are_found() -> None:
    """Case, punctuation and one changed word in many do not hide a repeated question."""
    question = (
        "A train leaves the station at nine and travels for three hours at sixty miles an hour"
    )
    texts = [
        question,
        question.upper() + " !!",
        question + " today",
        "How far is the moon from the earth in miles?",
        "",
    ]
    assert near_duplicates(texts) == {0: {1, 2}, 1: {0, 2}, 2: {0, 1}}
    assert near_duplicates(["short", "", ""]) == {1: {2}, 2: {1}}
    assert near_duplicates(["🎉", "🎈 ", "∑", "🎈"]) == {1: {3}, 3: {1}}


@pytest.mark.parametrize("protocol", ["folds", "tasks", "split"])
def test_protocols_never_test_on_training_rows(protocol: str) -> None:
    """Parts are disjoint, every row is tested once, and left-out tasks are whole."""
    outcomes = make_outcomes()
    tested: list[int] = []
    for train, test in folds(outcomes, protocol):  # type: ignore[arg-type]
        assert not set(train) & set(test)
        if protocol == "tasks":
            tags = [{outcomes[row].tags for row in rows} for rows in (train, test)]
            assert not tags[0] & tags[1]
        tested += test
    assert len(tested) == len(set(tested)) == (40 if protocol == "split" else 200)


def test_protocols_need_tags_and_splits() -> None:
    """Outcomes without tags or splits are refused with the reason."""
    bare = [Outcome(query=str(row), scores={"a": 1}) for row in range(10)]
    with pytest.raises(OutcomesError, match="needs a tag"):
        next(folds(bare, "tasks"))
    with pytest.raises(OutcomesError, match="lack the split 'train' or 'test'"):
        next(folds(bare, "split"))


def test_the_harness_ranks_methods_as_it_must(tmp_path: Path) -> None:
    """Learned routes separable tasks perfectly; oracles bound everything; plots are small."""
    report = evaluate(
        make_outcomes(),
        title="two tasks",
        protocol="split",
        encoders={
            "small": lambda: NGrams(bits=10, num_dimensions=4),
            "smaller": lambda: NGrams(bits=8, num_dimensions=4),
        },
        models=("weak", "strong"),
        relative_cost=(0.0, 1.0),
        settings=FitSettings(num_clusters=4),
    )
    by_name = {row.method: row for row in report.results}
    assert by_name["Learned, small"].accuracy == 1.0
    assert by_name["Learned, small"].fold_apgrs == (pytest.approx(by_name["Learned, small"].apgr),)
    assert {"Clusters, smaller", "Learned, smaller"} <= set(by_name)
    assert by_name["task classifier"].accuracy == 1.0
    assert by_name["per-query oracle"].accuracy == 1.0
    assert by_name["best single"].accuracy < 0.7
    assert by_name["Learned, small"].decision_us is not None
    text = table(report)
    assert text.count("\n|") == len(report.results) + 2
    draw_curves(report, tmp_path / "curves.png")
    assert 1_000 < (tmp_path / "curves.png").stat().st_size < 150_000


@pytest.mark.parametrize("protocol", ["folds", "tasks", "split"])
def test_no_test_query_nor_its_like_is_trained_on(
    protocol: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries repeated in other words' case or across splits are kept out, and counted."""
    outcomes = [
        Outcome(
            query=f"question {row // 2} asks of {row // 2 * 7} sharks and {row // 2 + 5} corals"
            + ("!" if row % 2 else ""),
            scores={"weak": float(row % 4 < 2), "strong": 1.0},
            tags=(f"task {row % 3}",),
            split="test" if row % 5 == 0 else "train",
        )
        for row in range(120)
    ]
    trained: list[set[str]] = []

    def spied(rows: Sequence[Outcome], **options: Any) -> Router:
        trained.append({row.query.rstrip("!") for row in rows})
        return fit_router(rows, **options)

    monkeypatch.setattr("tests.bench.routing_harness.fit_router", spied)
    report = evaluate(
        outcomes,
        title="pairs",
        protocol=protocol,
        encoders={"small": lambda: NGrams(bits=10, num_dimensions=4)},
        models=("weak", "strong"),
        relative_cost=(0.0, 1.0),
        settings=FitSettings(num_clusters=2),
    )
    parts = list(folds(outcomes, protocol))
    assert len(trained) == len(parts)
    num_removed = 0
    for seen, (train, test) in zip(trained, parts, strict=True):
        tested = {outcomes[row].query.rstrip("!") for row in test}
        assert not seen & tested
        num_removed += sum(outcomes[row].query.rstrip("!") in tested for row in train)
    assert num_removed > 0
    assert report.overlap == f"{num_removed} near-duplicates kept out of training"


def test_a_trained_router_is_judged_on_new_queries(tmp_path: Path) -> None:
    """`shoal evaluate router` compares with best single and oracles, for any subset of models."""
    outcomes = make_outcomes()
    router = fitted(outcomes[:120])
    report, diagram = evaluate_router(router, outcomes[120:])
    by_name = {row.method: row.accuracy for row in report.results}
    assert by_name["Learned"] == by_name["per-query oracle"] == 1.0
    # Of two models the worse counts as the weak one, in whatever order the router has them.
    assert report.models == ("weak", "strong")
    assert evaluate_router(router, outcomes[120:], models=["strong", "weak"])[0].models == (
        report.models
    )
    assert by_name["random"] < 0.7
    draw_reliability(diagram, "two tasks", tmp_path / "reliability.png")
    assert (tmp_path / "reliability.png").stat().st_size > 1_000
    with pytest.raises(PolicyError, match="knows nothing of 'eve'"):
        evaluate_router(router, outcomes, models=["eve"])


def test_nobody_judges_on_what_was_trained_on_without_saying_so(tmp_path: Path) -> None:
    """Known queries are left out one by one, in any order and from a file; with `seen` they count.

    Queries without every model's score are left out and counted, too.
    """
    outcomes = make_outcomes()
    trained = fitted(outcomes[:120])
    save_router(trained, tmp_path / "router.npz")
    router = load_router(tmp_path / "router.npz")
    with pytest.raises(PolicyError, match="trained on every query that has all scores"):
        evaluate_router(router, outcomes[30:110])
    rows = [replace(outcomes[-1], scores={"weak": 1.0}), *outcomes[100:]]
    report, _ = evaluate_router(router, rows)
    assert report.num_test == 80
    assert report.overlap == "left out: 1 that lack a score, 20 that were trained on"
    report, _ = evaluate_router(router, outcomes[100:], seen=True)
    assert report.num_test == 100
    assert report.overlap == "20 were trained on"


def test_a_task_oracle_and_rows_by_task_need_several_tasks() -> None:
    """The table has a row per task and their mean; of a single task there is neither."""
    outcomes = make_outcomes()
    router = fitted(outcomes[:120])
    report, _ = evaluate_router(router, outcomes[120:])
    assert "dataset oracle" in {row.method for row in report.results}
    assert report.by_task["sums"]["Learned"] == report.by_task["words"]["Learned"] == 1.0
    assert "| mean over tasks |" in table(report)
    same = [replace(one, tags=("all",)) for one in outcomes[120:]]
    report, _ = evaluate_router(router, same)
    assert "dataset oracle" not in {row.method for row in report.results}
    assert report.by_task == {}


@pytest.mark.parametrize("protocol", ["folds", "tasks", "split"])
def test_a_protocol_trains_on_parts_and_judges_on_the_rest(
    protocol: Literal["folds", "tasks", "split"],
) -> None:
    """Every test query is judged once, by a router that was fitted without it."""
    outcomes = make_outcomes()
    trained: list[list[Outcome]] = []

    def fit(rows: Sequence[Outcome]) -> Router:
        trained.append(list(rows))
        return fitted(rows, 2)

    report = evaluate_protocol(outcomes, fit=fit, protocol=protocol, models=["weak", "strong"])
    num_left_out = sum(len(outcomes) - len(rows) for rows in trained)
    assert report.num_test == num_left_out
    assert num_left_out == (len(outcomes) // 5 if protocol == "split" else len(outcomes))
    if protocol == "tasks":
        assert [{one.tags for one in rows} for rows in trained] == [{("words",)}, {("sums",)}]


def test_of_two_models_the_lower_mean_is_the_weak_one_under_a_protocol_too() -> None:
    """APGR is measured from the weak one up, whichever is named first."""
    outcomes = make_outcomes()

    def fit(rows: Sequence[Outcome]) -> Router:
        return fit_router(rows, encoder=NGrams(bits=10, num_dimensions=4))

    first, second = (
        evaluate_protocol(outcomes, fit=fit, protocol="split", models=models)
        for models in (["weak", "strong"], ["strong", "weak"])
    )
    assert first.models == second.models
    assert [row.apgr for row in first.results] == [row.apgr for row in second.results]


def test_a_protocol_says_which_part_cannot_be_trained_on() -> None:
    """A model that only one task scores cannot be learned without it."""
    outcomes = [
        replace(one, scores={"weak": one.scores["weak"]}) if one.tags == ("words",) else one
        for one in make_outcomes(60)
    ]

    def fit(rows: Sequence[Outcome]) -> Router:
        return fit_router(rows, encoder=NGrams(bits=10), models=["weak", "strong"])

    with pytest.raises(PolicyError, match=r"--protocol tasks, without sums: .*'strong' has"):
        evaluate_protocol(outcomes, fit=fit, protocol="tasks")


def test_two_models_of_one_mean_have_no_gap_to_recover() -> None:
    """No APGR, instead of one that is not a number."""
    outcomes = make_outcomes()
    even = [replace(one, scores={"weak": 0.5, "strong": 0.5}) for one in outcomes]
    router = fit_router(outcomes, encoder=NGrams(bits=10, num_dimensions=4))
    report, _ = evaluate_router(router, even, seen=True)
    assert all(row.apgr is None for row in report.results) and "nan" not in table(report)


def test_costs_that_are_known_make_an_aiq() -> None:
    """Where every outcome says what every model costs; else there is none."""
    outcomes = make_outcomes()
    router = fitted(outcomes[:120])
    assert all(row.aiq is None for row in evaluate_router(router, outcomes[120:])[0].results)
    priced = [replace(one, costs={"weak": 1.0, "strong": 3.0}) for one in outcomes[120:]]
    report, _ = evaluate_router(router, priced)
    by_name = {row.method: row.aiq for row in report.results}
    assert by_name["per-query oracle"] == by_name["Learned"]
    assert by_name["Learned"] is not None
    # A mean of scores over the costs that can be had, of two models as of many.
    assert all(row.aiq is None or 0 <= row.aiq <= 1 for row in report.results)
    # One cost that nobody knows is the model's mean; a model without any leaves no AIQ.
    some = [replace(priced[0], costs={"weak": 1.0}), *priced[1:]]
    again, _ = evaluate_router(router, some)
    assert [row.usd for row in again.results] == [row.usd for row in report.results]
    assert "| cost / 1,000 |" in table(again)
    none = [replace(one, costs={"weak": 1.0}) for one in priced]
    assert all(row.usd is None for row in evaluate_router(router, none)[0].results)


def test_a_long_title_stays_inside_the_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protocol, data set and calibration error are all to be read."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    diagram = reliability(np.array([0.2, 0.8]), np.array([0.0, 1.0]), num_bins=2)
    title = "LLMRouter, nine models, trained on train, tested on test"
    draw_reliability(diagram, title, tmp_path / "plot")
    [figure] = figures
    [axes] = figure.axes
    assert " ".join(axes.get_title().split()) == f"{title} ECE 0.200"
    box = axes.title.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    assert box.y1 <= figure.bbox.height
    assert (tmp_path / "plot").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no published data at {DATA}")
def test_the_oracles_apgr_is_the_published_one() -> None:
    """On RouteLLM's MMLU answers the per-query oracle's APGR is 1.285."""
    outcomes = import_routellm_mmlu(DATA / "RouteLLM" / "mmlu")
    weak, strong = (np.array([list(o.scores.values())[m] for o in outcomes]) for m in (0, 1))
    assert apgr(two_model_curve(strong - weak, weak, strong)) == pytest.approx(1.285, abs=5e-4)


@pytest.mark.parametrize(
    ("score", "num_rated", "low", "high"),
    [(8.0, 10, 0.4902, 0.9433), (0.0, 10, 0.0, 0.2775), (10.0, 10, 0.7225, 1.0)],
)
def test_wilson_interval(score: float, num_rated: int, low: float, high: float) -> None:
    """The interval is the textbook's, also at the ends, and never leaves [0, 1]."""
    assert wilson_interval(score, num_rated) == pytest.approx((low, high), abs=1e-4)
