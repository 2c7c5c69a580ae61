"""Files are replaced whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from policies.errors import PolicyError
from policies.files import replacing, write_atomic


def test_content_replaces_what_stood_there(tmp_path: Path) -> None:
    """Text (as UTF-8) or bytes take the old content's place, readable by others, alone."""
    target = tmp_path / "facts.json"
    write_atomic(target, b"old")
    write_atomic(target, "new ∑")
    assert target.read_bytes() == "new ∑".encode()
    assert target.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [target]


def test_an_error_on_the_way_leaves_the_old_file(tmp_path: Path) -> None:
    """A writer that fails halfway changes nothing and leaves no temporary file behind."""
    target = tmp_path / "plot.png"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="halfway"), replacing(target) as fresh:
        assert fresh.suffix == ".png"
        fresh.write_text("half of the n")
        raise RuntimeError("halfway")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    """The error says which folder isn't there."""
    with pytest.raises(PolicyError, match=r"there is no folder .*/no$"):
        write_atomic(tmp_path / "no" / "facts.json", "{}")


def test_a_folder_that_takes_no_file_is_named() -> None:
    """The error names the file that was wanted, not the temporary one; not even root may here."""
    with pytest.raises(PolicyError, match=r"^/proc/x.json cannot be written: .*/proc takes no"):
        write_atomic(Path("/proc/x.json"), "anything")


def test_a_full_disk_is_named_with_the_file(tmp_path: Path) -> None:
    """What stood there stays, and no half of the new content lies beside it."""
    target = tmp_path / "facts.json"
    target.write_text("old")
    code = (
        "import resource, sys, pathlib; from policies.errors import PolicyError\n"
        "from policies.files import write_atomic\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "try: write_atomic(pathlib.Path(sys.argv[1]), 'x' * 1000)\n"
        "except PolicyError as error: print(error)"
    )
    words = [sys.executable, "-c", code, str(target)]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert told.startswith(f"{target} cannot be written: ")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_stays_and_leads_to_the_new_file(tmp_path):
    """As an editor would have it."""
    (tmp_path / "real.json").write_text("old")
    link = tmp_path / "link.json"
    link.symlink_to("real.json")
    write_atomic(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"


def test_what_is_no_file_is_written_to_and_stays(tmp_path):
    """A pipe here; a device, /dev/null say, would be gone for everybody on the machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as threads:
        read = threads.submit(pipe.read_text)
        write_atomic(pipe, "told")
        assert read.result(60) == "told"
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]
