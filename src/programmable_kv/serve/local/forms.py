"""The form of a protocol: how a request is read, and how its answer is written, in one piece or as events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from programmable_kv.serve.local.answers import Answer, Drawn, Piece, TokenShare
from programmable_kv.serve.local.asks import Ask

Tool = Mapping[str, Any]


class Form(Protocol):
    """One request in the form of its protocol. Making one reads the request.

    A protocol is one class of this kind, and its row in `server.py`.
    """

    @property
    def ask(self) -> Ask:
        """What is asked for."""
        ...

    def whole(self, answer: Answer, pieces: Sequence[Piece]) -> Mapping[str, Any]:
        """The answer in one piece."""
        ...

    def begin(self, answer: Answer) -> Iterator[bytes]:
        """The events before the answer's first text."""
        ...

    def said(self, answer: Answer, piece: Piece) -> Iterator[bytes]:
        """The events of a piece of text."""
        ...

    def finish(self, answer: Answer) -> Iterator[bytes]:
        """The events after the last text."""
        ...


def event(data: Mapping[str, Any], name: str = "") -> bytes:
    """One event of a stream."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()


def text_of(pieces: Sequence[Piece]) -> str:
    """All of their text."""
    return "".join(piece.text for piece in pieces)


def tokens_of(pieces: Sequence[Piece]) -> list[Drawn]:
    """All of their tokens."""
    return [token for piece in pieces for token in piece.tokens]


def share_of(token: TokenShare) -> dict[str, Any]:
    """A token with its log-probability, as two of the protocols write it."""
    return {"token": token.text, "logprob": token.log_probability, "bytes": token.utf8}


def shares_of(tokens: Sequence[Drawn]) -> list[dict[str, Any]]:
    """Drawn tokens with the likeliest in their places."""
    return [{**share_of(token), "top_logprobs": [share_of(each) for each in token.likeliest]} for token in tokens]
