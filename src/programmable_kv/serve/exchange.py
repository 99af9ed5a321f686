"""A request and its answer, as the observer gets them once the answer was sent."""

from __future__ import annotations

from dataclasses import dataclass, field

from programmable_kv.serve.capture import Capture
from programmable_kv.serve.headers import Headers
from programmable_kv.serve.routes import Route


@dataclass(frozen=True, slots=True)
class Exchange:
    """Bytes, not yet looked at."""

    tenant: str
    route: Route
    headers: Headers = field(repr=False)
    """the client's"""
    body: bytes = field(repr=False)
    time: float
    """seconds since the epoch, when the request came"""
    answer: Capture = field(repr=False)
    encoding: str = ""
    """the answer's content-encoding"""

    @property
    def nbytes(self) -> int:
        return len(self.body) + self.answer.nbytes
