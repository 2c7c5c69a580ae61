"""What commands need that talk to a running server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

if TYPE_CHECKING:
    import httpx

UrlOption: TypeAlias = Annotated[
    str, typer.Option(envvar="SHOAL_URL", help="The server's address.")
]
KeyOption: TypeAlias = Annotated[
    str | None, typer.Option(envvar="SHOAL_API_KEY", help="An API key, if the server wants one.")
]


def connect(url: str, key: str | None) -> httpx.Client:
    """Return a client of the server at `url`, with or without "/v1" at its end."""
    import httpx

    headers = {"authorization": f"Bearer {key}"} if key else {}
    base = url.rstrip("/").removesuffix("/v1")
    return httpx.Client(base_url=base, headers=headers, timeout=30)


@contextmanager
def refuse_errors(url: str) -> Iterator[None]:
    """End the command with one clear line when the server isn't there or says no."""
    import httpx

    try:
        yield
    except httpx.HTTPStatusError as error:
        try:
            message = error.response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"status {error.response.status_code}"
        typer.echo(f"shoal: the server refused: {message}", err=True)
        raise typer.Exit(1) from None
    except (httpx.TransportError, httpx.InvalidURL) as error:
        typer.echo(
            f"shoal: no server answers at {url} ({error}); start one with `shoal serve`, "
            "or name another with --url",
            err=True,
        )
        raise typer.Exit(1) from None
