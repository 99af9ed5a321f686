"""The upstream of `bench soak`: it has a prefix cache, and answers with the time that it read last in the prompt.

It caches blocks of a prompt under a digest of all text up to their end, and evicts the least recently used. Its usage
numbers count blocks. It runs in its own process: `python -m programmable_kv.bench.remembering_upstream PORT`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import sys
from collections import OrderedDict
from typing import Any

BLOCK = 64
"""Characters of a block."""
_CAPACITY = 400_000
"""Blocks that the cache keeps."""
_TIME = re.compile(r"Now: ([0-9:]+)|\\?\"(?:the time|now)\\?\": \\?\"([0-9:]+)\\?\"")
"""A time as it stands in a system prompt, in a line from the gateway, or in a line about a notebook's field."""
_LONGEST_HEAD = 64 * 2**10
_HEALTHY = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class PrefixCache:
    """The blocks read before, in the order of their last use."""

    def __init__(self, capacity: int = _CAPACITY) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[bytes, None] = OrderedDict()

    def read(self, text: str) -> tuple[int, int]:
        """(number of blocks of a text, number of its leading blocks in the cache). Adds all its blocks to the cache."""
        digest, keys = hashlib.blake2b(digest_size=16), []
        for start in range(0, len(text) - BLOCK + 1, BLOCK):
            digest.update(text[start : start + BLOCK].encode("utf-8", "surrogatepass"))
            keys.append(digest.digest())
        cached = next((number for number, key in enumerate(keys) if key not in self._kept), len(keys))
        for key in keys:
            self._kept[key] = None
            self._kept.move_to_end(key)
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return len(keys), cached


def read_last(text: str) -> str:
    """The last time in a prompt; empty if it has none."""
    found = [first or second for first, second in _TIME.findall(text)]
    return found[-1] if found else ""


def answered(cache: PrefixCache, body: Any) -> bytes:
    """The complete HTTP response to a Chat Completions request."""
    text = "\n".join(f"{message['role']}: {message['content']}" for message in body["messages"])
    blocks, cached = cache.read(text)
    said = {
        "id": "c", "object": "chat.completion", "created": 1, "model": "remembering",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": read_last(text)}}
        ],
        "usage": {
            "prompt_tokens": blocks, "completion_tokens": 1, "total_tokens": blocks + 1,
            "prompt_tokens_details": {"cached_tokens": cached},
        },
    }  # fmt: skip
    content = json.dumps(said).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    return head.encode() + content


async def _answer_all(cache: PrefixCache, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            _, _, rest = head.partition(b"\r\ncontent-length:")
            body = await reader.readexactly(int(rest.partition(b"\r\n")[0] or 0))
            writer.write(_HEALTHY if head.startswith(b"get ") else answered(cache, json.loads(body)))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def serve(port: int) -> None:
    """Serve until the process ends."""
    cache = PrefixCache()
    server = await asyncio.start_server(
        lambda reader, writer: _answer_all(cache, reader, writer), "127.0.0.1", port, limit=_LONGEST_HEAD
    )
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
