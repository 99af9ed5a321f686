"""A request as the ordered pieces that a model reads: tools, system prompt, messages. The same for every protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from hashlib import blake2b
from typing import Any


class Kind(StrEnum):
    """What a piece is."""

    TOOL = "tool"
    SYSTEM = "system"
    TEXT = "text"
    THINKING = "thinking"
    CALL = "tool call"
    RESULT = "tool result"
    MEDIA = "media"
    OPAQUE = "opaque"
    """signatures, encrypted reasoning, ids of stored responses: compared, never shown"""
    BLOCK = "block"
    """a block of tokens of which only the hash is known"""


HEAD = (Kind.TOOL, Kind.SYSTEM)
"""what stands before the conversation"""


@dataclass(frozen=True)
class Piece:
    """One tool, one block of the system prompt, or one block of a message."""

    kind: Kind
    text: str = field(repr=False)
    """what is compared"""
    path: str
    """where it stands in the request: `messages[3].content[0]`"""
    role: str = ""
    message: int | None = None
    """the number of its message in the conversation, from 1; None before the conversation"""
    form: str = ""
    """how the content was written where that may matter to a server: 'string' or 'list'"""
    marked: bool = field(default=False, compare=False)
    """it carries a `cache_control` marker, which is no content"""

    @cached_property
    def key(self) -> bytes:
        """Equal for pieces that a model reads alike."""
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
        """Whether its text must not be printed."""
        return self.kind in (Kind.OPAQUE, Kind.MEDIA)

    @property
    def place(self) -> str:
        """Where it stands, in words."""
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
    """What the upstream counted. `tokens` holds what was read from the cache and what was written to it."""

    tokens: int
    cached: int
    written: int = 0
    cached_known: bool = True
    """False where the upstream said nothing about its cache"""


@dataclass(frozen=True)
class Request:
    """One request of a log."""

    number: int
    """from 1, in the order of the log"""
    source: str
    """the file and line it came from"""
    protocol: str
    model: str
    pieces: tuple[Piece, ...] = field(repr=False)
    salt: str = ""
    """what parts caches besides the model (vLLM's `cache_salt`)"""
    session: str = ""
    """the client's own name for the conversation, where it sends one"""
    time: float | None = None
    """seconds since the epoch, or since the start of the trace"""
    usage: Usage | None = None
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """what else may change how the prompt is rendered or cached: `tool_choice`, `thinking`, `chat_template_kwargs`"""
    body: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """as it was sent, for a chat template to render"""
    block_tokens: int | None = None
    """tokens in one piece, where the pieces are hashed blocks"""

    @cached_property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def cache(self) -> tuple[str, str]:
        """Requests share cached prefixes only where this is equal."""
        return (self.model, self.salt)
