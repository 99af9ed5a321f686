"""The requests of the gateway's bench: conversations of an agent whose system prompt begins with a clock."""

from __future__ import annotations

import json
from itertools import count

from programmable_kv.scenarios.plain_text import documents

TURNS = 8
"""Requests of one conversation."""
_MESSAGE = 2000
"""Approximate characters of an earlier message."""
_HEAD_PART = 4
"""The system prompt is about one part in this many of a request."""


def conversation(nbytes: int) -> list[bytes]:
    """The bodies of one conversation, each of about `nbytes`. Each advances the clock and adds two messages."""
    text = " ".join(document for document in documents("held_out") if document.isascii()).replace("\n", " ")
    text *= 1 + nbytes // len(text)
    head = text[: nbytes // _HEAD_PART]
    left = text[: nbytes - len(head) - 500]
    size = min(_MESSAGE, max(1, len(left) // 3))
    pieces = [left[at : at + size] for at in range(0, len(left), size)]
    earlier = [
        {"role": ("user", "assistant")[number % 2], "content": f"{number}: {piece}"}
        for number, piece in zip(count(), pieces[: len(pieces) - 1 + len(pieces) % 2], strict=False)
    ]
    return [_body(head, earlier, turn) for turn in range(TURNS)]


def _body(head: str, earlier: list[dict[str, str]], turn: int) -> bytes:
    later = [
        {"role": role, "content": f"{role} says a few words, for the {number}th time"}
        for number in range(turn)
        for role in ("assistant", "user")
    ]
    system = {"role": "system", "content": f"Now: 10:{turn:02}\nYou answer briefly.\n{head}"}
    return json.dumps({"model": "fixed", "stream": True, "messages": [system, *earlier, *later]}).encode()
