"""The servers' own errors: typed, and in the form of the protocol that the client speaks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus

from programmable_kv.serve.routes import Dialect, Route

Headers = tuple[tuple[bytes, bytes], ...]

_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(frozen=True, slots=True)
class Refusal:
    """One error. Its message has no text of a prompt; it may have names of parameters and fields, cut short."""

    status: int
    code: str
    """for programs, such as `upstream_unreachable`"""
    message: str
    retry_after_s: int | None = None

    def body(self, dialect: Dialect) -> bytes:
        """The error as JSON."""
        return json.dumps(_error(self, dialect)).encode()

    def headers(self, dialect: Dialect) -> Headers:
        """The headers of that body."""
        found = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(self.body(dialect))).encode()),
            (b"x-pkv-did", f"refused; code={self.code}".encode()),
        ]
        if self.retry_after_s is not None:
            found.append((b"retry-after", str(self.retry_after_s).encode()))
        if self.status == HTTPStatus.UNAUTHORIZED:
            found.append((b"www-authenticate", b"Bearer"))
        return tuple(found)

    def event(self, route: Route) -> bytes:
        """The error as the last event of a stream."""
        if route.dialect is Dialect.ANTHROPIC:
            return _event("error", _error(self, route.dialect))
        if route.typed_events:
            flat = {"type": "error", "code": self.code, "message": self.message, "param": None, "sequence_number": 0}
            return _event("error", flat)
        return _event("", _error(self, route.dialect))


class RefusedError(Exception):
    """Carries a refusal to the place that sends it."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


UPSTREAM_DIED = Refusal(502, "upstream_died", "the upstream closed the connection in the middle of its answer")
UPSTREAM_SILENT = Refusal(504, "upstream_timeout", "the upstream sent nothing for too long")
UPSTREAM_UNREACHABLE = Refusal(502, "upstream_unreachable", "cannot connect to the upstream: is it running?")
UPSTREAM_BROKEN = Refusal(502, "upstream_error", "the upstream closed the connection or broke the protocol")


STATE_UNAVAILABLE = Refusal(503, "state_unavailable", "the notebooks cannot be read or written now: try again", 1)
NO_SUCH_ROUTE = Refusal(404, "no_such_route", "this server has no such route, or the route does not take this method")


def _error(refusal: Refusal, dialect: Dialect) -> dict[str, object]:
    if dialect is Dialect.ANTHROPIC:
        fault = "invalid_request_error" if refusal.status < HTTPStatus.INTERNAL_SERVER_ERROR else "api_error"
        kind = _ANTHROPIC_TYPES.get(refusal.status, fault)
        return {"type": "error", "error": {"type": kind, "message": refusal.message}, "code": refusal.code}
    default = "invalid_request_error" if refusal.status < HTTPStatus.INTERNAL_SERVER_ERROR else "upstream_error"
    kind = _OPENAI_TYPES.get(refusal.status, default)
    return {"error": {"message": refusal.message, "type": kind, "param": None, "code": refusal.code}}


def _event(name: str, data: Mapping[str, object]) -> bytes:
    lines: Iterable[str] = ([f"event: {name}"] if name else []) + [f"data: {json.dumps(data)}"]
    return ("\n".join(lines) + "\n\n").encode()
