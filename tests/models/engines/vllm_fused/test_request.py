"""What a request may ask of a fused ensemble, and what is refused."""

import pytest

from models.engines.base import Evidence
from models.engines.vllm_fused.request import read_request

MEMBERS = ("law", "medicine", "code")


def test_nothing_asked() -> None:
    """A request without shoal_* arguments gets the default, whatever else it carries."""
    assert read_request(None, MEMBERS) is None
    assert read_request({"kv_transfer_params": 1}, MEMBERS) is None


def test_weights_are_normalized() -> None:
    """Weights are relative and in the folder's order; members that are not named get none."""
    asked = read_request({"shoal_weights": [2, 1, 1]}, MEMBERS)
    assert asked is not None
    assert asked.weights == (0.5, 0.25, 0.25)
    asked = read_request({"shoal_members": ["code", "law"], "shoal_weights": [3, 1]}, MEMBERS)
    assert asked is not None
    assert asked.weights == (0.25, 0, 0.75)
    asked = read_request({"shoal_members": ["code"]}, MEMBERS)
    assert asked is not None
    assert asked.weights == (0, 0, 1)


def test_rule_and_evidence() -> None:
    """The rule and both kinds of evidence are read."""
    asked = read_request({"shoal_rule": "product", "shoal_evidence": "mean"}, MEMBERS)
    assert asked is not None
    assert asked.product
    assert asked.evidence == Evidence(temperature=1.0, per_token=True)
    asked = read_request({"shoal_evidence": "sum", "shoal_evidence_temperature": 2}, MEMBERS)
    assert asked is not None
    assert not asked.product
    assert asked.evidence == Evidence(temperature=2.0)


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"shoal_weight": [1, 1, 1]}, "shoal_weight is unknown; allowed are shoal_members"),
        ({"shoal_weights": [1, 1]}, "for each of the 3 members law, medicine, code"),
        ({"shoal_weights": [0, 0, 0]}, "not all zero"),
        ({"shoal_weights": [1, -1, 1]}, "finite number >= 0"),
        ({"shoal_weights": [1, float("nan"), 1]}, "finite number >= 0"),
        ({"shoal_weights": [1e308, 1e308, 1]}, "finite number >= 0"),
        ({"shoal_weights": "uniform"}, "'uniform' is not one finite number"),
        ({"shoal_weights": [True, True, True]}, "finite number >= 0"),
        ({"shoal_members": "law"}, "'law' is not a list of names"),
        ({"shoal_members": []}, "is not a list of names"),
        ({"shoal_members": ["law", "law"]}, "'law' is unknown or named twice"),
        ({"shoal_members": ["tax"]}, "'tax' is unknown or named twice; allowed are law"),
        ({"shoal_rule": "median"}, "shoal_rule: 'median' is unknown; allowed are mixture, product"),
        ({"shoal_rule": ["mixture"]}, "allowed are mixture, product"),
        ({"shoal_evidence": 1}, "shoal_evidence: 1 is unknown; allowed are sum, mean"),
        ({"shoal_evidence": "sum", "shoal_evidence_temperature": 0}, "not a finite number > 0"),
        ({"shoal_evidence_temperature": 1}, "needs shoal_evidence"),
    ],
)
def test_refusals(extra_args: dict[str, object], message: str) -> None:
    """A bad value is refused with the key, the value and what is allowed."""
    with pytest.raises(ValueError, match="shoal_") as error:
        read_request(extra_args, MEMBERS)
    assert message in str(error.value)
