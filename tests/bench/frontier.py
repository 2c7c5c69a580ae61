"""Every policy on the pool's held-out queries: accuracy, cost, fusion weights, Pareto frontier.

    python -m tests.bench.frontier [--pool POOL] [--budget 40] [--queries 3200 1600] [--install]

Learns scorer, cascades and evidence temperature on the outcomes' split "router" and measures on
"test". Writes docs/cascade/{frontier.png,results.md} and one JSON line. `--install` also writes
cascade.npz beside pool.yaml and the policies cascade, fused and best-of into it. Takes a few
minutes on two cores; seed 0.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from models.downscale.chunks import BASE
from models.downscale.policies import CASCADE_FILE, Fusion, learn_stages, specify
from models.pool import DEFAULT_POOL, Pool, load_pool
from models.pool_text import write_policies
from policies.base import ModelFacts
from policies.carbon.llmcarbon import find_device, rates_for
from policies.cascade.answers import AnswerTable, Floats, answer_table, predict
from policies.cascade.base import normalise
from policies.cascade.fit import fit_scorer
from policies.cascade.frontier import pareto
from policies.cascade.learn import measure_stops, replay_cascade
from policies.cascade.learned import LearnedCascade
from policies.cascade.scorer import LearnedScorer
from policies.evidence import HeldOutAnswers, calibrate, evidence_weights, mixture_nll
from policies.fused import with_prior
from policies.outcomes import Outcome, read_outcomes
from policies.plan import Answer, Plan
from tests.bench.frontier_data import fused_outcomes, likelihoods
from tests.bench.frontier_plot import Row, draw, pick, thinned

DOCS = Path(__file__).parents[2] / "docs" / "cascade"
DEVICE = "h200"
# The fusions that a cascade may have as stages, and how many members of each run (None: all).
FUSED = {"fused": None, "fused top 2": 2}
TOP = {name: size for name, size in FUSED.items() if size is not None}
CASCADES = ("cascade", "cascade with fused stages", "cascade, fused last")
SEED = 0


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pool", type=Path, default=DEFAULT_POOL)
    parser.add_argument("--budget", type=float, default=40, help="percent of always-base cost")
    parser.add_argument(
        "--queries", type=int, nargs=2, help="how many to learn from and to measure; default all"
    )
    parser.add_argument("--out", type=Path, default=DOCS, help="where the report goes")
    parser.add_argument("--install", action="store_true", help="write cascade.npz and pool.yaml")
    options = parser.parse_args()
    torch.set_num_threads(1)  # small models: a second thread mostly waits
    pool = load_pool(options.pool)
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(pool, options.budget / 100, options.queries or (10**9, 10**9), options.out)
    text, figures = bench.run()
    print(text)
    (options.out / "results.md").write_text(text + "\n")
    print(json.dumps({"bench": "frontier", "pool": pool.name, "seed": SEED, **figures}))
    if options.install:
        install(pool, bench)


def install(pool: Pool, bench: Bench) -> None:
    """Write the cascade and the policies that use it into the pool's folder."""
    bench.cascade.save(pool.folder / CASCADE_FILE)
    learned = specify(
        bench.static, prior_power=round(bench.evidence.prior_power, 3), routed=True, learned=True
    )
    del learned["auto"]  # stays as it is
    write_policies(pool.folder / "pool.yaml", learned)


class Bench:
    """One run; see the module's docstring."""

    def __init__(self, pool: Pool, budget: float, queries: tuple[int, int], out: Path) -> None:
        self.pool = pool
        self.out = out
        self.budget = budget
        device = find_device(DEVICE)
        # What answers outside the pool's domains is no stage of it.
        self.facts = {
            name: fact if fact.parameters is None else _powered(fact)
            for name, fact in pool.facts().items()
            if fact.domains
        }
        self.wh_per_flop = device.power_w / device.flops_per_s / 3600
        self.rates = {name: fact.rates for name, fact in self.facts.items()}
        self.base = BASE
        self.chunks = tuple(name for name in self.facts if name != self.base)
        file = pool.folder / "outcomes.jsonl"
        self.train = _spread(read_outcomes(file, split="router"), queries[0])
        self.test = _spread(read_outcomes(file, split="test"), queries[1])

    def run(self) -> tuple[str, dict[str, object]]:
        """Return the report as Markdown, and its main figures."""
        singles: dict[str, Plan] = {n: Answer(members=(n,)) for n in (*self.chunks, self.base)}
        table, _ = answer_table(self.train, singles, self.rates)
        fitted = fit_scorer(table, seed=SEED)
        held_out, _ = answer_table(self.test, singles, self.rates)
        self.prior_train = fitted.out_of_fold.prior_QS[:, : len(self.chunks)]
        self.prior_test = predict(fitted.weights, held_out).prior_QS[:, : len(self.chunks)]
        weights_text, weights_figures = self._weigh()
        plans_test = self._fused_plans(self.prior_test)
        plans_train = self._fused_plans(self.prior_train)
        self.test = fused_outcomes(self.pool, self.test, plans_test, self.rates)
        stages = {name: plans_train[name] for name in FUSED}
        plain = self._cascade(self.train)
        self.train = fused_outcomes(self.pool, self.train, stages, self.rates)
        rows = [*self._simple(plans_test), *self._best_of(LearnedScorer(fitted.weights, singles))]
        every: dict[str, Plan] = {**singles, **dict.fromkeys(FUSED, self.static)}
        self.cascade = self._cascade(self.train)
        last = self._cascade(self.train, last=tuple(FUSED))
        self.stops = measure_stops(self.cascade, self._table(self.test, every)[0])
        for kind, learned, stages_of in zip(
            CASCADES, (plain, self.cascade, last), (singles, every, every), strict=True
        ):
            rows += self._chains(kind, learned, stages_of)
        draw(
            rows, self.loss_by_n, base=self.base, num=len(self.test), file=self.out / "frontier.png"
        )
        text, figures = self._report(rows, weights_text)
        return text, {**figures, **weights_figures}

    def _weigh(self) -> tuple[str, dict[str, object]]:
        """Calibrate the evidence, and compare the weightings' likelihoods of reference answers."""
        answer, prompt = likelihoods(self.pool, self.chunks, self.train)
        held = HeldOutAnswers(answer_QTM=answer, prompt_QM=prompt, prior_QM=self.prior_train)
        self.evidence = calibrate(held)
        lengths = np.array([[outcome.prompt_tokens or 1] for outcome in self.train], float)
        flat = np.ones_like(self.prior_train)
        per_token = HeldOutAnswers(answer_QTM=answer, prompt_QM=prompt / lengths, prior_QM=flat)
        self.perplexity = calibrate(per_token).temperature
        no_prompt = HeldOutAnswers(
            answer_QTM=answer, prompt_QM=np.zeros_like(prompt), prior_QM=self.prior_train
        )
        self.router_power = calibrate(no_prompt).prior_power
        answer, prompt = likelihoods(self.pool, self.chunks, self.test)
        lengths = np.array([[outcome.prompt_tokens or 1] for outcome in self.test], float)
        prior, flat = self.prior_test, np.ones_like(self.prior_test)
        temperature, power = self.evidence.temperature, self.evidence.prior_power
        mixed = {
            "uniform": flat / flat.sum(axis=1, keepdims=True),
            "router": _normal(prior),
            "router, sharpened": _normal(prior**self.router_power),
            "perplexity, τ = 1": evidence_weights(flat, prompt / lengths, temperature=1.0),
            "perplexity, τ calibrated": evidence_weights(
                flat, prompt / lengths, temperature=self.perplexity
            ),
            "evidence": evidence_weights(prior, prompt, temperature=temperature, prior_power=power),
        }
        nll = {name: mixture_nll(weights, answer) for name, weights in mixed.items()}
        nll["evidence, updated"] = mixture_nll(
            mixed["evidence"], answer, update_temperature=temperature
        )
        best = prior.argmax(axis=1)
        nll["best routed chunk alone"] = mixture_nll(np.eye(len(self.chunks))[best], answer)
        self.nll = {name: float(values.mean()) for name, values in nll.items()}
        lines = [
            "| weights | NLL per answer (nats) | minus evidence, 95% interval |",
            "|---|---|---|",
        ]
        for name, values in nll.items():
            gap = values - nll["evidence"]
            error = 1.96 * gap.std(ddof=1) / len(gap) ** 0.5
            difference = "" if name == "evidence" else f"{gap.mean():+.4f} ± {error:.4f}"
            lines.append(f"| {name} | {values.mean():.4f} | {difference} |")
        self.loss_by_n = self._loss_by_n(answer, prompt)
        lines += ["", "| members fused | " + " | ".join(map(str, self.loss_by_n["n"])) + " |"]
        lines.append("|---|" + "---|" * len(self.loss_by_n["n"]))
        for name, values in list(self.loss_by_n.items())[1:]:
            lines.append(f"| {name} | " + " | ".join(f"{value:.4f}" for value in values) + " |")
        return "\n".join(lines), {"nll": {name: round(v, 4) for name, v in self.nll.items()}}

    def _loss_by_n(self, answer: Floats, prompt: Floats) -> dict[str, list[float]]:
        """Return the NLL against the number of members: the router's best n, and all subsets."""
        from itertools import combinations

        order = self.prior_test.argsort(axis=1)[:, ::-1]
        result: dict[str, list[float]] = {"n": [], "router's best n, evidence": []}
        result["router's best n, uniform"], result["any n, uniform"] = [], []
        rows = np.arange(len(order))[:, None]
        for n in range(1, len(self.chunks) + 1):
            top = order[:, :n]
            weights = evidence_weights(
                self.prior_test[rows, top],
                prompt[rows, top],
                temperature=self.evidence.temperature,
                prior_power=self.evidence.prior_power,
            )
            picked = np.take_along_axis(answer, top[:, None, :], axis=2)
            result["n"].append(n)
            result["router's best n, evidence"].append(float(mixture_nll(weights, picked).mean()))
            uniform = np.full(top.shape, 1 / n)
            result["router's best n, uniform"].append(float(mixture_nll(uniform, picked).mean()))
            every = [
                mixture_nll(uniform, answer[:, :, list(subset)]).mean()
                for subset in combinations(range(len(self.chunks)), n)
            ]
            result["any n, uniform"].append(float(np.mean(every)))
        return result

    def _fused_plans(self, prior_QM: Floats) -> dict[str, list[Answer]]:
        """Return the fusions to try, one plan per query."""
        temperature, power = self.evidence.temperature, self.evidence.prior_power
        chunks = self.chunks
        self.static = Answer(members=chunks, weighting="evidence", temperature=temperature)
        ways: dict[str, tuple[Answer, float, int]] = {
            "fused uniform": (Answer(members=chunks), 1.0, 0),
            "fused router": (Answer(members=chunks, weighting="router"), self.router_power, 0),
            "fused perplexity": (
                Answer(members=chunks, weighting="perplexity", temperature=self.perplexity),
                1.0,
                0,
            ),
            **{name: (self.static, power, size or 0) for name, size in FUSED.items()},
            "fused product": (
                Answer(
                    members=chunks, weighting="evidence", temperature=temperature, rule="product"
                ),
                power,
                0,
            ),
            "fused gated": (
                Answer(members=chunks, weighting="evidence", temperature=temperature, rule="gated"),
                power,
                -1,
            ),
        }
        plans: dict[str, list[Answer]] = {}
        for name, (answer, exponent, top) in ways.items():
            plans[name] = []
            for prior_M in prior_QM:
                ranked = np.argsort(-prior_M)
                members = chunks
                if top:  # the best first: it leads where the rule knows a lead
                    members = tuple(chunks[i] for i in ranked[: top if top > 0 else None])
                scores = dict(zip(chunks, prior_M.tolist(), strict=True))
                primed = with_prior(replace(answer, members=members), scores, power=exponent)
                assert isinstance(primed, Answer)
                plans[name].append(primed)
        return plans

    def _row(self, name: str, kind: str, members: list[tuple[str, ...]]) -> Row:
        """Return a row whose answer to each query is that of outcome `name`, made by `members`."""
        usd, flops = [], []
        for outcome, used in zip(self.test, members, strict=True):
            read, written = outcome.prompt_tokens or 0, outcome.output_tokens[name]
            usd.append(sum(self.rates[m].footprint(read, written).usd for m in used))
            flops.append(sum(self.rates[m].flops_per_token * (read + written) for m in used))
        return Row(
            name=name,
            kind=kind,
            quality_Q=np.array([outcome.scores[name] for outcome in self.test]),
            usd_Q=np.array(usd),
            flops_Q=np.array(flops),
        )

    def _simple(self, plans: dict[str, list[Answer]]) -> list[Row]:
        """Return single models, the routed chunk, the fusions, and the oracle."""
        single = {n: self._row(n, "fixed", [(n,)] * len(self.test)) for n in self.rates}
        rows = list(single.values())
        stack = [single[name] for name in self.chunks]
        rows.append(pick("routed chunk", "routed", stack, self.prior_test.argmax(axis=1)))
        rows += [
            self._row(name, "fused", [plan.members for plan in its]) for name, its in plans.items()
        ]
        every = [*stack, single[self.base]]
        usd = np.stack([row.usd_Q for row in every], axis=1)
        wrong = np.stack([row.quality_Q for row in every], axis=1) < 1
        wrong[wrong.all(axis=1)] = False  # nobody knows: the cheapest will do
        rows.append(pick("oracle", "oracle", every, (usd + wrong * 1e9).argmin(axis=1)))
        return rows

    def _best_of(self, scorer: LearnedScorer) -> list[Row]:
        """Return the chunks side by side, by vote, scorer and ranker."""
        singles: dict[str, Plan] = {name: Answer(members=(name,)) for name in self.chunks}
        table, usd = answer_table(self.test, singles, self.rates)
        flops = self._flops(table, singles)
        picks: dict[str, list[int]] = {"majority": [], "scorer": [], "ranker": []}
        for q in range(len(self.test)):
            attempts = [table.attempt(q, s) for s in range(len(singles))]
            votes = [normalise(attempt.answer) for attempt in attempts]
            picks["majority"].append(max(range(len(votes)), key=lambda i: votes.count(votes[i])))
            picks["scorer"].append(int(np.argmax([scorer.score(one) for one in attempts])))
            picks["ranker"].append(int(np.argmax(scorer.rank(attempts))))
        return [
            Row(
                name=f"best of {len(singles)} by {how}",
                kind="best-of",
                quality_Q=table.quality_QS[np.arange(len(chosen)), chosen],
                usd_Q=usd.sum(axis=1),
                flops_Q=flops.sum(axis=1),
            )
            for how, chosen in picks.items()
        ]

    def _table(self, outcomes: list[Outcome], plans: dict[str, Plan]) -> tuple[AnswerTable, Floats]:
        top = {name: size for name, size in TOP.items() if name in plans}
        return answer_table(outcomes, plans, self.rates, top)

    def _cascade(
        self, outcomes: list[Outcome], last: tuple[str, ...] | None = None
    ) -> LearnedCascade:
        fusion = Fusion(plan=self.static, prior_power=self.evidence.prior_power, prior_QM=None)
        return learn_stages(
            outcomes, fusion, self.rates, budget_share=self.budget, seed=SEED, last=last
        )

    def _flops(self, table: AnswerTable, plans: dict[str, Plan]) -> Floats:
        per_token = [
            sum(self.rates[m].flops_per_token for m in plan.members[: FUSED.get(name)])
            for name, plan in plans.items()
            if isinstance(plan, Answer)
        ]
        read = np.array([[outcome.prompt_tokens or 0] for outcome in self.test], float)
        return (read + table.num_tokens_QS) * np.array(per_token)

    def _chains(self, kind: str, cascade: LearnedCascade, plans: dict[str, Plan]) -> list[Row]:
        """Return the held-out rows of every point of the frontier, the chosen one first."""
        table, usd = self._table(self.test, plans)
        flops = self._flops(table, plans)
        rows = []
        by_usd = replay_cascade(cascade, table, usd)
        by_flops = replay_cascade(cascade, table, flops)
        for point, run, load in zip(cascade.frontier, by_usd, by_flops, strict=True):
            row = Row(
                name=f"{kind}: {' → '.join(point.stages)}",
                kind=kind,
                quality_Q=run.quality_Q,
                usd_Q=run.cost_Q,
                flops_Q=load.cost_Q,
            )
            rows.insert(0 if point == cascade.frontier[cascade.chosen] else len(rows), row)
        return rows

    def _report(self, rows: list[Row], weights_text: str) -> tuple[str, dict[str, object]]:
        base = next(row for row in rows if row.name == self.base)
        shown = [row for row in rows if row.kind not in CASCADES]
        for kind in CASCADES:
            chains = [row for row in rows if row.kind == kind]
            shown += [chains[0], *thinned(chains[1:])]
        cost, quality = np.array([r.usd for r in rows]), np.array([r.accuracy for r in rows])
        real = [i for i, row in enumerate(rows) if row.kind != "oracle"]
        front = {id(rows[real[i]]) for i in pareto(cost[real], quality[real])}
        lines = [
            f"Pool `{self.pool.name}`, {len(self.test)} held-out queries, {len(self.train)} to "
            f"learn from, seed {SEED}. Cost at the pool's example prices; FLOPs are 2N per token; "
            f"Wh modelled on {DEVICE} (LLMCarbon, PUE 1). ± is a 95% interval, differences are "
            "paired. ● lies on the held-out Pareto frontier of everything measured here.",
            "",
            "| | policy | accuracy | minus base | USD / 1,000 | of base | MFLOPs | mWh / 1,000 |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in shown:
            gap = row.quality_Q - base.quality_Q
            error = 1.96 * gap.std(ddof=1) / len(gap) ** 0.5
            own = 1.96 * row.quality_Q.std(ddof=1) / len(gap) ** 0.5
            flops = float(row.flops_Q.mean())
            lines.append(
                f"| {'●' if id(row) in front else ''} | {row.name} "
                f"| {row.accuracy:.1%} ± {own:.1%} "
                f"| {gap.mean():+.1%} ± {error:.1%} | {row.usd * 1e3:.5f} "
                f"| {row.usd / base.usd:.0%} | {flops / 1e6:.1f} "
                f"| {flops * self.wh_per_flop * 1e6:.4f} |"
            )
        lines += ["", *self._standing(rows), "", weights_text, ""]
        lines.append(
            f"Evidence: T = {self.evidence.temperature:.3g} nats, prior power "
            f"{self.evidence.prior_power:.2f}; perplexity τ = {self.perplexity:.3g}."
        )
        chosen = {kind: next(row for row in rows if row.kind == kind) for kind in CASCADES}
        figures: dict[str, object] = {
            row.name if row.kind != kind else kind: [
                round(row.accuracy, 4),
                round(row.usd / base.usd, 4),
            ]
            for kind, row in [*chosen.items(), *((r.kind, r) for r in shown if r.kind == "routed")]
        }
        figures["base"] = round(base.accuracy, 4)
        for row in shown:
            if row.kind == "fused":
                figures[row.name] = [round(row.accuracy, 4), round(row.usd / base.usd, 4)]
        return "\n".join(lines), figures

    def _standing(self, rows: list[Row]) -> list[str]:
        """Say what the installed cascade dominates, what dominates it, and what it stops early."""
        ours = next(row for row in rows if row.kind == CASCADES[1])
        simple = [row for row in rows if row.kind not in (*CASCADES, "oracle")]

        def names(found: list[Row]) -> str:
            return ", ".join(row.name for row in found) or "none"

        below = [r for r in simple if r.accuracy <= ours.accuracy and r.usd >= ours.usd]
        above = [r for r in simple if r.accuracy >= ours.accuracy and r.usd <= ours.usd]
        lines = [
            f"The installed policy is `{ours.name}`, the most accurate on the learning half within "
            f"{self.budget:.0%} of always-base, of all chains with and without fused stages. By "
            f"these point estimates it is at least as accurate and at most as dear as: "
            f"{names(below)}. The same holds against it for: {names(above)}."
        ]
        lines += [
            f"Stopped early, of the answers of `{stop.stage}` that its threshold rejects: "
            f"{stop.num_right_stops} of {stop.num_rejected}; of those that it accepts (false "
            f"stops): {stop.num_false_stops} of {stop.num_accepted}."
            for stop in self.stops
        ]
        return lines


def _spread(outcomes: list[Outcome], num: int) -> list[Outcome]:
    """Return `num` of the outcomes at equal distances, all of them if they are fewer."""
    if num >= len(outcomes):
        return outcomes
    return [outcomes[i] for i in np.linspace(0, len(outcomes) - 1, num).round().astype(int)]


def _powered(fact: ModelFacts) -> ModelFacts:
    return replace(fact, rates=rates_for(fact, find_device(DEVICE), gco2e_per_kwh=0.0, pue=1.0))


def _normal(values: Floats) -> Floats:
    result: Floats = values / values.sum(axis=1, keepdims=True)
    return result


if __name__ == "__main__":
    main()
