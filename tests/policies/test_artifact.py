"""One file format for what was learned: written whole, read strictly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies.errors import ArtifactError, PolicyError
from policies.files import Artifact, read_artifact, write_artifact

WRITTEN = Artifact(
    settings={"stages": ["a", "b"]},
    arrays={"weights": np.arange(6.0).reshape(2, 3)},
    data_sha256="0" * 64,
    metrics={"accuracy": 0.5},
)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """Settings, arrays, data hash and metrics come back, and nothing else lies beside the file."""
    file = tmp_path / "learned.npz"
    write_artifact(file, WRITTEN, kind="cascade", schema=7)
    read = read_artifact(file, lambda artifact: artifact, kind="cascade", schema=7)
    assert (read.settings, read.data_sha256, read.metrics) == (
        WRITTEN.settings,
        WRITTEN.data_sha256,
        WRITTEN.metrics,
    )
    np.testing.assert_array_equal(read.arrays["weights"], WRITTEN.arrays["weights"])
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("build", "kind", "schema", "message"),
    [
        (lambda artifact: artifact, "router", 7, "is a cascade file of schema 7, not a router"),
        (lambda artifact: artifact, "cascade", 8, "schema 7, not a cascade file of schema 8"),
        (lambda artifact: artifact.arrays["bias"], "cascade", 7, "not a complete .*'bias'"),
        (lambda artifact: artifact.settings["stages"][2], "cascade", 7, "can be used"),
        (lambda artifact: float("much"), "cascade", 7, "can be used: could not convert"),
    ],
)
def test_one_error_names_the_file_and_what_is_wrong(
    tmp_path: Path, build: Any, kind: str, schema: int, message: str
) -> None:
    """Another kind or schema, something missing, nonsense in it: each is an `ArtifactError`."""
    file = tmp_path / "learned.npz"
    write_artifact(file, WRITTEN, kind="cascade", schema=7)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_artifact(file, build, kind=kind, schema=schema)
    assert str(file) in str(caught.value)
    assert isinstance(caught.value, PolicyError)


def test_a_missing_or_foreign_file_is_named(tmp_path: Path) -> None:
    """A file that isn't there and one that is something else are told apart."""
    with pytest.raises(ArtifactError, match=r"no\.npz cannot be read: No such file"):
        read_artifact(tmp_path / "no.npz", lambda artifact: artifact, kind="laws", schema=1)
    foreign = tmp_path / "text.npz"
    foreign.write_text("not an archive")
    with pytest.raises(ArtifactError, match="is not a laws file, or is damaged"):
        read_artifact(foreign, lambda artifact: artifact, kind="laws", schema=1)
