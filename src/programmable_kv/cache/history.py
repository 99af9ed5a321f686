"""The marks of a buffer, and the rows that were overwritten since the oldest of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from programmable_kv.cache.frequencies import Tables
from programmable_kv.cache.origins import SavedOrigins, Slots
from programmable_kv.errors import CacheBufferError


@dataclass(frozen=True, slots=True, eq=False)
class Mark:
    """A state of one buffer that can be returned to. Compared by identity: a mark belongs to one buffer only."""

    length: int
    logged: int
    tables: Tables | None
    """the frequency tables that the rows were computed with; None if there were no rows"""
    foreign_from: int | None = None
    """the first slot that transformers wrote by itself; None if it wrote none"""


@dataclass(frozen=True, slots=True)
class SavedRows:
    """What some slots held before they were overwritten. Tensors are [B, H, n, D] per layer."""

    slots: Slots
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    positions: torch.Tensor
    origins: SavedOrigins

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))


class History:
    """A stack of marks, and an undo log. Rows that no mark needs are not kept."""

    def __init__(self) -> None:
        self._marks: list[Mark] = []
        self._log: list[SavedRows] = []

    def __bool__(self) -> bool:
        return bool(self._marks)

    @property
    def needed(self) -> int:
        """The content of slots below this one may still be asked for."""
        return max((mark.length for mark in self._marks), default=0)

    def mark(self, length: int, tables: Tables | None, foreign_from: int | None = None) -> Mark:
        mark = Mark(length, len(self._log), tables, foreign_from)
        self._marks.append(mark)
        return mark

    def holds(self, mark: Mark) -> bool:
        return mark in self._marks

    def require(self, mark: Mark) -> None:
        """
        Raises:
            CacheBufferError: the mark was used up, or is another buffer's.
        """
        if not self.holds(mark):
            raise CacheBufferError("this mark is not active: it was rolled back, released, or is another buffer's")

    def drop(self, mark: Mark) -> None:
        """Forget a mark and every later one; the log too, once nothing needs it."""
        self._marks = self._marks[: self._marks.index(mark)]
        if not self._marks:
            self._log.clear()

    def needed_of(self, slots: Slots) -> Slots | None:
        """Those of the slots that some mark needs; None if none does."""
        if isinstance(slots, slice):
            stop = min(slots.stop, self.needed)
            return slice(slots.start, stop) if slots.start < stop else None
        kept = slots[slots < self.needed]
        return kept if kept.numel() else None

    def keep(self, rows: SavedRows) -> None:
        self._log.append(rows)

    def since(self, mark: Mark) -> Iterator[SavedRows]:
        """Take what was kept since a mark off the log, the latest first."""
        while len(self._log) > mark.logged:
            yield self._log.pop()
