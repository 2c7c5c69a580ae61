"""Writes locks/NAME.txt: every distribution of an environment, by version and hash.

    python .ci/lock.py NAME [REQUIREMENT ...] [--no-deps REQUIREMENT ...]

That is what the requirements need, and those after `--no-deps` alone; without any, all that is
installed in the environment of this Python. Versions are those that are installed there, where they
are. The hashes are of the files that pip chooses here, so a lock is for one platform. `make lock`
writes all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

LOCKS = Path(__file__).parents[1] / "locks"
HEAD = "# For Linux on x86-64 and Python 3.11. `make lock` writes it; see docs/operations.md.\n"


def installed() -> list[str]:
    """Return what is installed here as requirements, Shoal itself and pip left out.

    Of a version without a build's name (`+cpu`) pip takes the build that it finds.
    """
    found = {one.metadata["Name"]: one.version.partition("+")[0] for one in distributions()}
    return [f"{name}=={found[name]}" for name in sorted(found.keys() - {"shoal", "pip"})]


def chosen(requirements: list[str], *options: str) -> list[dict[str, Any]]:
    """Return what pip would install for `requirements`, as its report has it."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    with tempfile.NamedTemporaryFile() as report, tempfile.NamedTemporaryFile("w") as versions:
        versions.write("\n".join(installed()))
        versions.flush()
        options = (*options, "--constraint", versions.name, "--report", report.name)
        subprocess.run([*command, *options, *requirements], check=True)
        found: list[dict[str, Any]] = json.loads(Path(report.name).read_text())["install"]
        return found


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("needed", nargs="*")
    parser.add_argument("--no-deps", nargs="*", default=[], dest="alone")
    arguments = parser.parse_args()
    needed, alone = arguments.needed, arguments.alone
    found = chosen(needed) if needed else chosen(installed(), "--no-deps")
    lines = set()
    for one in found + (chosen(alone, "--no-deps") if alone else []):
        hashes = one["download_info"].get("archive_info", {}).get("hashes", {})
        if "sha256" in hashes:  # Shoal itself is a folder, and has none
            pinned = f"{one['metadata']['name'].lower()}=={one['metadata']['version']}"
            lines.add(f"{pinned} --hash=sha256:{hashes['sha256']}\n")
    LOCKS.mkdir(exist_ok=True)
    fresh = LOCKS / f"{arguments.name}.new"
    fresh.write_text(HEAD + "".join(sorted(lines)))
    fresh.replace(LOCKS / f"{arguments.name}.txt")


if __name__ == "__main__":
    main()
