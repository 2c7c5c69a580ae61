"""The policies that every pool has, learnt from its members' outcomes, and what they are worth.

auto      the model, a chunk or the base, that the learned router expects most of for its price
cascade   stages from cheap to dear; the first answer that is likely right is taken (FrugalGPT)
fused     all chunks fused token by token: w_m ∝ prior_m^κ · exp(l_m / T), l_m being the prompt's
          log-likelihood and the prior what the cascade's scorer expects
best-of   all chunks side by side; the cascade's scorer picks

Everything is learnt on the router's questions. Where they are too few to learn from, a policy of
the same name does without.

Shapes: `Q` questions, `M` chunks.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.downscale.adapters import has_adapters
from models.downscale.answers import (
    Answered,
    answer_odds,
    answered_from_json,
    answered_to_json,
    ask,
    members_measured,
    outcomes,
    prompt_odds,
    score,
    summary,
)
from models.downscale.chunks import BASE
from models.downscale.members import card_of, member
from models.downscale.questions import questions
from models.downscale.stage import Run, progress_bar, read_json, stage, write_json
from policies.base import ModelFacts, Policy
from policies.cascade.answers import answer_table, predict
from policies.cascade.base import Confidence, Scorer
from policies.cascade.fit import fit_scorer
from policies.cascade.learn import learn_cascade
from policies.cascade.learned import LearnedCascade
from policies.cascade.scorer import LearnedScorer
from policies.encoders.base import build_encoder
from policies.errors import PolicyError
from policies.evaluation.play import play as play_one
from policies.evidence import Calibration, HeldOutAnswers, calibrate, evidence_weights, mixture_nll
from policies.fixed import Fixed
from policies.footprint import Rates
from policies.fused import best_members, with_prior
from policies.outcomes import Outcome
from policies.plan import Answer, Plan
from policies.registry import build_policy
from policies.routing.fit import FitSettings, fit_router
from policies.routing.router import save_router

Floats = NDArray[np.float64]

ROUTER_FILE, CASCADE_FILE = "router.npz", "cascade.npz"
FUSED: Final = "fused"
_TOP: Final = ("fused top 2", 2)
_FUSION, _POLICIES = "fusion.json", "policies.json"
# The base's price; a chunk costs its share of the base's parameters.
_USD_PER_MILLION_INPUT_TOKENS: Final = 0.04
_USD_PER_MILLION_OUTPUT_TOKENS: Final = 0.12
# Asking the base instead of a chunk must promise about seven more right answers in a hundred.
_ANSWER_VALUE_USD: Final = 0.00001
# The questions of a pool are short and few; 2^13 features of each kind tell them apart.
_ENCODER: Final = {"bits": 13}


def prices(run: Run) -> dict[str, tuple[float, float]]:
    """US dollars per million input and output tokens of each model; examples, to be replaced."""
    sizes = {name: card_of(run, name).parameters for name in (*run.domains, BASE)}
    return {
        name: (
            round(_USD_PER_MILLION_INPUT_TOKENS * size / sizes[BASE], 4),
            round(_USD_PER_MILLION_OUTPUT_TOKENS * size / sizes[BASE], 4),
        )
        for name, size in sizes.items()
    }


def model_facts(run: Run) -> dict[str, ModelFacts]:
    """What policies may know of each model."""
    return {
        name: ModelFacts(
            name=name,
            parameters=card_of(run, name).parameters,
            rates=Rates(usd_per_input_token=read / 1e6, usd_per_output_token=written / 1e6),
        )
        for name, (read, written) in prices(run).items()
    }


@stage("router")
def router(run: Run, folder: Path) -> None:
    """Stage: `router.npz`, where there is enough to learn from."""
    rows = outcomes(questions(run), members_measured(run))
    try:
        learned = fit_router(
            [row for row in rows if row.split == "router"],
            encoder=build_encoder("ngrams", _ENCODER),
            settings=FitSettings(seed=run.recipe.seed),
        )
    except PolicyError as error:
        run.report(f"router: no router: {error}")
        return
    save_router(learned, folder / ROUTER_FILE)
    run.report(f"router: {learned.facts['held_out']}")


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """How the chunks are fused: the plan whose weights wait for a prior, and that prior's power κ.

    `prior_QM` is what is expected of each chunk on each question; on those that it was learnt from,
    by a model that was learnt without them. None where there were too few.
    """

    plan: Answer
    prior_power: float
    prior_QM: Floats | None

    def plans(self, top: int | None) -> list[Answer]:
        """The plan of each question, with `top` members (None: all)."""
        assert self.prior_QM is not None
        found = []
        for prior_M in self.prior_QM:
            scores = dict(zip(self.plan.members, prior_M.tolist(), strict=True))
            primed = with_prior(
                best_members(self.plan, scores, top), scores, power=self.prior_power
            )
            assert isinstance(primed, Answer)
            found.append(primed)
        return found


def learn_fusion(
    rows: Sequence[Outcome],
    chunks: Sequence[str],
    rates: Mapping[str, Rates],
    *,
    answer_QTM: Floats,
    prompt_QM: Floats,
    seed: int,
) -> tuple[Fusion, Calibration]:
    """Calibrate the weights of a fusion of `chunks` on the router's rows of `rows`.

    `answer_QTM` and `prompt_QM` are the chunks' log-probabilities of the right answers' tokens and
    of the prompts.
    """
    learning = [i for i, row in enumerate(rows) if row.split == "router"]
    others = [i for i, row in enumerate(rows) if row.split != "router"]
    prior_QM: Floats | None = np.full_like(prompt_QM, 1 / len(chunks))
    assert prior_QM is not None
    try:
        singles: dict[str, Plan] = {name: Answer(members=(name,)) for name in rates}
        fitted = fit_scorer(answer_table([rows[i] for i in learning], singles, rates)[0], seed=seed)
        columns = [list(singles).index(name) for name in chunks]
        prior_QM[learning] = fitted.out_of_fold.prior_QS[:, columns]
        table = answer_table([rows[i] for i in others], singles, rates)[0]
        prior_QM[others] = predict(fitted.weights, table).prior_QS[:, columns]
    except PolicyError:
        known = False
    else:
        known = True
    found = calibrate(
        HeldOutAnswers(
            answer_QTM=answer_QTM[learning],
            prompt_QM=prompt_QM[learning],
            prior_QM=np.maximum(prior_QM[learning], 1e-6),
        )
    )
    plan = Answer(
        members=tuple(chunks), weighting="evidence", temperature=round(found.temperature, 4)
    )
    power = round(found.prior_power, 4) if known else 1.0
    return Fusion(plan=plan, prior_power=power, prior_QM=prior_QM if known else None), found


@stage("fusion")
def fusion(run: Run, folder: Path) -> None:
    """Stage: the calibrated fusion, and its answers to all questions."""
    asked, members = questions(run), members_measured(run)
    chunks = [members[name] for name in run.domains]
    facts = model_facts(run)
    learned, found = learn_fusion(
        outcomes(asked, members),
        run.domains,
        {name: facts[name].rates for name in members},
        answer_QTM=answer_odds(chunks),
        prompt_QM=prompt_odds(chunks),
        seed=run.recipe.seed,
    )
    if learned.prior_QM is None:
        ways = {FUSED: [learned.plan] * len(asked)}
    else:
        name, size = _TOP
        ways = {FUSED: learned.plans(None)}
        ways |= {name: learned.plans(size)} if len(run.domains) > size else {}
    whole = [BASE] if has_adapters(run) else []
    checkpoints = {name: member(run, name) for name in (*whole, *run.domains)}
    queries = [(asked[i].prompt, plan) for plans in ways.values() for i, plan in enumerate(plans)]
    with progress_bar(len(queries), "fusion", unit="questions") as advance:
        written = ask(
            checkpoints,
            queries,
            max_new_tokens=run.recipe.measure.max_new_tokens,
            progress=advance,
        )
    answers: dict[str, dict[str, Any]] = {}
    for n, (name, plans) in enumerate(ways.items()):
        own = written[n * len(asked) : (n + 1) * len(asked)]
        nll_Q = fused_nll(plans, run.domains, answer_odds(chunks), prompt_odds(chunks))
        answers[name] = answered_to_json(
            Answered(written=tuple(own), score_Q=score(asked, own, nll_Q))
        )
    write_json(
        folder / _FUSION,
        {
            "temperature": learned.plan.temperature,
            "prior_power": learned.prior_power,
            "learned": learned.prior_QM is not None,
            "calibration": asdict(found),
            "answers": answers,
        },
    )


def fused_nll(
    plans: Sequence[Answer], names: Sequence[str], answer_QTM: Floats, prompt_QM: Floats
) -> Floats:
    """The negative log-likelihoods of the right answers under each question's fusion, in nats.

    The members `names` alone tell it: a mixture's probability is the weighted mean of theirs.
    """
    weights_QM = np.zeros_like(prompt_QM)
    for q, plan in enumerate(plans):
        columns = [names.index(name) for name in plan.members]
        prior_M = plan.weights or (1.0,) * len(columns)
        weights_QM[q, columns] = evidence_weights(
            np.array([prior_M]), prompt_QM[q : q + 1, columns], temperature=plan.temperature or 1.0
        )[0]
    return mixture_nll(weights_QM, answer_QTM)


@stage("policies")
def policies(run: Run, folder: Path) -> None:
    """Stage: the files and specifications of the policies, and what they do on the test."""
    facts, found = model_facts(run), read_json(fusion(run) / _FUSION)
    fused = {name: answered_from_json(one) for name, one in found["answers"].items()}
    asked = questions(run)
    rows = outcomes(asked, {**members_measured(run), **fused})
    rates = {name: fact.rates for name, fact in facts.items()}
    temperature, prior_power = float(found["temperature"]), float(found["prior_power"])
    plan = Answer(members=run.domains, weighting="evidence", temperature=temperature)
    learned_router = router(run) / ROUTER_FILE
    if learned_router.exists():
        shutil.copy(learned_router, folder / ROUTER_FILE)
    cascade: LearnedCascade | None = None
    try:
        cascade = learn_stages(
            [row for row in rows if row.split == "router"],
            Fusion(plan=plan, prior_power=prior_power, prior_QM=None),
            rates,
            budget_share=run.recipe.measure.cascade_budget,
            seed=run.recipe.seed,
        )
        cascade.save(folder / CASCADE_FILE)
    except PolicyError as error:
        run.report(f"policies: no learned cascade: {error}")
    specs = specify(
        plan,
        prior_power=prior_power,
        routed=learned_router.exists(),
        learned=cascade is not None,
    )
    tests = [row for row in rows if row.split == "test"]
    tested = [question for question in asked if question.is_test]
    scorers: dict[str, Scorer] = {"confidence": Confidence()}
    if cascade is not None:
        scorers["cascade"] = LearnedScorer(cascade.weights, cascade.plans, cascade.top)
    played = {}
    for name, spec in specs.items():
        policy = build_policy(spec, folder=folder, models=facts)
        played[name] = play(policy, tests, facts, scorers)
        run.report(f"policies: {name}: {summary(tested, np.array(played[name]['scores']))}")
    single = {
        name: play(Fixed(plan=Answer(members=(name,))), tests, facts, scorers)["usd"]
        for name in facts
    }
    write_json(
        folder / _POLICIES, {"specs": specs, "played": {"policies": played, "single": single}}
    )


def policies_of(run: Run) -> dict[str, Any]:
    """What the stage found: `specs` by name, and what was `played` on the test questions: what each
    of `policies` did, and the cost of each `single` model."""
    return read_json(policies(run) / _POLICIES)


def learn_stages(
    rows: Sequence[Outcome],
    fused: Fusion,
    rates: Mapping[str, Rates],
    *,
    budget_share: float,
    seed: int,
    last: Sequence[str] | None = None,
) -> LearnedCascade:
    """The most accurate cascade of chunks, base and fusions within a share of the base's cost.

    `rows` hold the answers of all of these; `last` names the stages it may end with (None: any).

    Raises:
        PolicyError: there are too few rows.
    """
    plans: dict[str, Plan] = {name: Answer(members=(name,)) for name in rates}
    plans |= {name: fused.plan for name in (FUSED, _TOP[0]) if name in rows[0].scores}
    top = dict([_TOP]) if _TOP[0] in plans else {}
    table, usd_QS = answer_table(rows, plans, rates, top)
    always_base = float(usd_QS[:, list(plans).index(BASE)].mean())
    return learn_cascade(
        table,
        usd_QS,
        budget=max(budget_share * always_base, float(usd_QS.mean(0).min())),
        routed=fused.plan.members,
        seed=seed,
        prior_power=fused.prior_power,
        last=last,
    )


def specify(
    plan: Answer, *, prior_power: float, routed: bool, learned: bool
) -> dict[str, dict[str, Any]]:
    """The specifications of the four policies; `routed` and `learned` say whether there is a
    router and a cascade."""
    chunks = list(plan.members)
    answer = {"members": chunks, "weights": "evidence", "temperature": plan.temperature}
    alone = {"answer": {"members": [BASE]}}
    auto: dict[str, Any] = {"kind": "fixed", "plan": alone}
    if routed:
        auto = {
            "kind": "learned",
            "path": ROUTER_FILE,
            "answer_value_usd": _ANSWER_VALUE_USD,
            "unfamiliar": BASE,
        }
    frugal: dict[str, Any] = {"kind": "frugal", "path": CASCADE_FILE}
    if learned:
        cascade = frugal
        fused = {"kind": "fused", "answer": answer, "prior_power": prior_power, "router": frugal}
        best = {"candidates": chunks, "select": "scorer", "scorer": "cascade"}
    else:
        stages = {"stages": [{"answer": answer}, alone], "thresholds": [0.9]}
        cascade = {"kind": "fixed", "plan": {"cascade": {**stages, "scorer": "confidence"}}}
        fused = {"kind": "fixed", "plan": {"answer": answer}}
        best = {"candidates": chunks, "select": "majority"}
    best_of = {"kind": "fixed", "plan": {"best": best}}
    return {"auto": auto, "cascade": cascade, "fused": fused, "best-of": best_of}


def play(
    policy: Policy,
    rows: Sequence[Outcome],
    facts: Mapping[str, ModelFacts],
    scorers: Mapping[str, Scorer],
) -> dict[str, list[float]]:
    """What `policy` decides for each question of `rows`, played on the answers stored there.

    Returns, per question, the answer's score, what it cost in US dollars, and the parameters that
    were at work on each token.
    """
    rates = {name: fact.rates for name, fact in facts.items()}
    played = [play_one(policy, row, rates=rates, scorers=scorers, name_of=_name_of) for row in rows]
    sizes = {name: fact.parameters or 0 for name, fact in facts.items()}
    return {
        "scores": [one.quality for one in played],
        "usd": [one.usd or 0.0 for one in played],
        "parameters": [float(sum(sizes[name] for name, _ in one.used)) for one in played],
    }


def _name_of(answer: Answer, row: Outcome) -> str:
    """The name under which the outcomes hold what an answer's members wrote."""
    if len(answer.members) == 1:
        return answer.members[0]
    name, size = _TOP
    return name if len(answer.members) == size and name in row.scores else FUSED
