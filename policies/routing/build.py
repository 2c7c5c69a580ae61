"""Policies over a trained router, from the keys of a pool file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from policies.base import Policy
from policies.building import BuildContext, PolicyKind
from policies.plan import Name, PlanField
from policies.routing.choice import Trade
from policies.routing.clusters import Clusters
from policies.routing.file import load_router
from policies.routing.learned import Learned
from policies.validation import Settings


class RoutedSettings(Settings):
    """The keys of `kind: learned` and `kind: clusters`."""

    path: str = Field(description="The router's file, relative to the pool.")
    members: Annotated[tuple[Name, ...], Field(strict=False, min_length=1)] | None = Field(
        None, description="The models to choose from; default: all that the router knows."
    )
    fallback: PlanField | None = Field(None, description="The plan for unfamiliar queries.")
    answer_value_usd: float | None = Field(
        None, gt=0, description="What a right answer is worth; default: quality alone counts."
    )


def _build(kind: type[Learned], settings: RoutedSettings, context: BuildContext) -> Policy:
    return kind(
        load_router(context.folder / settings.path),
        models=context.models,
        trade=Trade(answer_value_usd=settings.answer_value_usd, members=settings.members),
        fallback=settings.fallback,
    )


LEARNED = PolicyKind(
    settings=RoutedSettings, build=lambda settings, context: _build(Learned, settings, context)
)
CLUSTERS = PolicyKind(
    settings=RoutedSettings, build=lambda settings, context: _build(Clusters, settings, context)
)
