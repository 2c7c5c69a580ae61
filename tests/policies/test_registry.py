"""Building policies from specifications."""

from pathlib import Path

import pytest

from policies.base import ModelFacts, Query
from policies.errors import PolicyError
from policies.footprint import Rates
from policies.plan import Answer
from policies.registry import build_policy

FREE = Rates(usd_per_input_token=0, usd_per_output_token=0)
MODELS = {name: ModelFacts(name=name, rates=FREE) for name in ("ada", "bob")}


def test_fixed_always_decides_its_plan() -> None:
    """A fixed policy returns the plan it was given, whatever is asked."""
    policy = build_policy({"kind": "fixed", "plan": "ada"}, folder=Path(), models=MODELS)
    assert policy.decide(Query(text="anything")).plan == Answer(members=("ada",))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "kind: None is unknown; allowed are .*fixed"),
        ({"kind": "oracle"}, "kind: 'oracle' is unknown"),
        ({"kind": "fixed"}, "the key 'plan' is missing"),
        ({"kind": "fixed", "plan": "ada", "plam": 1}, "the key 'plam' is unknown"),
        ({"kind": "fixed", "plan": "eve"}, "names the model 'eve', which the pool lacks"),
    ],
)
def test_bad_specifications_are_refused(spec: dict[str, object], message: str) -> None:
    """The error names the key or model that is wrong."""
    with pytest.raises(PolicyError, match=message):
        build_policy(spec, folder=Path(), models=MODELS)
