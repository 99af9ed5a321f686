"""A bounded copy of a forwarded answer, from which the upstream's usage numbers are read later."""

from __future__ import annotations

import json
import zlib
from collections import deque
from dataclasses import dataclass, field

from programmable_kv.explain.pieces import Usage
from programmable_kv.explain.usage import usage_of, usage_of_stream

_HEAD = 64 * 2**10
_TAIL = 2 * 2**20
_MOST_DECODED = 32 * 2**20


@dataclass(slots=True)
class Capture:
    """The beginning and the end of a body. Usage stands in a stream's first or last events, or at the end.

    Chunks are kept as they came: nothing is copied while the answer goes by.
    """

    nbytes: int = 0
    """kept bytes"""
    cut: bool = False
    """whether bytes in the middle were left out"""
    _head: list[bytes] = field(default_factory=list, repr=False)
    _head_bytes: int = 0
    _tail: deque[bytes] = field(default_factory=deque, repr=False)

    def add(self, chunk: bytes) -> None:
        """Keep a chunk. Where the tail is too long, its oldest chunks are dropped."""
        self.nbytes += len(chunk)
        if self._head_bytes < _HEAD:
            self._head.append(chunk)
            self._head_bytes += len(chunk)
            return
        self._tail.append(chunk)
        while self.nbytes - self._head_bytes > _TAIL and len(self._tail) > 1:
            self.nbytes -= len(self._tail.popleft())
            self.cut = True

    def usage(self, encoding: str = "") -> Usage | None:
        """The upstream's own count of tokens; None where the answer has none or cannot be read."""
        data = b"".join(self._head) + (b"\n" if self.cut else b"") + b"".join(self._tail)
        if encoding not in ("", "identity"):
            data = _decoded(data, encoding) if not self.cut else b""
        if data.lstrip()[:1] == b"{" and not self.cut:
            try:
                answer = json.loads(data)
            except (ValueError, RecursionError):
                return None
            return usage_of(answer.get("usage")) if isinstance(answer, dict) else None
        return usage_of_stream(data.decode("utf-8", "replace"))


def _decoded(data: bytes, encoding: str) -> bytes:
    """The unpacked bytes of gzip or deflate; empty for any other encoding or broken data."""
    if encoding not in ("gzip", "x-gzip", "deflate"):
        return b""
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(data, _MOST_DECODED)
    except zlib.error:
        return b""
