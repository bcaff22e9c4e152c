"""GET / and GET /playground/NAME: a page for the browser, which talks to the other routes.

The files hold no data of the server, and a browser cannot send an API key when it opens a page. So these routes need no
key (`PUBLIC`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

router = APIRouter(include_in_schema=False)

INDEX = "index.html"
_FOLDER = Path(__file__).with_name("playground_files")
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
        "img-src 'self' data:; frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


@dataclass(frozen=True)
class File:
    """A file of the page."""

    content: bytes
    media_type: str

    @property
    def etag(self) -> str:
        """The entity tag: a digest of the content between quotation marks."""
        return f'"{hashlib.sha256(self.content).hexdigest()[:32]}"'

    def answer(self, request: Request) -> Response:
        """Return the file, or 304 if the client has it."""
        headers = {**_HEADERS, "etag": self.etag}
        known = request.headers.get("if-none-match", "").split(",")
        if self.etag in (tag.strip().removeprefix("W/") for tag in known):
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


FILES = {
    path.name: File(path.read_bytes(), _TYPES[path.suffix])
    for path in sorted(_FOLDER.iterdir())
    if path.suffix in _TYPES
}
"""The files of the page by name. Requests find files here only, so that no request names a path."""

PUBLIC = frozenset({"/", *(f"/playground/{name}" for name in FILES)})
"""The paths that need no key."""


@router.get("/")
async def index(request: Request) -> Response:
    """Return the page."""
    return FILES[INDEX].answer(request)


@router.get("/playground/{name}")
async def file(request: Request, name: str) -> Response:
    """Return a file of the page."""
    if name not in FILES:
        raise HTTPException(404)
    return FILES[name].answer(request)
