"""The page's files, read once: what is not among them cannot be asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.responses import Response

FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing is loaded from elsewhere, nothing runs that is not one of our files.
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True, kw_only=True)
class File:
    """One file as it is sent."""

    content: bytes
    media_type: str
    etag: str

    def response(self, if_none_match: str | None) -> Response:
        """Return the file, or 304 where the browser has it."""
        headers = {**_HEADERS, "etag": self.etag}
        if if_none_match == self.etag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


def read_page(folder: Path = FOLDER) -> Mapping[str, File]:
    """Return every file that a browser may load, by its path below `folder`."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in _TYPES:
            content = path.read_bytes()
            files[path.relative_to(folder).as_posix()] = File(
                content=content,
                media_type=_TYPES[path.suffix],
                etag=f'"{hashlib.sha256(content).hexdigest()[:32]}"',
            )
    return files
