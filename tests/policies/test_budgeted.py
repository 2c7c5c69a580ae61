"""`kind: budgeted`: a policy and a controller from a specification."""

import pytest

from policies.base import ModelFacts, Policy, Query, members_of
from policies.budgeted import Budgeted
from policies.errors import PolicyError
from policies.footprint import Footprint, Limits, Rates
from policies.laws.file import PoolLaws, write_laws
from policies.laws.scaling import EnsembleLaw
from policies.plan import members
from policies.registry import build_policy

PRICE = Rates(
    usd_per_input_token=1e-6,
    usd_per_output_token=1e-6,
    wh_per_output_token=0.01,
    gco2e_per_wh=0.4,
)
MODELS = {name: ModelFacts(name=name, rates=PRICE) for name in ("a", "b", "c", "d")}
FUSED = {"kind": "fixed", "plan": {"answer": {"members": ["a", "b", "c"]}}}


def build(tmp_path, **keys):
    """Build a budgeted policy over a fixed fusion of three."""
    spec = {"kind": "budgeted", "policy": FUSED, **keys}
    return build_policy(spec, folder=tmp_path, models=MODELS)


def test_a_request_with_a_carbon_ceiling_uses_fewer_members(tmp_path):
    """Without a ceiling all three answer; with one, as many as fit."""
    policy = build(tmp_path)
    assert isinstance(policy, Policy)
    free = policy.decide(Query(text="hi", max_tokens=100))
    capped = policy.decide(Query(text="hi", max_tokens=100, limits=Limits(max_gco2e=0.5)))
    assert len(members(free.plan)) == 3
    assert len(members(capped.plan)) == 1


def test_the_pools_laws_are_read_where_there_are_any(tmp_path):
    """laws.npz beside the pool makes unscored ensembles worth their gain; it is optional."""
    keys = {"targets": [{"resource": "wh", "amount": 3.0}], "fuse": [["a", "b", "c", "d"]]}
    query = Query(text="hi")
    without = build(tmp_path, **keys).decide(query).details["budget"]["quality"]
    law = EnsembleLaw(L0=0.5, a=1.0, b=0.3)
    write_laws(tmp_path / "laws.npz", PoolLaws(origin="test", ensemble_error=law))
    policy = build(tmp_path, **keys)
    assert policy.decide(query).details["budget"]["quality"] == pytest.approx(without + law.gain(3))
    assert members_of(policy) == ("a", "b", "c", "d")


def test_what_was_measured_reaches_the_controller(tmp_path):
    """`settle` corrects the estimate."""
    policy = build(tmp_path, targets=[{"resource": "usd", "amount": 1, "per": "1000_requests"}])
    assert isinstance(policy, Budgeted)
    query = Query(text="hi", prompt_tokens=10)
    policy.settle(query, policy.decide(query), Footprint(usd=0.25))
    assert policy.controller.spent() == {"usd": pytest.approx(0.25)}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"policy": "fixed"},
            "budgeted.policy: 'fixed' is refused: it should be a valid dictionary",
        ),
        ({"target": []}, "'target' is unknown"),
        ({"targets": {"resource": "wh"}}, "budgeted.targets: .* is refused: it should be a list"),
        ({"targets": [{"resource": "wh"}]}, "budgeted.targets.0: the key 'amount' is missing"),
        (
            {"targets": [{"resource": "time", "amount": 1.0}]},
            "budgeted.targets.0.resource: 'time' is refused: it should be 'usd', 'wh' or 'gco2e'",
        ),
        (
            {"targets": [{"resource": "wh", "amount": 0.0}]},
            "budgeted.targets.0.amount: 0.0 is refused: it should be greater than 0",
        ),
        ({"targets": [{"resource": "wh", "amount": 1, "each": "hour"}]}, "'each' is unknown"),
        (
            {"targets": [{"resource": "wh", "amount": "1"}]},
            "budgeted.targets.0.amount: '1' is refused: it should be a valid number",
        ),
        (
            {"quality_floor": 1.5},
            "quality_floor: 1.5 is refused: it should be less than or equal to 1",
        ),
        ({"max_usd": -1}, "max_usd: -1 is refused: it should be greater than 0"),
        ({"window_hours": True}, "window_hours: True"),
        ({"fuse": ["a", "b"]}, "budgeted.fuse.0: 'a' is refused: it should be a list"),
        ({"fuse": [["a", "zebra"]]}, "'zebra' is unknown; the pool has a, b, c, d"),
        ({"laws": "mine.npz"}, "mine.npz cannot be read"),
        ({"policy": {"kind": "magic"}}, "'magic' is unknown"),
    ],
)
def test_bad_specifications_are_refused(tmp_path, keys, message):
    """The error names the key, the value and what is allowed."""
    with pytest.raises(PolicyError, match=message):
        build(tmp_path, **keys)
