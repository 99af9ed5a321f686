"""Versions: what was before some tokens when they were computed, that is, what a run has read.

A version is immutable and shared. It records which tokens were there (a digest), whether all of them were exact, and
every value of each field that could have reached a reader: values written in the text, values stated by an erratum, and
values that earlier tokens had read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

TOKEN_BYTES = 4
_DIGEST_BYTES = 16

Seen = Mapping[str, frozenset[str]]
"""Field -> all values of it that have been read."""
Statement = tuple[int, str, str]
"""(token offset in a run, field, value): the run's tokens from that offset on have read the value."""


class Content:
    """A digest of a token sequence that can be extended, so that two sequences are compared without storing either.

    `tokens` are ids packed in four bytes each. A content loaded from disk has a digest but no hash state: it can be
    compared, but extending it gives a content that equals no other.
    """

    __slots__ = ("_digest", "_hasher", "length")

    def __init__(self, hasher: hashlib.blake2b | None, digest: bytes | None, length: int) -> None:
        self._hasher, self._digest, self.length = hasher, digest, length

    @classmethod
    def of(cls, tokens: bytes = b"") -> Content:
        hasher = hashlib.blake2b(tokens, digest_size=_DIGEST_BYTES)
        return cls(hasher, None, len(tokens) // TOKEN_BYTES)

    @classmethod
    def saved(cls, digest: bytes | None, length: int) -> Content:
        return cls(None, digest, length)

    @property
    def digest(self) -> bytes | None:
        """The digest, 16 bytes, computed on first use; None if the tokens are unknown."""
        if self._digest is None and self._hasher is not None:
            self._digest = self._hasher.digest()
        return self._digest

    def extended(self, tokens: bytes) -> Content:
        """The content of these tokens followed by `tokens`."""
        if not tokens:
            return self
        length = self.length + len(tokens) // TOKEN_BYTES
        if self._hasher is None:
            return Content(None, None, length)
        hasher = self._hasher.copy()
        hasher.update(tokens)
        return Content(hasher, None, length)

    def same(self, other: Content) -> bool:
        """Whether both are known to be the same token sequence."""
        return self is other or (
            self.length == other.length and self.digest is not None and self.digest == other.digest
        )


@dataclass(frozen=True, slots=True, eq=False)
class Version:
    """What was before a token when it was computed."""

    content: Content
    exact: bool = True
    """whether all those tokens were exact at that time"""
    seen: Seen = field(default_factory=dict)
    preface: bool = False
    """whether some token had read a preface that is not in the context, so it may have read unknown field values"""

    def after(self, tokens: bytes, statements: Iterable[Statement]) -> Version:
        """The version of the tokens that were computed right after `tokens`, in the same forward."""
        return Version(self.content.extended(tokens), self.exact, with_statements(self.seen, statements), self.preface)


NOTHING = Version(Content.of())
"""The version of a context's first token."""


def merged(seen: Seen, more: Seen) -> Seen:
    """The union of both. Returns the object `seen` itself if it already contains `more`, so that runs share it."""
    if seen is more or not more:
        return seen
    new = {name: values for name, values in more.items() if not values <= seen.get(name, frozenset())}
    if not new:
        return seen
    if not seen:
        return dict(more)
    return {**seen, **{name: seen.get(name, frozenset()) | values for name, values in new.items()}}


def with_statements(seen: Seen, statements: Iterable[Statement]) -> Seen:
    """The union of `seen` and the values of some statements."""
    stated: dict[str, frozenset[str]] = {}
    for _, name, value in statements:
        stated[name] = stated.get(name, frozenset()) | {value}
    return merged(seen, stated)
