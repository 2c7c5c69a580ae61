"""Texts of files and folders, HTML as a reader sees it, and which texts are copies of others.

It knows neither examples nor splits. Two texts are near copies if they share four fifths of their
runs of five words (Lee et al. 2022, "Deduplicating Training Data Makes Language Models Better");
that share is estimated by MinHash (Broder 1997).
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

import lxml.html
from datasketch import MinHash, MinHashLSH
from inscriptis.css_profiles import CSS_PROFILES
from inscriptis.html_engine import Inscriptis
from inscriptis.model.config import ParserConfig
from lxml.etree import LxmlError, ParserError

from models.errors import CorpusError
from policies.files import files_below

LINES: Final = ".jsonl"
_PLAIN: Final = (".txt", ".text", ".md", ".markdown", ".rst")
_HTML: Final = (".html", ".htm", ".xhtml")
SUFFIXES: Final = (LINES, *_PLAIN, *_HTML)
# What stands on every page of a site and is not its text.
_FURNITURE: Final = "//nav | //header | //footer | //aside | //script | //style | //template"
_LAYOUT: Final = ParserConfig(css=CSS_PROFILES["strict"])
_PARAGRAPHS: Final = re.compile(r"\n[ \t]*\n")

_RUN_WORDS: Final = 5
# Shorter texts, such as lines of a form, are alike without being copies.
_MIN_WORDS: Final = 20
_NEAR: Final = 0.8
_NUM_HASHES: Final = 128
_HASHED_AT_ONCE: Final = 10_000


def files_of(source: Path) -> tuple[list[Path], Counter[str]]:
    """The files of a corpus: `source` itself, or all readable ones in that folder and below.

    Also how many others the folder holds, by suffix. Hidden files are none, links are followed.
    Nothing is read.

    Raises:
        CorpusError: there is nothing, or nothing that can be read; names what can.
    """
    if not source.exists():
        raise CorpusError(f"there is no corpus at {source}")
    if not source.is_dir():
        if source.suffix.lower() not in SUFFIXES:
            raise CorpusError(
                f"{source}: a corpus is a folder or a file that ends in {', '.join(SUFFIXES)}"
            )
        return [source], Counter()
    try:
        found = files_below(source)
    except OSError as error:
        raise CorpusError(f"{error.filename} cannot be read: {error.strerror}") from None
    for file in found:
        if not file.exists():
            raise CorpusError(f"{file} is a link to nothing")
    found = [file for file in found if file.is_file()]
    files = [file for file in found if file.suffix.lower() in SUFFIXES]
    if not files:
        raise CorpusError(f"{source}: the folder holds no file that ends in {', '.join(SUFFIXES)}")
    return files, Counter(file.suffix for file in found if file not in set(files))


def read_text(file: Path) -> str:
    """The text of a file, a byte-order mark left out.

    Raises:
        CorpusError: it cannot be read, or is no UTF-8; HTML says itself how it is encoded.
    """
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise CorpusError(f"{file} cannot be read: {error.strerror}") from None
    if file.suffix.lower() in _HTML:
        return _text_of_html(file, raw)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{file} is not UTF-8 text: {error}") from None
    if "\0" in text:  # every ASCII text in UTF-16 is valid UTF-8, too
        raise CorpusError(f"{file} is not UTF-8 text: it holds zero bytes, as UTF-16 or a program")
    # The lines of JSON end at line feeds and nowhere else; a text's however its editor ends them.
    if file.suffix.lower() == LINES:
        return text
    return text.replace("\r\n", "\n").replace("\r", "\n")


def paragraphs(text: str) -> Iterator[str]:
    """The parts of a text between blank lines, without white space around them."""
    for part in _PARAGRAPHS.split(text):
        if part.strip():
            yield part.strip()


def _text_of_html(file: Path, raw: bytes) -> str:
    if not raw.strip():
        return ""
    try:
        tree = lxml.html.document_fromstring(raw)
    except ParserError:  # nothing but comments
        return ""
    except (LxmlError, ValueError) as error:
        raise CorpusError(f"{file} cannot be read as HTML: {error}") from None
    for element in tree.xpath(_FURNITURE):
        element.drop_tree()
    for main in tree.xpath("//main | //article | //*[@role='main']")[:1]:
        tree = main
    lines = (line.rstrip() for line in Inscriptis(tree, _LAYOUT).get_text().split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


class Copies:
    """The texts that were met, and whether another is a copy of one of them."""

    def __init__(self) -> None:
        self._whole: set[str] = set()
        self._hashes: dict[str, MinHash] = {}

    @cached_property
    def _near(self) -> MinHashLSH:
        """Finds candidates; made when a long text comes, for making it takes a moment."""
        return MinHashLSH(threshold=_NEAR, num_perm=_NUM_HASHES)

    def meet(self, text: str) -> Literal["exact", "near"] | None:
        """Say what kind of copy `text` is; if it is none, later ones may be copies of it."""
        words = text.casefold().split()
        plain = " ".join(words)
        if plain in self._whole:
            return "exact"
        self._whole.add(plain)
        if len(words) < _MIN_WORDS:
            return None
        hashes = _min_hash(words)
        if any(hashes.jaccard(self._hashes[key]) >= _NEAR for key in self._near.query(hashes)):
            return "near"
        key = str(len(self._hashes))
        self._hashes[key] = hashes
        self._near.insert(key, hashes)
        return None


def _min_hash(words: list[str]) -> MinHash:
    runs = {" ".join(words[i : i + _RUN_WORDS]) for i in range(len(words) - _RUN_WORDS + 1)}
    coded = sorted(run.encode() for run in runs)
    hashes = MinHash(num_perm=_NUM_HASHES, hashfunc=zlib.crc32)
    for first in range(0, len(coded), _HASHED_AT_ONCE):
        hashes.update_batch(coded[first : first + _HASHED_AT_ONCE])
    return hashes
