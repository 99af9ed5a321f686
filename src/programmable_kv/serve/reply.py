"""An answer on its way to the client: how much was sent, and whether an event may follow."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.types import Message, Send

from programmable_kv.serve.headers import Headers, value_of

_NOT_MODIFIED = 304
_EVENTS = b"text/event-stream"
_ENDS = (b"\n\n", b"\r\n\r\n", b"\r\r")


class ClientGoneError(Exception):
    """The client closed its connection before its answer was complete, or read nothing for too long."""


@dataclass(slots=True)
class Reply:
    """One answer. Sending raises `ClientGoneError` where the client reads nothing for `stall_s` seconds."""

    send: Send
    stall_s: float | None = None
    status: int | None = None
    """None until it has begun"""
    ended: bool = False
    _takes_events: bool = False
    _last: bytes = b"\n\n"

    async def start(self, status: int, headers: Headers) -> None:
        """Send status and headers."""
        plain = value_of(headers, b"content-encoding") in (None, b"identity")
        kind = (value_of(headers, b"content-type") or b"").strip().lower()
        self._takes_events = plain and kind.startswith(_EVENTS) and value_of(headers, b"content-length") is None
        self.status = status
        lengthless = status == _NOT_MODIFIED  # uvicorn would wait for a body that such an answer never has
        sent = [each for each in headers if not (lengthless and each[0] == b"content-length")]
        await self._send({"type": "http.response.start", "status": status, "headers": sent})

    async def pass_on(self, chunk: bytes) -> None:
        """Send a part of the body."""
        self._last = (self._last + chunk[-4:])[-4:]
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def end(self, chunk: bytes = b"") -> None:
        """Send the last part of the body."""
        self.ended = True
        await self._send({"type": "http.response.body", "body": chunk, "more_body": False})

    @property
    def takes_event(self) -> bool:
        """Whether an event may follow: the answer is a stream of events, and the last one is complete."""
        return self._takes_events and self._last.endswith(_ENDS)

    async def _send(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self.stall_s):
                await self.send(message)
        except TimeoutError as error:
            raise ClientGoneError from error
