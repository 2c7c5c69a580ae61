"""Routers as files: one .npz of plain arrays, one of which is the JSON header. Nothing is pickled.

The header names the schema, so that a later version can tell what it reads. A transformer's folder
is named, not copied: relative to the router's file where it lies beside it, so that both can move.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from policies.encoders.registry import build_encoder
from policies.errors import PolicyError
from policies.files import replacing
from policies.routing.bags import Bags
from policies.routing.landmarks import Landmarks, no_landmarks
from policies.routing.router import Router
from policies.routing.topics import Topics

SCHEMA: Final = "shoal-router/3"
WITHOUT_LANDMARKS: Final = "shoal-router/2"
"""Files from before routers had landmarks: read all the same, where the encoder still fits."""

_DAMAGED: Final = (
    # What zipfile and NumPy raise where a byte of the archive is wrong.
    ValueError,
    EOFError,
    AttributeError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


def save_router(router: Router, path: Path | str) -> None:
    """Write `router` to `path`, replacing what was there in one step."""
    path = Path(path)
    header = {
        "schema": SCHEMA,
        "models": list(router.models),
        "encoder": {"kind": router.encoder.kind, "settings": _stored(router, path.parent)},
        "familiar_above": router.topics.familiar_above,
        "sharpness": router.landmarks.sharpness,
        "faint": router.landmarks.faint,
        "usual_spread": router.bags.usual_up_to,
        "facts": router.facts,
    }
    rows = np.flatnonzero(router.weights_FM.any(1) | router.bags.weights_FBM.any((1, 2)))
    arrays: dict[str, NDArray[Any]] = {
        "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
        "rows": rows,
        "weights": router.weights_FM[rows],
        "bias": router.bias_M,
        "bag_weights": router.bags.weights_FBM[rows].astype(np.float16),
        "bag_bias": router.bags.bias_BM,
        "landmark_centre": router.landmarks.centre_D,
        "landmarks": router.landmarks.units_LD,
        "landmark_mix": router.landmarks.mix_LN,
        "centroids": router.topics.centroids_KD,
        "cluster_scores": router.topics.scores_KM,
        "cluster_sizes": router.topics.sizes_K,
        "output_tokens": router.output_tokens_M,
        **{f"encoder.{name}": array for name, array in router.encoder.arrays().items()},
    }
    with replacing(path) as fresh, fresh.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def load_router(path: Path | str) -> Router:
    """Read a router; `PolicyError` names the file and what is wrong with it."""
    path = Path(path)
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        raise PolicyError(f"{path} cannot be read: {error.strerror or error}") from None
    except _DAMAGED as error:
        raise PolicyError(f"{path} is not a router file, or is damaged: {error}") from None
    try:
        return _read(arrays, path.parent)
    except KeyError as error:
        raise PolicyError(f"{path} is not a complete router file: {error} is missing") from None
    except (ValueError, TypeError, IndexError) as error:
        raise PolicyError(f"{path} is not a router file that this version reads: {error}") from None


def _read(arrays: Mapping[str, NDArray[Any]], folder: Path) -> Router:
    header = json.loads(arrays["header"].tobytes())
    models = tuple(header["models"])
    if not all(isinstance(name, str) for name in models):
        raise PolicyError(f"models: {header['models']!r} are not names")
    if not isinstance(header["facts"], dict):
        raise PolicyError(f"facts: {header['facts']!r} is not an object")
    if header["schema"] not in (SCHEMA, WITHOUT_LANDMARKS):
        raise PolicyError(
            f"schema {header['schema']!r} is unknown; allowed are {SCHEMA!r}, {WITHOUT_LANDMARKS!r}"
        )
    for name, array in arrays.items():
        _check_numbers(name, array)
    settings = header["encoder"]["settings"]
    if "path" in settings:
        settings["path"] = str(folder / settings["path"])
    encoder = build_encoder(header["encoder"]["kind"], settings)
    encoder.restore(
        {
            name.removeprefix("encoder."): array
            for name, array in arrays.items()
            if name.startswith("encoder.")
        }
    )
    landmarks = (
        _landmarks(header, arrays, encoder.num_dimensions)
        if header["schema"] == SCHEMA
        else no_landmarks(encoder.num_dimensions)
    )
    num_features = encoder.num_features + landmarks.num_features
    num_clusters = len(arrays["centroids"])
    rows = arrays["rows"]
    _check("weights", arrays, (len(rows), len(models)))
    _check("bias", arrays, (len(models),))
    num_bags = len(arrays["bag_bias"])
    _check("bag_weights", arrays, (len(rows), num_bags, len(models)))
    _check("bag_bias", arrays, (num_bags, len(models)))
    _check("output_tokens", arrays, (len(models),))
    _check("centroids", arrays, (num_clusters, encoder.num_dimensions))
    _check("cluster_scores", arrays, (num_clusters, len(models)))
    _check("cluster_sizes", arrays, (num_clusters,))
    weights = np.zeros((num_features, len(models)), np.float32)
    weights[rows] = arrays["weights"]
    bag_weights = np.zeros((num_features, num_bags, len(models)), np.float32)
    bag_weights[rows] = arrays["bag_weights"]
    return Router(
        models=models,
        encoder=encoder,
        landmarks=landmarks,
        weights_FM=weights,
        bias_M=arrays["bias"],
        topics=Topics(
            centroids_KD=arrays["centroids"],
            scores_KM=arrays["cluster_scores"],
            sizes_K=arrays["cluster_sizes"],
            familiar_above=_number("familiar_above", header),
        ),
        bags=Bags(
            weights_FBM=bag_weights,
            bias_BM=arrays["bag_bias"],
            usual_up_to=float(header["usual_spread"]),
        ),
        output_tokens_M=arrays["output_tokens"],
        facts=header["facts"],
    )


def _landmarks(
    header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], num_dimensions: int
) -> Landmarks:
    num_landmarks = len(arrays["landmarks"])
    _check("landmarks", arrays, (num_landmarks, num_dimensions))
    _check("landmark_centre", arrays, (num_dimensions,))
    _check("landmark_mix", arrays, (num_landmarks, arrays["landmark_mix"].shape[1]))
    return Landmarks(
        centre_D=arrays["landmark_centre"],
        units_LD=arrays["landmarks"],
        mix_LN=arrays["landmark_mix"],
        sharpness=_number("sharpness", header),
        faint=_number("faint", header),
    )


def _stored(router: Router, folder: Path) -> dict[str, Any]:
    """Return the encoder's settings; its folder relative to `folder` where it lies inside."""
    settings = router.encoder.settings()
    if "path" in settings:
        full, folder = Path(settings["path"]).resolve(), folder.resolve()
        inside = full.is_relative_to(folder)
        settings["path"] = str(full.relative_to(folder) if inside else full)
    return settings


def _check(name: str, arrays: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> None:
    array = arrays[name]
    if array.shape != shape:
        raise PolicyError(f"the array {name!r} has shape {array.shape}, not {shape}")


def _check_numbers(name: str, array: NDArray[Any]) -> None:
    """Refuse what predictions would be made of; lengths of answers may be unknown (NaN)."""
    if array.dtype.kind not in "fiu":
        raise PolicyError(f"the array {name!r} holds {array.dtype}, not numbers")
    if name != "output_tokens" and not np.isfinite(array).all():
        raise PolicyError(f"the array {name!r} holds numbers that are not finite")


def _number(key: str, header: Mapping[str, Any]) -> float:
    value = float(header[key])
    if not math.isfinite(value):
        raise PolicyError(f"{key}: {value} is not finite")
    return value
