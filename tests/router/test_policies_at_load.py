"""Whatever a policy may ever choose is checked when the pool loads, and refused by name there."""

from pathlib import Path
from typing import Any

import pytest

from models.pool import DEFAULT_POOL, load_pool
from policies.base import Query
from policies.errors import PolicyError
from router.catalog.catalog import Catalog, load_catalog
from router.config import AppArgs, ConfigError
from router.editions import catalog_of
from tests.router.conftest import write_pool

CHUNKS = ["arithmetic", "stories", "conversion", "numerals", "dates", "text", "lists", "code"]
MUTE = {"base_url": "http://127.0.0.1:1/v1", "logprobs": False}
ENGINES = [
    {"name": "one", "kind": "fake"},
    {"name": "two", "kind": "fake"},
    {"name": "mute", "kind": "remote", "options": MUTE},
]
MODELS = [
    *({"name": name, "engine": "one"} for name in CHUNKS),
    {"name": "base", "engine": "mute", "remote": {}},
    {"name": "far", "engine": "two"},
    {"name": "general", "engine": "one"},
]
LEARNED = {"kind": "learned", "path": str(DEFAULT_POOL / "router.npz")}
FRUGAL = {"kind": "frugal", "path": str(DEFAULT_POOL / "cascade.npz")}
MISSPELT = {"cascade": {"stages": ["text", "base"], "thresholds": [0.5], "scorer": "cascde"}}
TORN = {"answer": {"members": ["text", "far"], "rule": "gated"}}
GATED = {"answer": {"members": ["text", "code"], "rule": "gated"}}


def load(folder: Path, **policies: Any) -> Catalog:
    """Load a pool with a model that cannot be judged, `base`, and one on an engine of its own."""
    write_pool(folder, engines=ENGINES, models=MODELS, policies=policies)
    return load_catalog(load_pool(folder))


def budgeted(inner: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """Return the specification of a budget around `inner`."""
    return {"kind": "budgeted", "policy": inner, **keys}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (budgeted({"kind": "fixed", "plan": MISSPELT}), "cascade.scorer: 'cascde' is unknown"),
        (
            budgeted(budgeted({"kind": "fixed", "plan": {"best": {"candidates": [MISSPELT]}}})),
            "cascade.scorer: 'cascde' is unknown",
        ),
        ({**LEARNED, "unfamiliar": TORN}, "fuses text, far, which no one engine runs"),
        ({**LEARNED, "unfamiliar": MISSPELT}, "cascade.scorer: 'cascde' is unknown"),
        (budgeted({**LEARNED, "unfamiliar": TORN}), "fuses text, far, which no one engine runs"),
        (FRUGAL, "judges answers of 'base', whose engine 'mute' returns no log-prob"),
        (budgeted(FRUGAL), "judges answers of 'base', whose engine 'mute' returns no log-prob"),
        ({"kind": "fused", "answer": TORN["answer"]}, "fuses text, far, which no one engine runs"),
        (
            budgeted({"kind": "fixed", "plan": "text"}, fuse=[["text", "base"]]),
            "fuses 'base', whose engine 'mute' returns no log-prob",
        ),
        # A group is fused in the way that the policy's own plan is.
        (
            budgeted({"kind": "fixed", "plan": GATED}, fuse=[["text", "far"]]),
            "fuses text, far, which no one engine runs",
        ),
        ({**FRUGAL, "scorer": "confidence"}, "the pool has a scorer of that name already"),
    ],
)
def test_plans_that_cannot_run_are_refused_by_name(
    tmp_path: Path, spec: dict[str, Any], message: str
) -> None:
    """However deep a plan is wrapped, the error names the policy and what is wrong with it."""
    with pytest.raises(PolicyError, match=f"policies.trial: .*{message}"):
        load(tmp_path, auto={"kind": "fixed", "plan": "text"}, trial=spec)


def test_the_default_policy_is_checked_like_any(tmp_path: Path) -> None:
    """A bad default is refused under its name."""
    with pytest.raises(PolicyError, match=r"policies\.auto: .*'cascde' is unknown"):
        load(tmp_path, auto={"kind": "fixed", "plan": MISSPELT})


def test_open_weights_are_filled_in_inside_a_budget(tmp_path: Path) -> None:
    """A fixed plan whose weights wait for the router gets them, though a budget wraps it."""
    open_plan = {"answer": {"members": ["text", "code"], "weights": "router"}}
    catalog = load(tmp_path, auto=LEARNED, trial=budgeted({"kind": "fixed", "plan": open_plan}))
    decision = catalog.policies["trial"].decide(Query(text="Name a colour."))
    assert set(decision.scores) == {"text", "code"}


@pytest.mark.parametrize("section", ["carbon", "economics"])
def test_engines_that_the_pool_lacks_have_no_costs(tmp_path: Path, section: str) -> None:
    """A misspelt engine is refused by name: its device would silently be everybody's."""
    costs = {"device_usd": 1, "utilisation": 0.5, "usd_per_kwh": 0.2}
    content = {
        "carbon": {"engines": {"oen": {"device": "cpu"}}},
        "economics": {**costs, "engines": {"oen": None}},
    }
    pool = write_pool(tmp_path)
    args = AppArgs.model_validate({"pool": pool, section: content[section]})
    words = rf"{section}\.engines: 'oen' is no engine of the pool; allowed are one, two"
    with pytest.raises(ConfigError, match=words):
        catalog_of(args, load_pool(pool))
