"""Planning answers: the paper's example, budgets in every unit, and where constants come from."""

import pytest

from policies.carbon.llmcarbon import find_device
from policies.errors import LawError
from policies.laws.downscaling import MixtureLaw
from policies.laws.file import PoolLaws
from policies.laws.scaling import EnsembleLaw
from policies.planning import Site, budget_flops, plan_training

SITE = Site(
    device=find_device("h200"),
    num_devices=8,
    pue=1.1,
    gco2e_per_kwh=400.0,
    usd_per_device_hour=4.0,
)


def report(base_parameters=8e9, tokens=20e9, **options):
    """Plan for a base and a number of tokens per chunk."""
    return plan_training(
        base_parameters=base_parameters,
        flops=6 * base_parameters * tokens,
        site=SITE,
        sizes=(1, 2, 6, 7, 8),
        kept_share=0.9,
        **options,
    )


def test_the_papers_llama_3_8b_example_holds_from_seven_chunks():
    """Counted in billions from n = 7, counted in parameters from n = 2."""
    answer = report()
    assert answer.smallest_winning == 7
    assert answer.smallest_winning_counting_parameters == 2
    margins = {row.num_chunks: row.margin for row in answer.rows}
    assert margins[1] is None
    assert margins[6] == pytest.approx(0.6356 - 0.6592, abs=1e-4)
    assert margins[7] == pytest.approx(0.6783 - 0.6592, abs=1e-4)
    assert answer.shape_parameters == pytest.approx(8e9 / 7)


def test_chunks_share_the_bases_size_and_budget():
    """n chunks of N0/n parameters each see as many tokens as the base would."""
    answer = report()
    assert answer.tokens_per_chunk == pytest.approx(20e9)
    assert all(row.num_chunks * row.chunk_parameters == pytest.approx(8e9) for row in answer.rows)
    losses = [row.chunk_loss for row in answer.rows]
    assert losses == sorted(losses)


@pytest.mark.parametrize(
    "text",
    ["20e9 tokens", "9.6e20flops", "{mwh}MWh", "{kwh}kwh", "{t}tCO2e", "{g}gCO2e", "{usd}USD"],
)
def test_every_budget_unit_pays_for_the_same_training(text):
    """The cost of a run, given back as a budget in any unit, pays for that run's FLOPs."""
    carbon = report().carbon
    tonnes = carbon.operational_tco2e + carbon.embodied_tco2e
    budget = text.format(
        mwh=carbon.mwh,
        kwh=carbon.mwh * 1e3,
        t=tonnes,
        g=tonnes * 1e6,
        usd=carbon.device_hours * 4.0,
    )
    assert budget_flops(budget, base_parameters=8e9, site=SITE) == pytest.approx(9.6e20)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("plenty", "is not an amount and a unit"),
        ("3 parsecs", "allowed units are tokens"),
        ("0kWh", "above zero"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(text, message):
    """The error names the units that are allowed."""
    with pytest.raises(LawError, match=message):
        budget_flops(text, base_parameters=8e9, site=SITE)


def test_a_budget_in_dollars_needs_a_price():
    """Without USD per device hour the question has no answer."""
    site = Site(device=SITE.device, num_devices=1, pue=1.0, gco2e_per_kwh=1.0)
    with pytest.raises(LawError, match="price of a device hour"):
        budget_flops("10usd", base_parameters=8e9, site=site)


def test_a_pools_own_laws_replace_published_constants():
    """With laws.npz the ensemble's gain, the winning size and the domain share are the pool's."""
    mixture = MixtureLaw(
        A=20.0, B=15.0, C=0.2, E=1.5, alpha=0.2, beta=0.2, gamma=0.6, eta=0.5, epsilon=0.1
    )
    laws = PoolLaws(
        origin="measured on the test pool",
        ensemble_loss=EnsembleLaw(L0=2.0, a=0.5, b=0.1),
        mixture_general=mixture,
    )
    limit = mixture.predict(8e9, 20e9, 0.25)
    answer = report(laws=laws, general_loss_limit=limit)
    assert answer.rows[1].ensemble_loss == pytest.approx(
        answer.rows[1].chunk_loss - 0.1 * (1 - 2**-0.5)
    )
    assert answer.domain_share is not None
    assert mixture.predict(8e9, 20e9, 1 - answer.domain_share) == pytest.approx(limit)
    for question in ("ensemble loss", "domain share"):
        assert answer.origins[question] == "measured on the test pool"


def test_illustrations_are_not_passed_off_as_fitted():
    """Without own laws, the ensemble's constants are called an illustration."""
    origins = report().origins
    assert "illustration" in origins["ensemble loss"]
    assert "no constants are published" in origins["domain share"]
