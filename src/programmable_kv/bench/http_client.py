"""The client of the gateway's bench: one connection, one request at a time, as little overhead as Python allows."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from programmable_kv.bench.fixed_upstream import LAST_CHUNK

_IDLE_S = 2.0
"""After a longer idle time, the connection is reopened before the next request: servers close idle connections."""
_READ = 2**16
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Timed:
    """One timed answer."""

    first_ms: float
    """Milliseconds from sending the request, or from when it was due, to the first byte of the answer's body."""
    whole_ms: float
    head: bytes
    body: bytes
    """The body without the framing of its chunks."""

    def header(self, name: str) -> str:
        """A header's value; empty if the answer does not have it."""
        for line in self.head.decode("latin-1").split("\r\n")[1:]:
            key, _, value = line.partition(":")
            if key.lower() == name:
                return value.strip()
        return ""


class Client:
    """One connection to a server on this machine. Not thread-safe."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._socket: socket.socket | None = None
        self._used = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, body: bytes, session: str, *, due: float | None = None) -> Timed:
        """Send one Chat Completions request of a named conversation, and read its answer.

        Args:
            due: when the request was due, by `time.perf_counter`. The time since then counts, including the time to
                connect.

        Raises:
            ConnectionError: the server closed the connection, or answered with a status other than 200.
        """
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{self._port}\r\ncontent-type: application/json\r\n"
            f"x-session-id: {session}\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode()
        link = self._connected()
        began = time.perf_counter() if due is None else due
        link.sendall(head + body)
        received = b""
        first = None
        while not received.endswith(b"\r\n" + LAST_CHUNK):
            data = link.recv(_READ)
            if not data:
                raise ConnectionError(f"the server closed the connection after {received[:200]!r}")
            received += data
            if first is None and received.partition(b"\r\n\r\n")[2]:
                first = time.perf_counter()
                if not received.startswith(b"HTTP/1.1 200 "):
                    raise ConnectionError(f"the server answered {received[:200]!r}")
        ended = self._used = time.perf_counter()
        assert first is not None, "an answer that ends with the last chunk has a body"
        answer_head, _, chunks = received.partition(b"\r\n\r\n")
        return Timed(1e3 * (first - began), 1e3 * (ended - began), answer_head, _unframed(chunks))

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connected(self) -> socket.socket:
        if self._socket is not None and time.perf_counter() - self._used > _IDLE_S:
            self.close()
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=_TIMEOUT_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._socket


def _unframed(chunks: bytes) -> bytes:
    """The body in the chunks."""
    body = b""
    while chunks:
        size, _, rest = chunks.partition(b"\r\n")
        length = int(size, 16)
        body += rest[:length]
        chunks = rest[length + 2 :]
    return body
