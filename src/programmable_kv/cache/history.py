"""The marks of a buffer and its undo log: the rows that were overwritten since the oldest mark."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from programmable_kv.cache.frequencies import Tables
from programmable_kv.cache.origins import SavedOrigins, Slots
from programmable_kv.errors import CacheBufferError


@dataclass(frozen=True, slots=True, eq=False)
class Mark:
    """A state of a buffer to which it can roll back. Marks are compared by identity: each belongs to one buffer."""

    length: int
    logged: int
    tables: Tables | None
    """the frequency tables that the rows were computed with; None if there were no rows"""
    foreign_from: int | None = None
    """the first slot that transformers wrote by itself; None if it wrote none"""


@dataclass(frozen=True, slots=True)
class SavedRows:
    """The content of some slots before they were overwritten. Tensors are [B, H, n, D] in each layer."""

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
    """A stack of marks and an undo log. Rows that no mark needs are not saved."""

    def __init__(self) -> None:
        self._marks: list[Mark] = []
        self._log: list[SavedRows] = []

    def __bool__(self) -> bool:
        return bool(self._marks)

    @property
    def needed(self) -> int:
        """A rollback may restore the content of the slots below this one."""
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
            CacheBufferError: the mark was rolled back or released, or belongs to another buffer.
        """
        if not self.holds(mark):
            raise CacheBufferError(
                "this mark is not active: it was rolled back or released, or it belongs to another buffer"
            )

    def drop(self, mark: Mark) -> None:
        """Drop a mark and every later one; clear the log when no mark is left."""
        self._marks = self._marks[: self._marks.index(mark)]
        if not self._marks:
            self._log.clear()

    def needed_of(self, slots: Slots) -> Slots | None:
        """The slots among these whose content a mark needs; None if there are none."""
        if isinstance(slots, slice):
            stop = min(slots.stop, self.needed)
            return slice(slots.start, stop) if slots.start < stop else None
        kept = slots[slots < self.needed]
        return kept if kept.numel() else None

    def keep(self, rows: SavedRows) -> None:
        self._log.append(rows)

    def since(self, mark: Mark) -> Iterator[SavedRows]:
        """Remove the rows saved since a mark from the log and yield them, latest first."""
        while len(self._log) > mark.logged:
            yield self._log.pop()
