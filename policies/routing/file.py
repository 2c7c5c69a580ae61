"""Routers as files: one .npz of plain arrays, one of which is the JSON header. Nothing is pickled.

The header names the schema, so that a later version can tell what it reads.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from policies.encoders.registry import build_encoder
from policies.errors import PolicyError
from policies.routing.router import Router
from policies.routing.topics import Topics

SCHEMA: Final = "shoal-router/1"


def save_router(router: Router, path: Path | str) -> None:
    """Write `router` to `path`, replacing what was there in one step."""
    path = Path(path)
    header = {
        "schema": SCHEMA,
        "models": list(router.models),
        "encoder": {"kind": router.encoder.kind, "settings": router.encoder.settings()},
        "familiar_above": router.topics.familiar_above,
        "facts": router.facts,
    }
    rows = np.flatnonzero(router.weights_FM.any(1))
    arrays: dict[str, NDArray[Any]] = {
        "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
        "rows": rows,
        "weights": router.weights_FM[rows],
        "bias": router.bias_M,
        "centroids": router.topics.centroids_KD,
        "cluster_scores": router.topics.scores_KM,
        "cluster_sizes": router.topics.sizes_K,
        "output_tokens": router.output_tokens_M,
        **{f"encoder.{name}": array for name, array in router.encoder.arrays().items()},
    }
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    Path(file.name).chmod(0o644)
    os.replace(file.name, path)  # noqa: PTH105 - atomic on the name we have


def load_router(path: Path | str) -> Router:
    """Read a router; `PolicyError` names the file and what is wrong with it."""
    path = Path(path)
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        raise PolicyError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError, AttributeError, zipfile.BadZipFile, zipfile.zlib.error) as error:  # type: ignore[attr-defined]
        raise PolicyError(f"{path} is not a router file, or is damaged: {error}") from None
    try:
        return _read(arrays)
    except KeyError as error:
        raise PolicyError(f"{path} is not a complete router file: {error} is missing") from None
    except (ValueError, TypeError, IndexError) as error:
        raise PolicyError(f"{path} is not a router file that this version reads: {error}") from None


def _read(arrays: Mapping[str, NDArray[Any]]) -> Router:
    header = json.loads(arrays["header"].tobytes())
    if header["schema"] != SCHEMA:
        raise PolicyError(f"schema {header['schema']!r} is unknown; allowed is {SCHEMA!r}")
    models = tuple(header["models"])
    encoder = build_encoder(header["encoder"]["kind"], header["encoder"]["settings"])
    encoder.restore(
        {
            name.removeprefix("encoder."): array
            for name, array in arrays.items()
            if name.startswith("encoder.")
        }
    )
    num_clusters = len(arrays["centroids"])
    rows = arrays["rows"]
    _check("weights", arrays, (len(rows), len(models)))
    _check("bias", arrays, (len(models),))
    _check("output_tokens", arrays, (len(models),))
    _check("centroids", arrays, (num_clusters, encoder.num_dimensions))
    _check("cluster_scores", arrays, (num_clusters, len(models)))
    _check("cluster_sizes", arrays, (num_clusters,))
    weights = np.zeros((encoder.num_features, len(models)), np.float32)
    weights[rows] = arrays["weights"]
    return Router(
        models=models,
        encoder=encoder,
        weights_FM=weights,
        bias_M=arrays["bias"],
        topics=Topics(
            centroids_KD=arrays["centroids"],
            scores_KM=arrays["cluster_scores"],
            sizes_K=arrays["cluster_sizes"],
            familiar_above=float(header["familiar_above"]),
        ),
        output_tokens_M=arrays["output_tokens"],
        facts=header["facts"],
    )


def _check(name: str, arrays: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> None:
    array = arrays[name]
    if array.shape != shape:
        raise PolicyError(f"the array {name!r} has shape {array.shape}, not {shape}")
