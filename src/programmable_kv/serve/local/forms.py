"""The interface of a protocol: it reads a request, and writes the answer in one piece or as a stream of events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from programmable_kv.serve.local.answers import Answer, Drawn, Piece, TokenShare
from programmable_kv.serve.local.asks import Ask

Tool = Mapping[str, Any]


class Form(Protocol):
    """One request and its answer in the form of a protocol. The constructor reads and checks the request.

    To add a protocol, write one class with this interface, and add a row to `FORMS` in `server.py`.
    """

    @property
    def ask(self) -> Ask:
        """The request in the form that all protocols share."""
        ...

    def whole(self, answer: Answer, pieces: Sequence[Piece]) -> Mapping[str, Any]:
        """Return the answer in one piece."""
        ...

    def begin(self, answer: Answer) -> Iterator[bytes]:
        """Yield the events before the answer's first text."""
        ...

    def said(self, answer: Answer, piece: Piece) -> Iterator[bytes]:
        """Yield the events of one piece of text."""
        ...

    def finish(self, answer: Answer) -> Iterator[bytes]:
        """Yield the events after the last text."""
        ...


def event(data: Mapping[str, Any], name: str = "") -> bytes:
    """Encode one server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()


def text_of(pieces: Sequence[Piece]) -> str:
    """The text of all pieces."""
    return "".join(piece.text for piece in pieces)


def tokens_of(pieces: Sequence[Piece]) -> list[Drawn]:
    """The tokens of all pieces."""
    return [token for piece in pieces for token in piece.tokens]


def share_of(token: TokenShare) -> dict[str, Any]:
    """A token with its log-probability, in the form of Chat Completions and Responses."""
    return {"token": token.text, "logprob": token.log_probability, "bytes": token.utf8}


def shares_of(tokens: Sequence[Drawn]) -> list[dict[str, Any]]:
    """The answer's tokens, each with the likeliest tokens at its place."""
    return [{**share_of(token), "top_logprobs": [share_of(each) for each in token.likeliest]} for token in tokens]
