"""The policy that defers token by token."""

from pathlib import Path
from typing import Any

import pytest

from policies.base import ModelFacts, Query, members_of
from policies.errors import PolicyError
from policies.footprint import Rates
from policies.plan import Answer, Cascade
from policies.registry import build_policy
from policies.speculative import Speculative
from tests.policies.test_fused import Scores

FREE = Rates(usd_per_input_token=0, usd_per_output_token=0)
MODELS = {name: ModelFacts(name=name, rates=FREE) for name in ("ada", "bob", "base")}
LED = Answer(members=("ada", "base"), weights=(0, 1), rule="gated", gate=0.7)


def build(**spec: Any) -> Any:
    """The policy that a pool file would describe."""
    return build_policy({"kind": "speculative", **spec}, folder=Path(), models=MODELS)


def test_one_lead_writes_every_answer() -> None:
    """Its base has the say where it is unsure, with all the weight."""
    policy = build(leads=["ada"], base="base", gate=0.7)
    assert policy.decide(Query(text="?")).plan == LED
    assert list(policy.plans()) == [LED]


def test_a_router_chooses_the_lead() -> None:
    """The chunk that it would have asked leads, with what it predicts; others answer alone."""
    routed = Speculative(["ada", "bob"], "base", gate=0.7, router=Scores(ada=0.9))
    decision = routed.decide(Query(text="?"))
    assert (decision.plan, decision.scores) == (LED, {"ada": 0.9})
    elsewhere = Speculative(["bob"], "base", gate=0.7, router=Scores(ada=0.9))
    assert elsewhere.decide(Query(text="?")).plan == Answer(members=("ada",))
    assert set(members_of(elsewhere)) == {"ada", "bob", "base"}


def test_a_cascade_of_the_router_stays_one() -> None:
    """Only an answer of one lead alone is led."""
    plan = Cascade(stages=(Answer(members=("ada",)), Answer(members=("base",))), thresholds=(0.5,))
    inner = build_policy({"kind": "fixed", "plan": plan}, folder=Path(), models=MODELS)
    policy = Speculative(["ada", "bob"], "base", gate=0.7, router=inner)
    assert policy.decide(Query(text="?")).plan == plan


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"leads": ["ada", "bob"], "base": "base"}, "speculative.router is missing"),
        ({"leads": [], "base": "base"}, "speculative.leads"),
        ({"leads": ["ada"]}, "the key 'base' is missing"),
        ({"leads": ["ada"], "base": "base", "gate": 2}, "speculative.gate: 2 is refused"),
        ({"leads": ["ada"], "base": "ada"}, "'ada' is the base"),
        ({"leads": ["eve"], "base": "base"}, "names the model 'eve', which the pool lacks"),
    ],
)
def test_senseless_settings_are_refused(spec: dict[str, Any], message: str) -> None:
    """By key and value."""
    with pytest.raises(PolicyError, match=message):
        build(**spec)
