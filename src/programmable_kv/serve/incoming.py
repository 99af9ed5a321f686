"""Reads a client's body within limits, and notices when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.types import Receive

from programmable_kv.serve.headers import Headers, value_of
from programmable_kv.serve.refusal import Refusal, RefusedError
from programmable_kv.serve.reply import ClientGoneError, Reply


def check_length(headers: Headers, max_bytes: int) -> None:
    """Refuse a body whose `content-length` is too long, before it is read.

    Raises:
        RefusedError: the length is above `max_bytes`.
    """
    length = value_of(headers, b"content-length")
    if length is not None and length.isdigit() and int(length) > max_bytes:
        raise RefusedError(_too_long(max_bytes))


async def read_body(receive: Receive, max_bytes: int, within_s: float) -> bytes:
    """The whole body.

    Raises:
        RefusedError: the body is too long, or took too long.
        ClientGoneError: the client left.
    """
    parts: list[bytes] = []
    nbytes = 0
    try:
        async with asyncio.timeout(within_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                part = message.get("body", b"")
                nbytes += len(part)
                if nbytes > max_bytes:
                    raise RefusedError(_too_long(max_bytes))
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError as error:
        raise RefusedError(Refusal(408, "body_timeout", "the request's body did not arrive in time")) from error


async def while_connected(work: Coroutine[Any, Any, None], receive: Receive, reply: Reply) -> None:
    """Do the work, and cancel it when the client leaves. Raises what the work raises.

    Raises:
        ClientGoneError: the client left before the answer was complete. The work was cancelled and has ended.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done() and reply.ended:  # the server says "disconnected" after a complete answer, too
            await asyncio.wait((task,))
        if not task.done():
            raise ClientGoneError
        task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _too_long(max_bytes: int) -> Refusal:
    return Refusal(
        413, "body_too_large", f"the request's body is larger than the {max_bytes} bytes that this server accepts"
    )
