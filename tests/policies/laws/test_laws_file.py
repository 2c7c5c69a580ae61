"""laws.json beside a pool: written whole, read strictly."""

import json

import pytest

from policies.errors import LawError
from policies.laws import EnsembleLaw
from policies.laws.file import PoolLaws, read_laws, write_laws


def test_laws_come_back_as_written(tmp_path):
    """What is written is read back; what was None stays None; no temporary file is left."""
    laws = PoolLaws(origin="measured", ensemble_error=EnsembleLaw(L0=0.4, a=0.8, b=0.2))
    write_laws(tmp_path / "laws.json", laws)
    assert read_laws(tmp_path / "laws.json") == laws
    assert [path.name for path in tmp_path.iterdir()] == ["laws.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        (json.dumps({"ensemble_error": {}}), "origin"),
        (json.dumps({"origin": "x", "ensembles": {}}), "'ensembles' is unknown"),
        (json.dumps({"origin": "x", "ensemble_error": {"a": 1}}), "exactly the keys L0, a, b"),
        (
            json.dumps({"origin": "x", "ensemble_error": {"L0": 1, "a": "1", "b": 1}}),
            "ensemble_error.a: '1' is not a number",
        ),
    ],
)
def test_a_bad_laws_file_is_refused(tmp_path, content, message):
    """The error names the file, the key and what is allowed."""
    file = tmp_path / "laws.json"
    file.write_text(content)
    with pytest.raises(LawError, match=message):
        read_laws(file)


def test_a_missing_laws_file_is_named(tmp_path):
    """The path that was looked for is in the message."""
    with pytest.raises(LawError, match=r"no laws file at .*laws\.json"):
        read_laws(tmp_path / "laws.json")
