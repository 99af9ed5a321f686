"""One HTTP/1.1 connection to an upstream: it sends requests as bytes and receives the parts of their answers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import cast

import httptools

from programmable_kv.serve.headers import Headers, value_of
from programmable_kv.serve.refusal import UPSTREAM_BROKEN, UPSTREAM_DIED, UPSTREAM_SILENT, Refusal, RefusedError
from programmable_kv.serve.unreachable import broken_off

_MOST_HEAD = 128 * 2**10
"""bytes that an upstream may send before its headers are complete"""
_MOST_WAITING = 256 * 2**10
"""bytes of a body that may wait to be taken; then reading pauses"""
_INTERIM, _FINAL = range(100, 200), range(200, 600)
"""statuses"""


class Connection(asyncio.Protocol):
    """A connection that carries one exchange at a time. For one event loop.

    Bytes that arrive together are passed on together: many small events cost one step for each read, not for each event.
    """

    def __init__(self, read_s: float) -> None:
        """
        Args:
            read_s: how long the upstream may be silent while something is expected from it.
        """
        self.status = 0
        self.headers: Headers = ()
        self.idle_since = 0.0
        self._read_s = read_s
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._found: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._begun = False
        """whether a request was sent and its answer is not complete"""
        self._answered = False
        """whether the answer's headers have arrived"""
        self._complete = False
        self._bodiless = False
        self._reusable = True
        self._fault: Refusal | None = None
        self._parts: deque[bytes] = deque()
        self._nbytes = 0
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def usable(self) -> bool:
        """Whether another request can be sent."""
        return self._reusable and not self._begun and self._transport is not None and not self._transport.is_closing()

    async def ask(self, head: bytes, body: bytes, *, bodiless: bool) -> None:
        """Send a request, and wait for the headers of its answer.

        Args:
            bodiless: whether the answer has no body, whatever its headers say (the answer to HEAD).

        Raises:
            RefusedError: the upstream did not answer.
        """
        assert self.usable, "a connection carries one exchange at a time"
        assert self._transport is not None
        self._begun, self._answered, self._complete, self._bodiless = True, False, False, bodiless
        self._head_bytes = 0
        self._transport.write(head + body)
        while not self._answered:
            if self._fault is not None:
                raise RefusedError(self._fault)
            await self._wait()

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Read once.

        Raises:
            RefusedError: the upstream closed the connection early, or was silent too long.
        """
        while True:
            if self._parts:
                data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
                self._parts.clear()
                self._nbytes = 0
                if self._paused and self._transport is not None:
                    self._paused = False
                    self._transport.resume_reading()
                yield data
            elif self._complete:
                return
            elif self._fault is not None:
                raise RefusedError(self._fault)
            else:
                await self._wait()

    def end(self) -> bool:
        """End the exchange. Returns whether the connection can carry another one; otherwise it is closed."""
        taken = self._complete and not self._parts
        drained = self._transport is not None and self._transport.get_write_buffer_size() == 0
        self._begun = False
        if not (taken and drained and self._reusable):
            self.close()
        return self.usable

    def close(self) -> None:
        """Close the connection at once."""
        self._reusable = False
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self) -> None:
        """Wait for whatever the upstream does next."""
        self._waiter = self._loop.create_future()
        try:
            async with asyncio.timeout(self._read_s):
                await self._waiter
        except TimeoutError:
            self._fail(UPSTREAM_SILENT)
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, refusal: Refusal) -> None:
        """Note why no more will come. The first reason is kept."""
        self._reusable = False
        if self._fault is None and not self._complete:
            self._fault = refusal
        self._wake()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are no instances of it

    def data_received(self, data: bytes) -> None:
        if not self._begun or self._complete:  # nothing was asked
            self.close()
            return
        if not self._answered:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._broken()
        if not self._answered and self._head_bytes > _MOST_HEAD:
            self._broken()
        if self._nbytes > _MOST_WAITING and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        """The transport closes, and `connection_lost` follows."""

    def connection_lost(self, error: Exception | None) -> None:
        if self._begun and self._answered and not self._complete and error is None and not _is_framed(self.headers):
            self._complete = True  # the end of the connection is the end of such a body
        self._fail(UPSTREAM_DIED if self._answered else broken_off(error))

    def _broken(self) -> None:
        self._fail(UPSTREAM_DIED if self._answered else UPSTREAM_BROKEN)
        self.close()

    # What the parser calls.

    def on_message_begin(self) -> None:
        self._found = []
        if self._complete:
            raise ConnectionError("an answer without a request")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._found.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status in _INTERIM:
            return
        if status not in _FINAL:
            raise ConnectionError("not an HTTP status")
        coding = value_of(self._found, b"transfer-encoding")
        if coding is not None and coding.strip().lower() != b"chunked":
            raise ConnectionError("a transfer coding that was not requested")
        self.status, self.headers, self._answered = status, tuple(self._found), True
        if self._bodiless:
            self._complete, self._reusable = True, False  # the parser would wait for the body

    def on_body(self, data: bytes) -> None:
        if not self._bodiless:
            self._parts.append(data)
            self._nbytes += len(data)

    def on_message_complete(self) -> None:
        if self._answered:  # otherwise it was an interim one
            self._complete = True
            self._reusable = self._reusable and self._parser.should_keep_alive()


def _is_framed(headers: Headers) -> bool:
    """Whether the headers say where the body ends."""
    return value_of(headers, b"content-length") is not None or value_of(headers, b"transfer-encoding") is not None
