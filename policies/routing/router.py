"""A trained router: what it predicts for a query, before anybody weighs quality against cost.

Its file is an artifact. A transformer's folder is named in it, not copied: relative to the file
where it lies beside it, so that both can move.

Shape legend: Q queries, F features of the encoder, N of the landmarks, M models, L landmarks,
D dimensions of a point, K clusters.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from policies.encoders.base import Encoded, Encoder, Features, Reader, build_encoder
from policies.errors import PolicyError
from policies.files import PACKAGE, Artifact, check_shape, read_artifact, write_artifact
from policies.routing.looks import Look
from policies.routing.nearness import Doubt, Landmarks, Nearness, Topics
from policies.routing.phrases import clauses
from policies.routing.strength import WHOLE, Belief

Floats = NDArray[np.float64]

_KIND: Final = "router"
_SCHEMA: Final = 5

_MOST_CLAUSES: Final = 8
# Fewer words beside a question ("the team", "Sir,") ask for nothing of their own.
_REQUEST_WORDS: Final = 3


class Prediction(NamedTuple):
    """What a router says of one query.

    `quality_M` are calibrated expected scores in [0, 1]; `cluster` is the nearest, `similarity`
    how much the query is like training's (see `Router.similarities`). Where it is not `familiar`,
    `quality_M` is what queries unlike training's make one expect (see `Doubt`). `talk` is about 1
    for small talk and -1 for a request. `likeness_M` is the share of the logits that is owed to the
    landmarks.
    """

    quality_M: NDArray[np.float32]
    cluster: int
    similarity: float
    familiar: bool
    talk: float
    likeness_M: NDArray[np.float32]
    features: Features


@dataclass(frozen=True, kw_only=True)
class Router:
    """Encoder, landmarks, calibrated heads and clusters, fitted on one set of outcomes.

    `weights_FM` [F + N, M] weigh the encoder's features, then the landmarks'; `field_F` [F + N]
    weigh them to tell the field's queries from others, where training knew others (None: it did
    not), and `talk_F` small talk from requests. `belief` says what share of all that counts.
    `output_tokens_M` are the models' mean answer lengths (NaN where unknown). `seen_Q` are the
    hashes of the training queries, ascending: nobody should judge it on them. `looks` say by model
    what its reading of a query changes, where training knew readings. `facts` is JSON data about
    the training: data hash, numbers, held-out metrics.
    """

    models: tuple[str, ...]
    encoder: Encoder
    landmarks: Landmarks
    weights_FM: NDArray[np.float32]
    bias_M: NDArray[np.float32]
    topics: Topics
    doubt: Doubt
    output_tokens_M: NDArray[np.float32]
    field_F: NDArray[np.float32] | None = None
    talk_F: NDArray[np.float32] | None = None
    belief: Belief = WHOLE
    seen_Q: NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))
    looks: Mapping[str, Look] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    _read: Reader = field(init=False, repr=False, compare=False)
    _nearness: Nearness = field(init=False, repr=False, compare=False)
    _likeness_CL: NDArray[np.float32] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Lay the arrays out for one query at a time: what is multiplied together lies together."""
        num_features, weights_FC = self.encoder.num_features, self.weights_FM
        for extra_F in (self.field_F, self.talk_F):  # columns after the models'
            if extra_F is not None:
                weights_FC = np.column_stack((weights_FC, extra_F))
        # The landmarks' mixing is linear, as is what weighs it: one product instead of two.
        likeness_LC = self.landmarks.mix_LN @ weights_FC[num_features:]
        laid_out = {
            "_read": self.encoder.reader(weights_FC[:num_features]),
            "_nearness": Nearness(self.landmarks, self.topics),
            "_likeness_CL": np.ascontiguousarray(likeness_LC.T),  # products run along memory
        }
        for name, value in laid_out.items():
            object.__setattr__(self, name, value)

    def has_seen(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Return which queries it was trained on, [Q]."""
        return np.isin(query_hashes(texts), self.seen_Q)

    def predict(self, text: str) -> Prediction:
        """Predict for one query, by what it asks (see `asked`)."""
        return self._predict(self.asked(text))

    def asked(self, text: str) -> str:
        """Return the part of `text` that decides: without what is said around its question, which
        is clauses at either end that are unlike the field ("My nephew wonders: …? Thanks!").

        So the same question gets the same answer, however it is put. Where such a clause is no
        small talk but a request of its own, it decides, the most surely one if there are several:
        who answers must know that, too; two words ask for nothing. All of `text` is returned where
        nothing would be left that is like the field, and where training knew nothing outside the
        field to tell it from.
        """
        parts = clauses(text)
        if self.talk_F is None or not 1 < len(parts) <= _MOST_CLAUSES:
            return text
        seen = [self._predict(part) for part in parts]
        like = [c for c, part in enumerate(seen) if part.familiar]
        if not like:
            return text
        first, last = like[0], like[-1] + 1
        around = [*range(first), *range(last, len(parts))]
        if not around:
            return text
        own = [c for c in around if len(parts[c].split()) >= _REQUEST_WORDS]
        if own:
            least: int = min(own, key=lambda c: seen[c].talk + seen[c].similarity)
            if seen[least].talk + seen[least].similarity < self.doubt.talk_above:
                return parts[least]
        core = " ".join(parts[first:last])
        return core if self._predict(core).familiar else text

    def _predict(self, text: str) -> Prediction:
        features, sums_C, point_D = self._read(text)
        near_L, cluster, similarity = self._nearness.of(point_D)
        likeness_C = self._likeness_CL.dot(near_L)
        sums_C += likeness_C
        if self.belief is not WHOLE:
            share = np.float32(self.belief.of(similarity))
            sums_C *= share
            likeness_C *= share
            features = features._replace(values=features.values * share)
        num_models = len(self.models)
        logits_M, likeness_M = sums_C[:num_models], likeness_C[:num_models]
        if self.field_F is not None:
            similarity = float(sums_C[num_models])
        talk = 0.0 if self.talk_F is None else float(sums_C[-1])
        logits_M += self.bias_M
        familiar = similarity >= self.doubt.familiar_above
        quality_M = expit(logits_M) if familiar else self._expected(similarity)
        return Prediction(quality_M, cluster, similarity, familiar, talk, likeness_M, features)

    def qualities(self, texts: Sequence[str]) -> Floats:
        """Return the expected scores [Q, M] of many queries at once."""
        encoded = self.encoder.encode([self.asked(text) for text in texts])
        logits = np.asarray(self.landmarks.beside(encoded) @ self.weights_FM, np.float64)
        logits *= self.belief.of(self.topics.similarities(encoded.points_QD))[:, None]
        return self.doubt.shrunk(expit(logits + self.bias_M), self._similarities(encoded))

    def cluster_qualities(self, texts: Sequence[str]) -> Floats:
        """Return the mean scores [Q, M] of each query's nearest cluster, with the same doubt."""
        encoded = self.encoder.encode([self.asked(text) for text in texts])
        clusters_Q = self.topics.assign(encoded.points_QD)
        quality_QM = self.topics.scores_KM[clusters_Q].astype(np.float64)
        return self.doubt.shrunk(quality_QM, self._similarities(encoded))

    def similarities(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return how much queries [Q] are like training's: what tells them from those outside,
        about 1 and -1, or where training knew none, how near the nearest cluster is."""
        return self._similarities(self.encoder.encode(texts))

    def _similarities(self, encoded: Encoded) -> NDArray[np.float32]:
        if self.field_F is None:
            return self.topics.similarities(encoded.points_QD)
        similarity_Q: NDArray[np.float32] = self.landmarks.beside(encoded) @ self.field_F
        return similarity_Q

    def _expected(self, similarity: float) -> NDArray[np.float32]:
        expected_M: NDArray[np.float32] = self.doubt.left_out_M * np.float32(
            self.doubt.trust(similarity)
        )
        return expected_M


def query_hashes(texts: Sequence[str]) -> NDArray[np.uint32]:
    """Return a number for each query; case and white space do not change it."""
    plain = (" ".join(text.lower().split()).encode("utf-8", "replace") for text in texts)
    return np.fromiter(map(zlib.crc32, plain), np.uint32)


def save_router(router: Router, path: Path | str) -> None:
    """Write `router` to `path`, replacing what was there in one step."""
    path = Path(path)
    used_F = router.weights_FM.any(1)
    for extra_F in (router.field_F, router.talk_F):
        if extra_F is not None:
            used_F |= extra_F != 0
    rows = np.flatnonzero(used_F)
    facts = dict(router.facts)
    artifact = Artifact(
        data_sha256=facts.pop("data_sha256", ""),
        metrics=facts.pop("held_out", {}),
        settings={
            "models": list(router.models),
            "encoder": {
                "kind": router.encoder.kind,
                "settings": _portable(router.encoder.settings(), path.parent),
            },
            "familiar_above": router.doubt.familiar_above,
            "talk_above": router.doubt.talk_above,
            "sharpness": router.landmarks.sharpness,
            "faint": router.landmarks.faint,
            "looks": {name: look.reach for name, look in router.looks.items()},
            "facts": facts,
        },
        arrays={
            "rows": rows,
            "weights": router.weights_FM[rows],
            "bias": router.bias_M,
            **({} if router.field_F is None else {"field": router.field_F[rows]}),
            **({} if router.talk_F is None else {"talk": router.talk_F[rows]}),
            "belief_edges": router.belief.edges,
            "belief_shares": router.belief.shares_B,
            "landmark_centre": router.landmarks.centre_D,
            "landmarks": router.landmarks.units_LD,
            "landmark_mix": router.landmarks.mix_LN,
            "centroids": router.topics.centroids_KD,
            "cluster_scores": router.topics.scores_KM,
            "cluster_sizes": router.topics.sizes_K,
            "left_out_scores": router.doubt.left_out_M,
            "left_out_similarity": router.doubt.left_out_similarity_U,
            "output_tokens": router.output_tokens_M,
            "seen": router.seen_Q,
            **{f"look.{name}": look.array for name, look in router.looks.items()},
            **{f"encoder.{name}": array for name, array in router.encoder.arrays().items()},
        },
    )
    write_artifact(path, artifact, kind=_KIND, schema=_SCHEMA)


def load_router(path: Path | str) -> Router:
    """Read a router; `ArtifactError` names the file and what is wrong with it."""
    path = Path(path)
    return read_artifact(
        path, lambda artifact: _restored(artifact, path.parent), kind=_KIND, schema=_SCHEMA
    )


def _restored(artifact: Artifact, folder: Path) -> Router:
    arrays, settings = artifact.arrays, artifact.settings
    models = tuple(settings["models"])
    if not all(isinstance(name, str) for name in models):
        raise PolicyError(f"models: {settings['models']!r} are not names")
    for name, array in arrays.items():
        # Lengths of answers may be unknown; what predictions are made of may not.
        if name != "output_tokens" and not np.isfinite(array).all():
            raise PolicyError(f"the array {name!r} holds numbers that are not finite")
    encoder = _encoder(settings["encoder"], arrays, folder)
    num_landmarks, num_mixed = arrays["landmark_mix"].shape
    num_features = encoder.num_features + num_mixed
    num_clusters, rows = len(arrays["centroids"]), arrays["rows"]
    num_dimensions, num_models = encoder.num_dimensions, len(models)
    shapes = {
        "weights": (len(rows), num_models),
        "bias": (num_models,),
        "landmark_centre": (num_dimensions,),
        "landmarks": (num_landmarks, num_dimensions),
        "centroids": (num_clusters, num_dimensions),
        "cluster_scores": (num_clusters, num_models),
        "cluster_sizes": (num_clusters,),
        "left_out_scores": (num_models,),
        "left_out_similarity": (len(arrays["left_out_similarity"]),),
        "output_tokens": (num_models,),
    }
    extra = {name: (len(rows),) for name in ("field", "talk") if name in arrays}
    for name, shape in (shapes | extra).items():
        check_shape(name, arrays[name], shape)

    def spread(name: str) -> NDArray[np.float32]:
        values = arrays[name]
        everywhere = np.zeros((num_features, *values.shape[1:]), np.float32)
        everywhere[rows] = values
        return everywhere

    return Router(
        models=models,
        encoder=encoder,
        landmarks=Landmarks(
            centre_D=arrays["landmark_centre"],
            units_LD=arrays["landmarks"],
            mix_LN=arrays["landmark_mix"],
            sharpness=_number("sharpness", settings),
            faint=_number("faint", settings),
        ),
        weights_FM=spread("weights"),
        bias_M=arrays["bias"],
        field_F=spread("field") if "field" in arrays else None,
        # Nor does a router of an earlier version know small talk.
        talk_F=spread("talk") if "talk" in arrays else None,
        topics=Topics(
            centroids_KD=arrays["centroids"],
            scores_KM=arrays["cluster_scores"],
            sizes_K=arrays["cluster_sizes"],
        ),
        doubt=Doubt(
            familiar_above=_number("familiar_above", settings),
            talk_above=_number("talk_above", settings) if "talk" in arrays else 0.0,
            left_out_M=arrays["left_out_scores"],
            left_out_similarity_U=arrays["left_out_similarity"],
        ),
        output_tokens_M=arrays["output_tokens"],
        # A router of an earlier version does not tell.
        seen_Q=arrays.get("seen", np.empty(0, np.uint32)),
        belief=_belief(arrays),
        looks={
            name: Look.of(arrays[f"look.{name}"], reach=float(reach))
            for name, reach in settings.get("looks", {}).items()
        },
        facts={
            "data_sha256": artifact.data_sha256,
            **settings["facts"],
            "held_out": artifact.metrics,
        },
    )


def _belief(arrays: Mapping[str, NDArray[Any]]) -> Belief:
    """Return what the file says of it; one of an earlier version says nothing."""
    if "belief_shares" not in arrays or len(arrays["belief_shares"]) == 1:
        return WHOLE
    edges, shares_B = arrays["belief_edges"], arrays["belief_shares"]
    check_shape("belief_edges", edges, (len(shares_B) - 1,))
    if (np.diff(edges) < 0).any() or not ((shares_B >= 0) & (shares_B <= 1)).all():
        raise PolicyError("belief: its edges do not ascend, or a share is not in [0, 1]")
    return Belief(edges=edges, shares_B=shares_B)


def _encoder(
    described: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], folder: Path
) -> Encoder:
    settings = dict(described["settings"])
    if "path" in settings and not settings["path"].startswith(PACKAGE):
        settings["path"] = str(folder / settings["path"])
    own = {
        name.removeprefix("encoder."): array
        for name, array in arrays.items()
        if name.startswith("encoder.")
    }
    return build_encoder(described["kind"], settings).restore(own)


def _portable(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return an encoder's settings, its folder relative to `folder` where it lies inside."""
    if "path" in settings and not settings["path"].startswith(PACKAGE):
        full, folder = Path(settings["path"]).resolve(), folder.resolve()
        inside = full.is_relative_to(folder)
        settings["path"] = str(full.relative_to(folder) if inside else full)
    return settings


def _number(key: str, settings: Mapping[str, Any]) -> float:
    value = float(settings[key])
    if not math.isfinite(value):
        raise PolicyError(f"{key}: {value} is not finite")
    return value
