"""The upstream of the gateway's bench: streams the same events in answer to every request, as fast as the client reads.

It runs in its own process: `python -m programmable_kv.bench.fixed_upstream PORT`.
"""

from __future__ import annotations

import asyncio
import json
import sys

EVENTS = 32
_PIECE = "a few words "
_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\nconnection: keep-alive\r\n\r\n"
)
LAST_CHUNK = b"0\r\n\r\n"
_LONGEST_HEAD = 64 * 2**10


def events() -> list[bytes]:
    """The events of an answer, as Chat Completions streams them. They have no usage, since nothing is counted."""
    said = [
        ({"role": "assistant", "content": _PIECE}, None),
        *[({"content": _PIECE}, None)] * (EVENTS - 3),
        ({}, "stop"),
    ]
    bodies = [
        json.dumps(
            {
                "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "fixed",
                "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
            }
        )
        for delta, reason in said
    ]  # fmt: skip
    return [f"data: {body}\n\n".encode() for body in (*bodies, "[DONE]")]


def said_in(body: bytes) -> str | None:
    """The text of a streamed answer's deltas; None if the body is not a complete stream of Chat Completions."""
    lines = [line.removeprefix("data: ") for line in body.decode("utf-8", "replace").splitlines() if line]
    if not lines or lines.pop() != "[DONE]":
        return None
    try:
        deltas = [choice["delta"] for line in lines for choice in json.loads(line)["choices"]]
        return "".join(delta.get("content") or "" for delta in deltas)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


_CHUNKS = [f"{len(event):x}\r\n".encode() + event + b"\r\n" for event in events()]
_HEALTHY = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


async def answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the requests on one connection until the client closes it."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(_length(head))
            if head.startswith(b"get "):
                writer.write(_HEALTHY)
                continue
            writer.write(_HEAD)
            for chunk in _CHUNKS:
                writer.write(chunk)
                await writer.drain()
            writer.write(LAST_CHUNK)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


def _length(head: bytes) -> int:
    _, found, rest = head.partition(b"\r\ncontent-length:")
    return int(rest.partition(b"\r\n")[0]) if found else 0


async def serve(port: int) -> None:
    """Serve until the process ends."""
    server = await asyncio.start_server(answer_all, "127.0.0.1", port, limit=_LONGEST_HEAD)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
