"""Encoders by kind, from JSON settings: Shoal's own, and those of the group `shoal.encoders`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from policies.encoders.base import Encoder
from policies.errors import PolicyError
from policies.plugins import PluginError, Plugins

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
