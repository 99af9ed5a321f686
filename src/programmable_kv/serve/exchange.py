"""A request and its answer, as the observer gets them after the answer was sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from programmable_kv.explain.pieces import Usage
from programmable_kv.serve.capture import Capture
from programmable_kv.serve.headers import Headers
from programmable_kv.serve.routes import Route


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its answer, as bytes that are not yet parsed."""

    tenant: str
    route: Route
    headers: Headers = field(repr=False)
    """the client's"""
    body: bytes = field(repr=False)
    """as the upstream got it"""
    time: float
    """seconds since the epoch, when the request came"""
    answer: Capture = field(repr=False)
    encoding: str = ""
    """the answer's content-encoding"""
    settle: Callable[[Usage | None], object] | None = field(default=None, repr=False)
    """called with the upstream's own count of tokens"""

    @property
    def nbytes(self) -> int:
        return len(self.body) + self.answer.nbytes
