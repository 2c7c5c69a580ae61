"""The least that a Ray Serve application with one hop can do: what `overhead` measures against."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve
from ray.serve.handle import DeploymentHandle

api = FastAPI()

# As Shoal's own deployments have them.
_OPTIONS: Any = {
    "logging_config": {"enable_access_log": False},
    "max_ongoing_requests": 10_000,
    "ray_actor_options": {"num_cpus": 0.1},
}


class Body(BaseModel):
    """As much of a chat request as an echo needs."""

    model: str
    messages: list[dict[str, Any]]
    max_tokens: int


@serve.deployment(**_OPTIONS)
class Behind:
    """The hop."""

    async def answer(self, text: str) -> str:
        """Return `text`."""
        return text


@serve.deployment(**_OPTIONS)
@serve.ingress(api)
class Front:
    """The ingress."""

    def __init__(self, behind: DeploymentHandle) -> None:
        self._answer = behind.answer

    @api.post("/v1/chat/completions")
    async def chat(self, body: Body) -> dict[str, str]:
        """Return the last message, by way of the hop."""
        return {"text": await self._answer.remote(body.messages[-1]["content"])}


def application() -> serve.Application:
    """Return the application."""
    return Front.bind(Behind.bind())  # type: ignore[attr-defined, no-any-return]
