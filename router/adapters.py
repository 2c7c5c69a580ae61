"""Adapters that come and go while the server runs: the endpoints of vLLM, for administrators.

Either makes an edition, which every replica follows (`editions`): requests name where the adapters
of their members are, and an engine loads what it has not. What runs, finishes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import PlainTextResponse

from models.pool import Pool
from models.spec import ModelSpec, Name
from router.access.audit import ANONYMOUS
from router.access.authentication import Identify
from router.bodies import Bodies
from router.config import ConfigError
from router.editions import Change, Editions
from router.errors import ApiError, bad_request
from router.openai_api.fields import read_fields, read_json
from router.openapi import described

_MOST_BODY_BYTES = 2**16
# What is an adapter's own, and not its base's.
_OWN = {"checkpoint": None, "otherwise": None, "domains": (), "description": ""}


class LoadAdapter(BaseModel):
    """An adapter to serve as the model `lora_name`, from the folder `lora_path` of the server.

    `base_model` is the model of the pool that it is of, where several could be. With `load_inplace`
    it may take the place of one of the same name.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: Name
    lora_path: str
    base_model: str | None = None
    load_inplace: bool = False


class UnloadAdapter(BaseModel):
    """An adapter to serve no more."""

    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: Name


def add_adapter_routes(
    api: FastAPI, editions: Editions, *, roots: Sequence[Path], identify: Identify, bodies: Bodies
) -> None:
    """Add both endpoints for whom `identify` lets in; adapters are read below `roots` alone."""

    async def change(request: Request, change: Change) -> None:
        actor = await identify(request) or ANONYMOUS
        try:
            await editions.change(change, actor=actor)
        except (ValueError, OSError) as error:
            raise bad_request(f"Nothing was changed. {error}", code="adapter_refused") from None

    async def load(request: Request) -> PlainTextResponse:
        who = await identify(request)
        body = await bodies.take(request, read_json, who, _MOST_BODY_BYTES)
        new = read_fields(LoadAdapter, body, {})
        path = _below(roots, new.lora_path)
        pool = editions.current.catalog.pool
        in_place = new.load_inplace and _is_adapter(pool, new.lora_name)
        if new.lora_name in editions.current.catalog.targets and not in_place:
            raise bad_request(
                f"The name {new.lora_name!r} is taken; set load_inplace to true to put an adapter "
                "in another's place.",
                "lora_name",
            )
        await change(request, partial(_loaded, new=new, path=path))
        return PlainTextResponse(f"Success: LoRA adapter '{new.lora_name}' added successfully.")

    async def unload(request: Request) -> PlainTextResponse:
        who = await identify(request)
        body = await bodies.take(request, read_json, who, _MOST_BODY_BYTES)
        name = read_fields(UnloadAdapter, body, {}).lora_name
        if not _is_adapter(editions.current.catalog.pool, name):
            raise ApiError(
                404,
                f"The lora adapter {name!r} cannot be found.",
                param="lora_name",
                code="adapter_not_found",
            )
        await change(request, partial(_unloaded, name=name))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    for path, answer, takes in (
        ("/v1/load_lora_adapter", load, LoadAdapter),
        ("/v1/unload_lora_adapter", unload, UnloadAdapter),
    ):
        extra = described(None, takes=takes, media_type="text/plain")
        api.add_api_route(
            path,
            answer,
            methods=["POST"],
            response_class=PlainTextResponse,
            openapi_extra=extra,
        )


def _loaded(adapters: dict[str, ModelSpec], pool: Pool, *, new: LoadAdapter, path: Path) -> None:
    """Put a new adapter among those of a pool."""
    able = [model for model in pool.models if model.card is not None and model.adapter is None]
    bases = [model for model in able if new.base_model in (None, model.name)]
    if len(bases) != 1:
        raise ConfigError(
            f"base_model: {new.base_model!r} is {'no' if new.base_model else 'not one'} model that "
            f"an adapter could be of; allowed are {', '.join(model.name for model in able)}"
        )
    own = {"name": new.lora_name, "base": bases[0].name, "adapter": str(path), **_OWN}
    adapters[new.lora_name] = bases[0].spec.model_copy(update=own)


def _unloaded(adapters: dict[str, ModelSpec], _pool: Pool, *, name: str) -> None:
    if adapters.pop(name, None) is None:
        raise ConfigError(f"lora_name: {name!r} is no adapter any more")


def _is_adapter(pool: Pool, name: str) -> bool:
    return any(model.name == name and model.adapter is not None for model in pool.models)


def _below(roots: Sequence[Path], path: str) -> Path:
    """Return the folder that `path` is in truth; `ApiError` 403 where it is below no root."""
    try:
        real = Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a NUL
        raise bad_request(f"lora_path: {path[:200]!r} is no path: {error}", "lora_path") from None
    if not any(real.is_relative_to(root.resolve()) for root in roots):
        allowed = ", ".join(map(str, roots)) or "none: name some in http.adapter_roots"
        raise ApiError(
            403,
            f"lora_path: {path[:200]!r} is no folder below those that adapters may be loaded from; "
            f"allowed are {allowed}.",
            param="lora_path",
            code="adapter_path_refused",
        )
    return real
