"""A request as ordered pieces in the order in which a model reads them: tools, system prompt, messages. All protocols
share this form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from hashlib import blake2b
from typing import Any


class Kind(StrEnum):
    """The kind of a piece."""

    TOOL = "tool"
    SYSTEM = "system"
    TEXT = "text"
    THINKING = "thinking"
    CALL = "tool call"
    RESULT = "tool result"
    MEDIA = "media"
    OPAQUE = "opaque"
    """Signatures, encrypted reasoning, ids of stored responses: compared but never shown."""
    BLOCK = "block"
    """A block of tokens of which only the hash is known."""


HEAD = (Kind.TOOL, Kind.SYSTEM)
"""The kinds of pieces that stand before the conversation."""


@dataclass(frozen=True)
class Piece:
    """One tool, one block of the system prompt, or one block of a message."""

    kind: Kind
    text: str = field(repr=False)
    """The text that is compared."""
    path: str
    """The place of the piece in the request: `messages[3].content[0]`."""
    role: str = ""
    message: int | None = None
    """The number of its message in the conversation, from 1; None before the conversation."""
    form: str = ""
    """The form of the content, 'string' or 'list', if it may matter to a server."""
    marked: bool = field(default=False, compare=False)
    """Whether the piece carries a `cache_control` marker, which is not part of its content."""

    @cached_property
    def key(self) -> bytes:
        """A digest that is equal for pieces that a model reads in the same way."""
        digest = blake2b(digest_size=16)
        for part in (self.kind, self.role, self.form, self.text):
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "big") + data)
        return digest.digest()

    @cached_property
    def nbytes(self) -> int:
        return len(self.text.encode("utf-8", "surrogatepass"))

    @property
    def secret(self) -> bool:
        """Whether the text must not be printed."""
        return self.kind in (Kind.OPAQUE, Kind.MEDIA)

    @property
    def place(self) -> str:
        """The piece's place in words."""
        if self.kind is Kind.TOOL:
            return "tool list"
        if self.kind is Kind.BLOCK:
            return self.path
        if self.message is None:
            return "system prompt" if self.kind is Kind.SYSTEM else self.path
        what = "" if self.kind is Kind.TEXT else f", {self.kind}"
        return f"message {self.message} ({self.role}{what})"


@dataclass(frozen=True, slots=True)
class Usage:
    """The upstream's counts. `tokens` includes the tokens read from the cache and those written to it."""

    tokens: int
    cached: int
    written: int = 0
    cached_known: bool = True
    """Whether the upstream reported anything about its cache."""


@dataclass(frozen=True)
class Request:
    """One request of a log."""

    number: int
    """The request's number, from 1, in the order of the log."""
    source: str
    """The file and line of the request."""
    protocol: str
    model: str
    pieces: tuple[Piece, ...] = field(repr=False)
    salt: str = ""
    """The value that separates caches of one model (vLLM's `cache_salt`)."""
    session: str = ""
    """The client's own name for the conversation, if it sends one."""
    time: float | None = None
    """Seconds since the epoch, or since the start of the trace."""
    usage: Usage | None = None
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Settings that may change how the prompt renders or caches: `tool_choice`, `thinking`, `chat_template_kwargs`."""
    body: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The body as sent, for a chat template to render."""
    block_tokens: int | None = None
    """Tokens in one piece, if the pieces are hashed blocks."""

    @cached_property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def cache(self) -> tuple[str, str]:
        """The model and the salt. Only requests with equal ones share cached prefixes."""
        return (self.model, self.salt)
