"""Reads traces of hashed blocks instead of text (kv-cache-tester's form). They show where a prefix breaks, not why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from programmable_kv.errors import InvalidRequestError
from programmable_kv.explain.pieces import Kind, Piece, Request


def is_trace(given: Mapping[str, Any]) -> bool:
    """Whether a parsed file is a trace of hashed blocks."""
    return isinstance(given.get("requests"), list) and isinstance(given.get("block_size"), int)


def requests_of_trace(trace: Mapping[str, Any], name: str, first: int) -> Iterator[Request]:
    """The requests of a trace, with every block of tokens as one piece.

    Args:
        first: the number of the first request.

    Raises:
        InvalidRequestError: the block size is less than 1, or a request lacks its hashes or its number of tokens.
    """
    size = trace["block_size"]
    if size < 1:
        raise InvalidRequestError(f"{name}: block_size is {size}; expected at least 1")
    tools = int(trace.get("tool_tokens") or 0)
    head = tools + int(trace.get("system_tokens") or 0)
    known: dict[tuple[int, str], Piece] = {}
    # Hashes of 'local' scope are comparable only within their own file.
    scope = name if trace.get("hash_id_scope") == "local" else ""
    for index, given in enumerate(trace["requests"]):
        hashes, tokens = given.get("hash_ids"), given.get("in")
        if not isinstance(hashes, list) or not isinstance(tokens, int):
            raise InvalidRequestError(f"{name}: requests[{index}] has no 'hash_ids' or no 'in' (its tokens)")
        pieces = []
        for block, identity in enumerate(hashes):
            text = f"{scope}:{identity}"
            piece = Piece(Kind.BLOCK, text, _place(block * size, (block + 1) * size, tools, head))
            pieces.append(known.setdefault((block, text), piece))
        time = given.get("t")
        yield Request(
            first + index,
            f"{name}[{index}]",
            "hashed blocks",
            str(given.get("model", "")),
            tuple(pieces),
            session=str(trace.get("id", name)) if scope else "",
            time=float(time) if isinstance(time, int | float) else None,
            block_tokens=size,
            body={"tokens": tokens},
        )


def _place(start: int, stop: int, tools: int, head: int) -> str:
    """The part, or parts, of the prompt in which a block of tokens lies."""
    parts = (("tool list", 0, tools), ("system prompt", tools, head), ("conversation", head, stop + head))
    return " or ".join(name for name, begin, end in parts if start < end and begin < stop)
