"""Prints what is installed here: distribution, version, licence, as their metadata say."""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution, distributions

_MOST_CHARACTERS = 60


def licence_of(found: Distribution) -> str:
    """Return the licence's name; some have its whole text, or only a classifier."""
    stated = found.metadata.get("License-Expression") or found.metadata.get("License") or ""
    classifiers = found.metadata.get_all("Classifier") or []
    classified = [c.rpartition(" :: ")[2] for c in classifiers if c.startswith("License ::")]
    text = stated if stated and "\n" not in stated else ", ".join(classified) or stated
    return re.sub(r"\s+", " ", text)[:_MOST_CHARACTERS] or "unknown"


def main() -> None:
    """Print a line per distribution."""
    lines = {
        f"{found.metadata['Name']}\t{found.version}\t{licence_of(found)}\n"
        for found in distributions()
    }
    sys.stdout.write("".join(sorted(lines, key=str.lower)))


if __name__ == "__main__":
    main()
