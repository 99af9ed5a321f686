"""The page at `/`: static files that come with the package. They hold no data; they ask for it, with the visitor's key."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_SCRIPTS = ("page.js", "gateway.js", "notebooks.js", "parts.js")
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/pkv/page.css": ("page.css", "text/css; charset=utf-8"),
    **{f"/pkv/{name}": (name, "text/javascript; charset=utf-8") for name in _SCRIPTS},
}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_routes(*, local: bool = False) -> list[Route]:
    """The routes of the page of a gateway, or of a local server."""
    return [Route(path, _answer(*found, local)) for path, found in _FILES.items()]


def _answer(name: str, kind: str, local: bool) -> Callable[[Request], Response]:
    content = files(__name__).joinpath(name).read_bytes()
    if local:
        content = content.replace(b'data-kind="gateway"', b'data-kind="local"')
    return lambda _: Response(content, media_type=kind, headers=_HEADERS)
