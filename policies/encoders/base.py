"""The contract of every encoder: text to sparse features, and to a point in a small space.

An encoder is fitted once on the training queries and frozen from then on. It knows nothing of
models or scores. Encoders go by kind: ours, and those of the entry point group `shoal.encoders`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self, TypeAlias

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from policies.errors import PolicyError
from policies.kinds import PluginError, Plugins

Floats: TypeAlias = NDArray[np.float32]
Ids: TypeAlias = NDArray[np.int32]
Arrays: TypeAlias = Mapping[str, NDArray[Any]]


class Features(NamedTuple):
    """One query's non-zero features, distinct `ids` in [0, num_features) and their `values`."""

    ids: Ids
    values: Floats

    def weighed(self, weights_FC: Floats) -> Floats:
        """Return the features' sums [C], weighed by every column of `weights_FC`."""
        sums_C: Floats = self.values.dot(weights_FC.take(self.ids, axis=0))
        return sums_C


class Reading(NamedTuple):
    """One query's features, their weighted sums [C], and its place in the small space, [D]."""

    features: Features
    sums_C: Floats
    point_D: Floats


Reader: TypeAlias = Callable[[str], Reading]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Many queries' features, [Q, num_features] in float32, and points, [Q, num_dimensions].

    Features that training knows nothing of may be missing, as their weights are zero.
    """

    matrix_QF: sp.csr_matrix
    points_QD: Floats


class Encoder(Protocol):
    """Maps text to features; any text at all, and never raises on one.

    Feature rows and points have norm at most about 1, so that one regularisation strength fits
    every query length. Heads weigh features; clusters and landmarks see points.
    """

    @property
    def kind(self) -> str:
        """The name under which the registry knows this encoder."""
        ...

    @property
    def num_features(self) -> int:
        """The length of a feature row."""
        ...

    @property
    def num_dimensions(self) -> int:
        """The length of a point."""
        ...

    def fit_encode(self, texts: Sequence[str]) -> Encoded:
        """Learn from training queries, and return what `encode` would of them."""
        ...

    def features(self, text: str) -> Features:
        """Return the features of one query."""
        ...

    def reader(self, weights_FC: Floats) -> Reader:
        """Return what reads one query at a time, fast, for whoever weighs features so.

        Thread-safe; a later `fit_encode` or `restore` changes nothing in it.
        """
        ...

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return the features and points of many queries."""
        ...

    def names(self, text: str) -> dict[int, str]:
        """Return what a person would call the features of `text` (empty where nobody can)."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return the hyperparameters as JSON data."""
        ...

    def arrays(self) -> Arrays:
        """Return what `fit_encode` learned."""
        ...

    def restore(self, arrays: Arrays) -> Self:
        """Take back what `arrays` returned; `PolicyError` where it does not fit the settings."""
        ...


KINDS: Plugins[type[Any]] = Plugins(
    "shoal.encoders",
    type,
    {
        "finetuned": "policies.encoders.transformer:FineTuned",
        "neural": "policies.encoders.transformer:Neural",
        "ngrams": "policies.encoders.ngrams:NGrams",
    },
)
"""Classes that are an `Encoder` each, made of their settings."""


def build_encoder(kind: str, settings: Mapping[str, Any]) -> Encoder:
    """Return an unfitted encoder; `PolicyError` for an unknown kind or setting."""
    try:
        encoder: Encoder = KINDS.load(kind)(**settings)
    except PluginError as error:
        raise PolicyError(f"encoder: {error}") from None
    except TypeError as error:
        raise PolicyError(f"encoder {kind}: {error}") from None
    return encoder


def parse_encoder(text: str, settings: Mapping[str, Any]) -> Encoder:
    """Return the encoder that a command line names: a kind, or kind:FOLDER; see `build_encoder`."""
    kind, colon, path = text.partition(":")
    return build_encoder(kind, {**settings, **({"path": path} if colon else {})})
