"""Four corpora of real text, from Debian packages: `python -m tests.bench.downscale.corpora DIR`.

Fetches the packages by name with apt-get, without installing them, and writes a folder of documents
per domain, each package's licence beside it, and the recipes that downscale on them, to cut chunks
and to adapters:

    shoal downscale DIR/smollm2.yaml --out POOL
    shoal downscale DIR/smollm2-adapters.yaml --out POOL

Python's library reference, PostgreSQL's manual, Git's manual (HTML as shipped), and the King James
Bible (a file per chapter, written by the program that the text is packed for).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

# From a domain to its package and the folder of it that holds the documents.
_PAGES = {
    "python": ("python3.11-doc", "usr/share/doc/python3.11/html/library"),
    "postgresql": ("postgresql-doc-15", "usr/share/doc/postgresql-doc-15/html"),
    "git": ("git-doc", "usr/share/doc/git-doc"),
}
_BIBLE = ("bible-kjv", "bible-kjv-text")
_RECIPES = sorted(Path(__file__).parent.glob("smollm2*.yaml"))
_VERSE = re.compile(r"(\w+?)(\d+):\d+ (.+)")
# Lists of words and of pages are no text.
_NO_TEXT = ("bookindex.html", "genindex-all.html", "index.html", "contents.html")


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.downscale.corpora")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as root:
        packages = [*(package for package, _ in _PAGES.values()), *_BIBLE]
        subprocess.run(["apt-get", "download", "-qq", *packages], cwd=root, check=True)
        for file in Path(root).glob("*.deb"):
            subprocess.run(["dpkg-deb", "--extract", file, root], check=True)
        for domain, (package, inner) in _PAGES.items():
            _write_pages(Path(root) / inner, _fresh(folder, domain, package, Path(root)))
        _write_bible(Path(root), _fresh(folder, "bible", _BIBLE[1], Path(root)))
    for recipe in _RECIPES:
        shutil.copy(recipe, folder)
        print(folder / recipe.name)


def _fresh(folder: Path, domain: str, package: str, root: Path) -> Path:
    """An empty folder for a domain, its licence beside it."""
    corpus = folder / domain
    shutil.rmtree(corpus, ignore_errors=True)
    corpus.mkdir()
    shutil.copy(root / f"usr/share/doc/{package}/copyright", folder / f"{domain}.copyright")
    return corpus


def _write_pages(pages: Path, corpus: Path) -> None:
    for page in pages.glob("*.html"):
        if page.name not in _NO_TEXT and not page.is_symlink():
            shutil.copy(page, corpus)


def _write_bible(root: Path, corpus: Path) -> None:
    verses = subprocess.run(
        [root / "usr/bin/bible", "-f", "-p", root / "usr/lib", "gen1:1-rev22:21"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    chapters: dict[str, list[str]] = defaultdict(list)
    for line in verses.splitlines():
        if found := _VERSE.fullmatch(line.strip()):
            chapters[f"{found[1]}{found[2]}"].append(found[3])
    for name, lines in chapters.items():
        (corpus / f"{name}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
