"""Adapters as members: one base's matrices for all, and each member's own low-rank part.

Shapes as in `weights`; R is the largest rank of a matrix, qkv's and gate_up's being those of their
modules together. Decoding reads the base's weights once for all rows, whosever they are, where n
checkpoints are read one by one.

What `weights` does to a matrix, it does to the factors: outputs stand in the same order, gains and
scales are multiplied in, so that the sum is the adapted matrix.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor

from models.adapter import (
    ADAPTER_WEIGHTS,
    Adapter,
    AdapterSource,
    factor_names,
    read_adapter,
)
from models.card import ModelCard
from models.engines.stacked.architecture import Architecture
from models.engines.stacked.matrices import Adapted, Matrices
from models.engines.stacked.threads import in_own_thread
from models.engines.stacked.weights import (
    Checkpoints,
    LayerWeights,
    Matrix,
    Weights,
    layer_matrices,
    read_gain,
)
from models.errors import EngineFailed, EngineOverloaded, PoolError, RequestError
from models.sources.locate import locate
from models.sources.safetensors import read_tensors

Factors: TypeAlias = tuple[Tensor, Tensor]
"""What one member adds to a matrix: [I, R] and [R, O], with R its own."""
LayerFactors: TypeAlias = dict[str, Factors]
"""Of one layer, by the names of its matrices that are adapted."""

_MATRICES = {"qkv_MDQ": "qkv", "out_MQD": "out", "gate_up_MDF": "gate_up", "down_MFD": "down"}
# Kernels on CUDA want rows of whole 16 bytes; those on CPU multiply batches in float32 alone fast.
_RANK_STEP = 8


class Adapters:
    """The adapters that an engine holds: the base is member 0, each of them one above.

    A request that needs one that is not there has it loaded: read beside the steps, put in between
    two. Where all members are taken, the least recently used that nobody uses makes room.
    """

    def __init__(
        self,
        prepare: Callable[[Mapping[int, Adapter]], Callable[[], None]],
        *,
        base: ModelCard,
        most: int,
        between_steps: Callable[[Callable[[], None]], Future[None]],
        forget: Callable[[int], None],
    ) -> None:
        """`prepare` is `Runner.prepare`; `forget` drops what is cached of a member.

        `between_steps` has the engine's thread call something.
        """
        self._prepare = prepare
        self._base = base
        self._loaded = _state(base)
        self._most = most
        self._between_steps = between_steps
        self._forget = forget
        self._loading = asyncio.Lock()
        # By name and origin, the least recently used first.
        self._members: OrderedDict[tuple[str, AdapterSource], int] = OrderedDict()
        self._uses: Counter[int] = Counter()

    async def hold(
        self, origins: Mapping[str, AdapterSource]
    ) -> AbstractContextManager[Mapping[str, int]]:
        """Load what is not there; the context tells the members by name, and keeps them.

        Raises `EngineFailed` for what cannot be loaded, `EngineOverloaded` where there is no room
        now, and `RequestError` where there never is.
        """
        if not origins:
            return nullcontext({})
        if len(origins) > self._most:
            raise RequestError(
                f"{', '.join(origins)} are more adapters than the engine holds at once "
                f"(options.max_adapters: {self._most})",
                "model",
            )
        if all(key in self._members for key in origins.items()):
            return self._use(origins)
        async with self._loading:
            held = [self._members[key] for key in origins.items() if key in self._members]
            self._uses.update(held)
            try:
                await self._load([key for key in origins.items() if key not in self._members])
            finally:
                self._uses.subtract(held)
            return self._use(origins)

    def _use(
        self, origins: Mapping[str, AdapterSource]
    ) -> AbstractContextManager[Mapping[str, int]]:
        """Keep members from now on until the context ends."""
        members = {name: self._members[name, origin] for name, origin in origins.items()}
        for key in origins.items():
            self._members.move_to_end(key)
        self._uses.update(members.values())

        @contextmanager
        def using() -> Iterator[Mapping[str, int]]:
            try:
                yield members
            finally:
                self._uses.subtract(members.values())

        return using()

    async def _load(self, missing: Sequence[tuple[str, AdapterSource]]) -> None:
        if not missing:
            return
        new = dict(zip(self._free(len(missing)), missing, strict=True))

        def prepare() -> Callable[[], None]:
            adapters = {m: _find(origin, self._base) for m, (_, origin) in new.items()}
            put_in = self._prepare(adapters)
            if _state(self._base) != self._loaded:  # its gains are in the factors
                raise PoolError(
                    f"the base {self._base.path} has changed since it was loaded; start the engine "
                    "again"
                )
            return put_in

        try:
            put_in = await in_own_thread(prepare)
        except PoolError as error:
            names = ", ".join(name for name, _ in missing)
            raise EngineFailed(f"{names} cannot be loaded: {error}") from None

        def change() -> None:
            put_in()
            for member in new:
                self._forget(member)

        await asyncio.wrap_future(self._between_steps(change))
        self._members.update({key: member for member, key in new.items()})

    def _free(self, num_members: int) -> list[int]:
        """Return so many members for new adapters, those of unused ones if need be."""
        idle = [key for key, member in self._members.items() if not self._uses[member]]
        room = self._most - len(self._members)
        if num_members > room + len(idle):
            raise EngineOverloaded(
                f"all {self._most} adapters (options.max_adapters) are in use", 1.0
            )
        for key in idle[: max(num_members - room, 0)]:
            del self._members[key]
        taken = set(self._members.values())
        return [m for m in range(1, self._most + 1) if m not in taken][:num_members]


def _find(origin: AdapterSource, base: ModelCard) -> Adapter:
    found = locate(origin.source, folder=Path())
    adapter = read_adapter(found.path, base.path, source=origin.source)
    if adapter.origin != origin:
        raise PoolError(f"{found.path} has changed since; load it again")
    return adapter


def _state(base: ModelCard) -> Mapping[Path, tuple[int, ...]]:
    """Return what changes where a file of the base's weights is replaced or written to."""
    files = {tensor.file for tensor in read_tensors(base.path).values()}
    seen = [(file, file.stat()) for file in files]
    return {file: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for file, stat in seen}


def read_factors(
    adapter: Adapter, base: ModelCard, architecture: Architecture
) -> tuple[LayerFactors, ...]:
    """Read what an adapter adds to every layer of its base, float32."""
    with ExitStack() as stack:
        file = stack.enter_context(safe_open(adapter.path / ADAPTER_WEIGHTS, framework="pt"))
        checkpoints = Checkpoints([base], stack)

        def factors(layer: str, matrix: Matrix) -> Factors:
            """Each module's outputs are made of its own part of the narrow product alone."""
            shrinks, expands = [], []
            for module in (f"{layer}.{module}" for module in matrix.modules):
                if module in adapter.scales:
                    shrink_rI, expand_Or = map(file.get_tensor, factor_names(module))
                    shrinks.append(shrink_rI.float())
                    expands.append(expand_Or.float() * adapter.scales[module])
                else:
                    num_outputs = checkpoints.shape(0, f"{module}.weight")[0]
                    expands.append(torch.empty(num_outputs, 0))
            shrink_RI = torch.cat(shrinks)
            if matrix.norm is not None:
                gain_I = read_gain(checkpoints, 0, f"{layer}.{matrix.norm}", architecture)
                shrink_RI = shrink_RI * gain_I
            return shrink_RI.T, matrix.rows(torch.block_diag(*expands)).T  # type: ignore[no-untyped-call]

        return tuple(
            {
                name: factors(layer, matrix)
                for name, matrix in layer_matrices(architecture).items()
                if any(f"{layer}.{module}" in adapter.scales for module in matrix.modules)
            }
            for layer in (f"model.layers.{i}" for i in range(architecture.shape.num_layers))
        )


def with_adapters(
    weights: Weights[Any], adapters: Mapping[int, tuple[LayerFactors, ...]]
) -> Weights[Adapted]:
    """Return a base's weights with `adapters` by member, beside those that it has already.

    Nothing that it has is changed; a step may compute with it meanwhile.
    """
    like = weights.final_gain_MD
    num_members = max(len(like), *(member + 1 for member in adapters))

    def shared(tensor: Tensor) -> Tensor:
        return tensor[:1].expand(num_members, *tensor.shape[1:])

    def adapted(matrix: Matrices, index: int, name: str) -> Adapted:
        added = {member: layers[index].get(name) for member, layers in adapters.items()}
        return _adapted(matrix, added, num_members, like)

    def layer(index: int, own: LayerWeights[Any]) -> LayerWeights[Adapted]:
        changed: dict[str, Any] = {}
        for field in fields(own):
            value = getattr(own, field.name)
            if field.name in _MATRICES:
                changed[field.name] = adapted(value, index, _MATRICES[field.name])
            else:
                changed[field.name] = None if value is None else shared(value)
        return LayerWeights(**changed)

    return Weights(
        embed_MVD=None if weights.embed_MVD is None else shared(weights.embed_MVD),
        layers=tuple(layer(index, own) for index, own in enumerate(weights.layers)),
        final_gain_MD=shared(like),
        head_MDV=_adapted(weights.head_MDV, {}, num_members, like),
    )


def _adapted(
    matrix: Matrices, added: Mapping[int, Factors | None], num_members: int, like: Tensor
) -> Adapted:
    """Return a matrix with the members' factors, those `added` in place of what was theirs."""
    adapted = matrix if isinstance(matrix, Adapted) else Adapted(base=matrix, factors=None)
    factors = dict(enumerate(zip(*adapted.factors, strict=True))) if adapted.factors else {}
    factors = {member: pair for member, pair in {**factors, **added}.items() if pair is not None}
    if not factors:
        return adapted
    rank = -(-max(shrink_IR.shape[1] for shrink_IR, _ in factors.values()) // _RANK_STEP)
    shrink, expand = next(iter(factors.values()))
    dtype = like.dtype if like.is_cuda else torch.float32
    shrink_MIR = like.new_zeros((num_members, len(shrink), rank * _RANK_STEP), dtype=dtype)
    expand_MRO = like.new_zeros((num_members, rank * _RANK_STEP, expand.shape[1]), dtype=dtype)
    for member, (shrink_IR, expand_RO) in factors.items():
        shrink_MIR[member, :, : shrink_IR.shape[1]] = shrink_IR
        expand_MRO[member, : len(expand_RO)] = expand_RO
    return Adapted(base=adapted.base, factors=(shrink_MIR, expand_MRO))
