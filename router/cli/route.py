"""`shoal route`: where a query would go, and why, without running any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from policies.base import Decision


def route(
    query: Annotated[str, typer.Argument(help="What a user would ask.")],
    *,
    pool: Annotated[
        Path | None, typer.Option(help="Pool file or folder; default: Shoal's own.")
    ] = None,
    policy: Annotated[str, typer.Option(help="A policy of the pool.")] = "auto",
    max_tokens: Annotated[int, typer.Option(min=1, help="The most the answer may take.")] = 256,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also say what spoke for and against it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Decide for one query and print the plan."""
    from models.errors import PoolError
    from models.pool import DEFAULT_POOL, load_pool
    from policies.base import Query
    from policies.errors import PolicyError
    from policies.plan import to_json
    from policies.registry import build_policy

    try:
        loaded = load_pool(pool or DEFAULT_POOL)
        if policy not in loaded.policies:
            raise PolicyError(
                f"--policy {policy!r} is unknown; the pool has {', '.join(loaded.policies)}"
            )
        built = build_policy(loaded.policies[policy], folder=loaded.folder, models=loaded.facts())
    except (PolicyError, PoolError) as error:
        typer.echo(f"shoal route: {error}", err=True)
        raise typer.Exit(2) from None
    decision = built.decide(Query(text=query, max_tokens=max_tokens, explain=explain))
    plan = to_json(decision.plan)
    if as_json:
        print(
            json.dumps(
                {
                    "plan": plan,
                    "scores": dict(decision.scores),
                    "reason": decision.reason,
                    "details": dict(decision.details),
                },
                indent=2,
            )
        )
        return
    print(f"plan    {json.dumps(plan)}\nreason  {decision.reason}")
    if explain:
        _print_details(decision)


def _print_details(decision: Decision) -> None:
    details: dict[str, Any] = dict(decision.details)
    for member in details.pop("members", []):
        usd_per_million = member["expected_usd"] * 1e6
        print(
            f"  {member['model']:<24} quality {member['predicted_quality']:.3f}"
            f"   {usd_per_million:9.4f} USD per million requests"
        )
    doubt = details.pop("doubt", None)
    if doubt is not None:
        known = "like" if doubt["familiar"] else "unlike"
        shrunk = "" if doubt["familiar"] else f", trust in predictions {doubt['trust']:.2f}"
        print(
            f"{known} the training queries: similarity {doubt['similarity']:.2f}, familiar from "
            f"{doubt['familiar_above']:.2f}{shrunk}"
        )
    cluster = details.pop("nearest_cluster", None)
    if cluster is not None:
        means = ", ".join(f"{name} {mean:.2f}" for name, mean in cluster["mean_scores"].items())
        print(
            f"nearest cluster {cluster['id']} of {cluster['num_training_queries']} training "
            f"queries\n  mean scores: {means}"
        )
    ngrams = details.pop("strongest_ngrams", [])
    if ngrams:
        shown = ", ".join(f"{n['ngram']!r} {n['logit']:+.2f}" for n in ngrams)
        print(f"strongest n-grams for (+) and against (-) the choice: {shown}")
    likeness = details.pop("likeness_logit", None)
    if likeness:
        print(f"likeness to training queries: {likeness:+.2f}")
    for key, value in details.items():
        print(f"{key}: {json.dumps(value)}")
