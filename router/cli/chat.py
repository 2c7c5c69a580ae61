"""`shoal chat`: talk to a running server."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from router.cli.console import KeyOption, UrlOption, connect, refuse_errors

if TYPE_CHECKING:
    import httpx


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
