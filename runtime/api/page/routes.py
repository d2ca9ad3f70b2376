"""GET / and /page/…: the page's files, and the example recipes that it offers.

No key is needed to load them: they are the same on every server and hold no state. Everything that the page shows, its
scripts fetch from the API, with the key that the user types in.
"""

import asyncio
import functools
import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

from litestar import Response, get

import settings
from runtime.api.handle import AnyRequest
from runtime.api.http.auth import OPEN
from runtime.errors import NotFound

STATIC = Path(__file__).parent / "static"
RECIPES = Path(settings.__file__).parent / "recipes"
EXAMPLES = "examples/"
"""Beginning of the names of example recipes and their data, below /page/."""

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".yaml": "text/plain; charset=utf-8",
    ".jsonl": "text/plain; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
}

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
    "Vary": "Accept-Encoding",
}


@dataclass(frozen=True)
class PageFile:
    """One file, as it is sent."""

    media_type: str
    plain: bytes
    compressed: bytes
    """With gzip."""
    etag: str


@functools.cache
def page_files() -> dict[str, PageFile]:
    """Name below /page/ → file. Blocks at the first call."""
    found = {path.relative_to(STATIC).as_posix(): path for path in STATIC.rglob("*")}
    found |= {EXAMPLES + path.relative_to(RECIPES).as_posix(): path for path in RECIPES.rglob("*")}
    return {name: _read(path) for name, path in sorted(found.items()) if path.suffix in MEDIA_TYPES}


def _read(path: Path) -> PageFile:
    plain = path.read_bytes()
    etag = hashlib.blake2b(plain, digest_size=12).hexdigest()
    return PageFile(MEDIA_TYPES[path.suffix], plain, gzip.compress(plain, 9, mtime=0), f'"{etag}"')


@get("/", opt={OPEN: True}, include_in_schema=False)
async def index_page(request: AnyRequest) -> Response[bytes]:
    """The page. Clients that accept no HTML get a 404."""
    accept = request.headers.get("accept", "*/*")
    if not any(kind in accept for kind in ("text/html", "text/*", "*/*")):
        raise NotFound("Not Found")
    return await _answer(request, "index.html")


@get("/page/{name:path}", opt={OPEN: True}, include_in_schema=False)
async def page_file(request: AnyRequest) -> Response[bytes]:
    """A script, a style sheet, a licence or an example."""
    return await _answer(request, str(request.path_params["name"]).removeprefix("/"))


async def _answer(request: AnyRequest, name: str) -> Response[bytes]:
    file = (await asyncio.to_thread(page_files)).get(name)
    if file is None:
        raise NotFound("The page has no such file.")
    headers = {**HEADERS, "ETag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(b"", status_code=304, headers=headers)
    body = file.plain
    if "gzip" in request.headers.get("accept-encoding", ""):
        headers["Content-Encoding"] = "gzip"
        body = file.compressed
    return Response(body, headers={**headers, "Content-Type": file.media_type})
