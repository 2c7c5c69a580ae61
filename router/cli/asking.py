"""Ask, or ask what there is: `shoal chat`, `shoal models` and `shoal route`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from policies.errors import PolicyError
from router.cli.console import KeyOption, UrlOption, connect, refuse_errors, refusing

if TYPE_CHECKING:
    import httpx

    from policies.base import Decision


def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="What to say; without it, a conversation starts.")
    ] = None,
    *,
    model: Annotated[str, typer.Option(help="auto, policy/NAME or a model's name.")] = "auto",
    url: UrlOption = "http://127.0.0.1:8000",
    key: KeyOption = None,
) -> None:
    """Chat with the models of a running server; answers stream."""
    with connect(url, key) as client, refuse_errors(url):
        if prompt is not None:
            _say(client, model, [{"role": "user", "content": prompt}])
            return
        _converse(client, model)


def _converse(client: httpx.Client, model: str) -> None:
    typer.echo(f"Talking to {model}. Ctrl-D ends.", err=True)
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if not text:
            continue
        messages.append({"role": "user", "content": text})
        answer = _say(client, model, messages)
        messages.append({"role": "assistant", "content": answer})


def _say(client: httpx.Client, model: str, messages: list[dict[str, str]]) -> str:
    """Print the answer as it comes, then who gave it; return its text."""
    body = {"model": model, "messages": messages, "stream": True}
    answer = ""
    shoal: dict[str, Any] = {}
    with client.stream("POST", "/v1/chat/completions", json=body, timeout=None) as response:
        if response.is_error:
            response.read()
            response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            data = json.loads(line.removeprefix("data: "))
            if "error" in data:
                typer.echo()
                typer.echo(f"shoal: {data['error']['message']}", err=True)
                raise typer.Exit(1)
            for choice in data["choices"]:
                piece = choice["delta"].get("content") or ""
                answer += piece
                typer.echo(piece, nl=False)
            shoal = data.get("shoal", shoal)
    typer.echo()
    if shoal:
        tokens = sum(member["output"] for member in shoal["tokens"].values())
        typer.secho(f"[{' + '.join(shoal['members'])}, {tokens} tokens]", err=True, dim=True)
    return answer


_HEADER = ("NAME", "KIND", "PARAMETERS", "USD/M IN", "USD/M OUT", "DOMAINS OR MEMBERS")


def models(
    *,
    pool: Annotated[
        Path | None, typer.Option(help="Read this pool.yaml (or its folder), not a server.")
    ] = None,
    url: UrlOption = "http://127.0.0.1:8000",
    key: KeyOption = None,
) -> None:
    """List models and policies of a running server, or the models of a pool file."""
    from policies.tables import text_table

    rows = _from_pool(pool) if pool is not None else _from_server(url, key)
    typer.echo(text_table([_HEADER, *rows], num_left=len(_HEADER)))


def _from_server(url: str, key: str | None) -> list[tuple[str, ...]]:
    with connect(url, key) as client, refuse_errors(url):
        response = client.get("/v1/models")
        response.raise_for_status()
        served = response.json()["data"]
    return [_model_row(entry["id"], entry.get("shoal", {})) for entry in served]


def _from_pool(path: Path) -> list[tuple[str, ...]]:
    from models.pool import load_pool

    with refusing("models", ValueError):
        loaded = load_pool(path)
    return [
        _model_row(
            model.name,
            {
                **model.spec.model_dump(),
                "kind": "model",
                "parameters": model.card.parameters if model.card else None,
            },
        )
        for model in loaded.models
    ]


def _model_row(name: str, facts: dict[str, Any]) -> tuple[str, ...]:
    is_model = facts.get("kind") == "model"
    named: Sequence[str] = facts.get("domains" if is_model else "members", ())
    return (
        name,
        str(facts.get("kind", "")),
        _millions(facts.get("parameters")),
        _price(facts.get("usd_per_million_input_tokens")),
        _price(facts.get("usd_per_million_output_tokens")),
        ", ".join(named),
    )


def _millions(parameters: int | None) -> str:
    return "" if parameters is None else f"{parameters / 1e6:,.1f} M"


def _price(usd: float | None) -> str:
    return "" if usd is None else f"{usd:g}"


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
    from models.pool import DEFAULT_POOL, load_pool
    from policies.base import Query
    from policies.plan import to_json
    from policies.registry import build_policy

    with refusing("route"):
        loaded = load_pool(pool or DEFAULT_POOL)
        if policy not in loaded.policies:
            raise PolicyError(
                f"--policy {policy!r} is unknown; the pool has {', '.join(loaded.policies)}"
            )
        built = build_policy(loaded.policies[policy], folder=loaded.folder, models=loaded.facts())
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
