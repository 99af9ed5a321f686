"""The client of a gateway: sends a request as bytes, and hands on the answer as bytes while it arrives."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

from programmable_kv.serve.connection import Connection
from programmable_kv.serve.headers import Headers
from programmable_kv.serve.refusal import RefusedError
from programmable_kv.serve.unreachable import not_connected

_KEEP_S = 4.0
"""an idle connection is kept for less than the five seconds after which uvicorn, and so vLLM, closes it"""


@dataclass(frozen=True, slots=True)
class UpstreamRequest:
    """What is sent."""

    method: str
    target: bytes
    """path and query, byte for byte"""
    headers: Headers
    body: bytes = field(repr=False)


class UpstreamAnswer(Protocol):
    """What came back."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Headers: ...

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Read once.

        Raises:
            RefusedError: the upstream dies, or is silent for too long.
        """
        ...

    async def close(self) -> None:
        """End the exchange. An answer that is not complete is given up, which the upstream sees as a client that left."""
        ...


class Upstream(Protocol):
    """Where requests go."""

    async def send(self, request: UpstreamRequest) -> UpstreamAnswer:
        """Send a request. Returns once the headers of the answer have come; the caller closes the answer.

        Raises:
            RefusedError: there is no answer.
        """
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...


class HttpUpstream:
    """An upstream reached by HTTP/1.1 over connections that are kept open.

    Requests are written as the bytes that they are: no header is added, none is spelled otherwise, no redirect followed, no
    cookie kept, no body decoded, and no proxy taken from the environment. With httpx2's transport in this place, which is as
    faithful, a request took the gateway four times the processor time; with aiohttp's client, which spells headers anew, half
    as much again.
    """

    def __init__(self, url: str, *, connect_s: float, read_s: float) -> None:
        """
        Args:
            url: scheme, host and port; a path is left to the requests.
        """
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._tls = _tls() if parts.scheme == "https" else None
        self._connect_s = connect_s
        self._read_s = read_s
        self._idle: list[Connection] = []
        """the one that was used last at the end"""

    async def send(self, request: UpstreamRequest) -> UpstreamAnswer:
        """See `Upstream.send`."""
        connection = self._kept() or await self._connected()
        try:
            await connection.ask(_head(request), request.body, bodiless=request.method == "HEAD")
        except BaseException:  # also where the client left meanwhile
            connection.close()
            raise
        return _HttpAnswer(connection, self._keep)

    async def close(self) -> None:
        """See `Upstream.close`."""
        while self._idle:
            self._idle.pop().close()

    def _kept(self) -> Connection | None:
        """A connection that was used a short while ago, if there is one. Those that were idle for too long are closed."""
        soonest = time.monotonic() - _KEEP_S
        while self._idle and (self._idle[0].idle_since < soonest or not self._idle[0].usable):
            self._idle.pop(0).close()
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
            connection.close()
        return None

    def _keep(self, connection: Connection) -> None:
        connection.idle_since = time.monotonic()
        self._idle.append(connection)

    async def _connected(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(self._read_s), self._host, self._port, ssl=self._tls
                )
        except OSError as error:
            raise RefusedError(not_connected(error)) from error
        return connection


class _HttpAnswer:
    def __init__(self, connection: Connection, keep: Callable[[Connection], None]) -> None:
        self._connection = connection
        self._keep = keep
        self.status = connection.status
        self.headers = connection.headers

    def chunks(self) -> AsyncIterator[bytes]:
        return self._connection.parts()

    async def close(self) -> None:
        if self._connection.end():
            self._keep(self._connection)


def _head(request: UpstreamRequest) -> bytes:
    """The request up to its body. Names and values hold no line break: whoever received them read them line by line."""
    lines = [b"%b %b HTTP/1.1" % (request.method.encode("ascii"), request.target)]
    lines += [b"%b: %b" % header for header in request.headers]
    return b"\r\n".join([*lines, b"", b""])


def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
