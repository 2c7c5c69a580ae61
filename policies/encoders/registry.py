"""Encoders by kind, from JSON settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from policies.encoders.base import Encoder
from policies.encoders.ngrams import NGrams
from policies.encoders.transformer import FineTuned, Neural
from policies.errors import PolicyError


def build_encoder(kind: str, settings: Mapping[str, Any]) -> Encoder:
    """Return an unfitted encoder; `PolicyError` for an unknown kind or setting."""
    if kind not in _ENCODERS:
        raise PolicyError(
            f"encoder: {kind!r} is unknown; allowed are {', '.join(sorted(_ENCODERS))}"
        )
    try:
        return _ENCODERS[kind](**settings)
    except TypeError as error:
        raise PolicyError(f"encoder {kind}: {error}") from None


def parse_encoder(text: str, settings: Mapping[str, Any]) -> Encoder:
    """Return the encoder that a command line names: a kind, or kind:FOLDER; see `build_encoder`."""
    kind, colon, path = text.partition(":")
    return build_encoder(kind, {**settings, **({"path": path} if colon else {})})


_ENCODERS: dict[str, Callable[..., Encoder]] = {
    FineTuned.kind: FineTuned,
    Neural.kind: Neural,
    NGrams.kind: NGrams,
}
