"""Finds the first difference of two requests, and the differences behind it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from programmable_kv.explain.pieces import Piece, Request

_MOST_ALIGNED = 1000
"""Maximum number of pieces aligned to find further differences. The first difference is found at any length."""


@dataclass(frozen=True, slots=True)
class Change:
    """Two pieces that differ; one of them is None if its request ends there."""

    before: Piece | None
    after: Piece | None
    offset: int
    """Equal characters at the beginning of both pieces."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The first difference of two requests."""

    earlier: Request
    later: Request
    index: int
    """The index of the first piece that differs, which is the number of equal pieces before it."""
    offset: int
    """Equal characters at the beginning of the two differing pieces."""

    @property
    def before(self) -> Piece | None:
        """The earlier request's piece; None if that request ends here."""
        return _at(self.earlier.pieces, self.index)

    @property
    def after(self) -> Piece | None:
        """The later request's piece; None if that request ends here."""
        return _at(self.later.pieces, self.index)

    @property
    def equal_bytes(self) -> int:
        """The length of the common prefix in bytes."""
        whole = sum(piece.nbytes for piece in self.later.pieces[: self.index])
        part = self.after.text[: self.offset] if self.after is not None else ""
        return whole + len(part.encode("utf-8", "surrogatepass"))

    @property
    def only_appended(self) -> bool:
        """Whether the later request begins with all of the earlier one, so that no cache loses anything."""
        if self.before is None:
            return self.after is not None
        last = self.index == len(self.earlier.pieces) - 1
        return last and self.after is not None and self.offset == len(self.before.text)

    @property
    def only_shorter(self) -> bool:
        """Whether the earlier request begins with all of the later one: a retry, or a branch from an earlier turn."""
        return self.after is None

    @property
    def change(self) -> Change:
        """The two differing pieces."""
        return Change(self.before, self.after, self.offset)


def first_difference(earlier: Request, later: Request) -> Difference:
    """The first difference of two requests, compared piece by piece as a prefix cache does."""
    index = 0
    for one, other in zip(earlier.pieces, later.pieces, strict=False):
        if one is not other and one.key != other.key:
            break
        index += 1
    before, after = _at(earlier.pieces, index), _at(later.pieces, index)
    return Difference(earlier, later, index, shared_characters(before, after))


def changes_behind(first: Difference, most: int = 5) -> list[Change]:
    """Further differences behind the first, at most `most`. They would break the prefix once the first is fixed.

    Text that the later request appends at its end does not count as a difference.
    """
    one = first.earlier.pieces[first.index : first.index + _MOST_ALIGNED]
    other = first.later.pieces[first.index : first.index + _MOST_ALIGNED]
    matcher = SequenceMatcher(None, [p.key for p in one], [p.key for p in other], autojunk=False)
    found = []
    for tag, start, stop, start_later, stop_later in matcher.get_opcodes():
        if tag != "replace":
            continue
        for before, after in zip(one[start:stop], other[start_later:stop_later], strict=False):
            if before.kind is after.kind and not (before is one[0] or after is other[0]):
                found.append(Change(before, after, shared_characters(before, after)))
    return found[:most]


def common_bytes(one: Request, other: Request) -> int:
    """Bytes in the pieces that both requests have, wherever they stand."""
    shared = Counter(piece.key for piece in one.pieces) & Counter(piece.key for piece in other.pieces)
    sizes = {piece.key: piece.nbytes for piece in other.pieces}
    return sum(sizes[key] * count for key, count in shared.items())


def common_length(one: str, other: str) -> int:
    """The number of equal characters at the beginning of two texts."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # bisection, since slices compare at memory speed
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def shared_characters(before: Piece | None, after: Piece | None) -> int:
    """The number of equal characters at the beginning of two pieces; 0 if their kind, role or form differs."""
    if (
        before is None
        or after is None
        or (before.kind, before.role, before.form) != (after.kind, after.role, after.form)
    ):
        return 0
    return common_length(before.text, after.text)


def _at(pieces: Sequence[Piece], index: int) -> Piece | None:
    return pieces[index] if index < len(pieces) else None
