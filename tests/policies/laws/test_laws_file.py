"""laws.npz beside a pool: written whole, read strictly."""

from pathlib import Path
from typing import Any

import pytest

from policies.errors import ArtifactError
from policies.files import Artifact, write_artifact
from policies.laws.file import PoolLaws, read_laws, write_laws
from policies.laws.scaling import EnsembleLaw


def test_laws_come_back_as_written(tmp_path: Path) -> None:
    """What is written is read back; what was None stays None."""
    law = EnsembleLaw(L0=0.4, a=0.8, b=0.2)
    known = {"data_sha256": "5e" * 32, "rmse": {"ensemble_error": 0.02}}
    laws = PoolLaws(origin="measured", ensemble_error=law, **known)
    write_laws(tmp_path / "laws.npz", laws)
    assert read_laws(tmp_path / "laws.npz") == laws


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"ensemble_error": {"L0": 1, "a": 1, "b": 1}}, "the key 'origin' is missing"),
        ({"origin": "x", "ensembles": {}}, "'ensembles' is unknown"),
        (
            {"origin": "x", "ensemble_error": {"L0": 1, "a": 1, "b": 1, "c": 1}},
            r"laws\.ensemble_error: the key 'c' is unknown",
        ),
        (
            {"origin": "x", "ensemble_error": {"a": 1}},
            r"laws\.ensemble_error: the key 'L0' is missing",
        ),
        (
            {"origin": "x", "ensemble_error": {"L0": 1, "a": "1", "b": 1}},
            r"laws\.ensemble_error\.a: '1' is refused: it should be a valid number",
        ),
    ],
)
def test_a_bad_laws_file_is_refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    """The error names the file, the key and what is allowed."""
    file = tmp_path / "laws.npz"
    write_artifact(file, Artifact(settings=content), kind="laws", schema=1)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_laws(file)
    assert "laws.npz" in str(caught.value)
