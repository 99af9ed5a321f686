"""How clients are read: uvicorn's protocol on httptools, with a bound on headers; h11 for clients of HTTP/1.0, and for requests
that ask to change the protocol."""

from __future__ import annotations

from typing import Any

import httptools
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEAD = 64 * 2**10
"""bytes of a request's line and headers"""


class _Plain(H11Protocol):
    """h11, without a warning for each request that asks to change the protocol."""

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: such a request is answered as any other."""


class ClientProtocol(HttpToolsProtocol):
    """One connection of a client.

    httptools reads headers of any length, and uvicorn answers in chunks on it, which a client of HTTP/1.0 does not know. And
    it skips the body of a request that asks to change the protocol (`Upgrade: h2c`, as Java's client does): what comes behind
    the headers would be read as another request.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._first: bytearray | None = bytearray()
        """what came before the end of the first line; None behind it"""
        self._in_head = False
        self._head_bytes = 0
        """of the line and the headers that were told"""
        self._within_head = 0
        """of what came in the midst of them, told or not"""
        self._in_message = False
        self._came = b""
        """what came since the headers began that are read now, and perhaps before them"""
        self._messages_in_it = 0
        """requests that begin or go on in it"""
        self._asks_to_upgrade = False

    def data_received(self, data: bytes) -> None:
        if self._first is not None:
            self._first += data
            line, end, _ = bytes(self._first.lstrip(b"\r\n")).partition(b"\n")
            if not end and len(self._first) <= MOST_HEAD:
                return
            data, self._first = bytes(self._first), None
            if b" HTTP/1.0" in line:
                self._hand_over(data.lstrip(b"\r\n"))
                return
        continues = self._in_head
        if continues:
            self._came += data
        else:
            self._came, self._messages_in_it = data, int(self._in_message)
        super().data_received(data)
        if self._asks_to_upgrade:
            self._stay()
            return
        if continues and self._in_head:  # a header that does not end is not told until it does
            self._within_head += len(data)
            if self._within_head > MOST_HEAD and not self.transport.is_closing():
                self.send_400_response("Invalid HTTP request received.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_message = True
        self._messages_in_it += 1
        self._in_head, self._head_bytes, self._within_head = True, 0, 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        if self._in_head:  # what follows a body is no header of the request
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self.parser.get_http_version() == "1.0":
            raise httptools.HttpParserError("HTTP/1.0 is told by the first bytes")
        if self.parser.should_upgrade():
            self._asks_to_upgrade = True
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._asks_to_upgrade:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_message = False
        if not self._asks_to_upgrade:
            super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: such a request is answered as any other."""

    def _stay(self) -> None:
        """Answer a request that asks to change the protocol in this one. Where others stand before it, it is not answered."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if self._messages_in_it == 1 and not answering and not self.transport.is_closing():
            self._hand_over(self._came)
        else:
            self.transport.close()

    def _count(self, nbytes: int) -> None:
        self._head_bytes += nbytes
        if self._head_bytes > MOST_HEAD:
            raise httptools.HttpParserError("too long")

    def _hand_over(self, data: bytes) -> None:
        """Go on with h11, which closes the connection behind an answer of unknown length to HTTP/1.0."""
        self.connections.discard(self)
        self._unset_keepalive_if_required()
        other = _Plain(self.config, self.server_state, self.app_state)
        other.connection_made(self.transport)
        self.transport.set_protocol(other)
        other.data_received(data)
