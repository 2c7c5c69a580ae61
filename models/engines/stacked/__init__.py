"""The stacked engine: M same-shaped small models run as one block-diagonal transformer.

The unit of work is a *lane*: one request on one member, with its own cache rows. A request that
uses k members costs k lanes, whatever the engine holds. One step, in `loop`:

    take what came in → `scheduler` picks parts → `layout` indexes them → `model` computes logits
    → `fusion` joins lanes → `sampler` draws → `sequence` turns tokens into text → send
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from models.engines.base import Engine
from models.engines.stacked.engine import StackedEngine
from models.errors import PoolError
from models.spec import EngineSpec, Model
from policies.validation import explain


def create(spec: EngineSpec, models: Sequence[Model]) -> Engine:
    """Make the engine for `models`; `PoolError` for options it does not know."""
    members = [(model.name, model.card) for model in models if model.card is not None]
    if len(members) < len(models) or not members:
        raise PoolError(f"engines.{spec.name}: a stacked engine needs models with checkpoints")
    try:
        return StackedEngine(spec, members)
    except ValidationError as error:
        raise PoolError(f"engines.{spec.name}.options: {explain(error)}") from None
