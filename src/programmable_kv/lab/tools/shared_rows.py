"""Computes the rows of many contexts that share some rows: each row once, in a few large forwards.

A row's token, position and visible rows determine its keys and values. Rows that differ in one of these have different
names, which are numbers. All named rows are computed together. The result equals computing context by context, up to
rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.masks import PartReads
from programmable_kv.cache.rotation import Rotation
from programmable_kv.engine import Engine, Rows
from programmable_kv.lab.tools.kv import rows_from
from programmable_kv.lab.tools.together import require_rotary

_ROWS = 320
"""most rows of one forward; more rows would mostly not see each other, and attention also computes what is masked"""
NOTHING = 0
"""number of the empty list of rows, with which every list begins"""


@dataclass(frozen=True, slots=True)
class Computed:
    """A row to compute, identified by what determines it."""

    token: int
    position: int
    sees: int
    """number of the list of rows that it sees"""


@dataclass(frozen=True, slots=True)
class Moved:
    """A computed row whose keys were rotated to another position."""

    origin: int
    position: int


class SharedRows:
    """Rows of one model, each computed once."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._kept = engine.new_buffer(1024)
        self._rows: list[Computed | Moved] = []
        self._names: dict[Computed | Moved, int] = {}
        self._lists: list[tuple[int, int]] = [(NOTHING, -1)]
        """by number of a list of rows: the number of the list without its last row, and the last row's name"""
        self._numbers: dict[tuple[int, int], int] = {}
        self._places: dict[int, int] = {}
        """name of a computed row -> its slot in `_kept`"""
        self._logits: dict[int, torch.Tensor] = {}
        self._pending: dict[int, None] = {}
        self._asked: set[int] = set()

    def name(self, token: int, position: int, sees: int) -> int:
        """Return the name of the row of a token that sees a list of rows, and itself."""
        return self._name(Computed(token, position, sees))

    def moved(self, name: int, position: int) -> int:
        """Return the name of a row that is relocated to another position."""
        row = self._rows[name]
        origin = row.origin if isinstance(row, Moved) else name
        return origin if self._rows[origin].position == position else self._name(Moved(origin, position))

    def _name(self, row: Computed | Moved) -> int:
        known = self._names.setdefault(row, len(self._rows))
        if known == len(self._rows):
            self._rows.append(row)
            self._pending[known] = None
        return known

    def longer(self, rows: int, name: int) -> int:
        """Return the number of a list of rows with one row appended."""
        number = self._numbers.setdefault((rows, name), len(self._lists))
        if number == len(self._lists):
            self._lists.append((rows, name))
        return number

    def context(self, ids: Sequence[int], stays: Mapping[int, int] | None = None) -> tuple[int, ...]:
        """Return the names of a context's rows. Each sees all rows before it; `stays` (slot -> name) has given rows."""
        sees, names = NOTHING, []
        for slot, token in enumerate(ids):
            name = stays[slot] if stays is not None and slot in stays else self.name(token, slot, sees)
            sees = self.longer(sees, name)
            names.append(name)
        return tuple(names)

    def buffer(self, names: Sequence[int]) -> KVBuffer:
        """Return a buffer with copies of computed rows."""
        found = self.engine.new_buffer(len(names))
        self._put(found, names, self._kept, [self._places[name] for name in names])
        return found

    def add(self, ids: Sequence[int], buffer: KVBuffer) -> None:
        """Add the rows of a context that was prefilled with these tokens.

        Raises:
            UnsupportedModelError: attention depends on positions in other ways than through the keys and the mask, or
                keys have no heads.
        """
        require_rotary(self.engine, buffer)
        sees, fresh = NOTHING, []
        for slot, position in enumerate(buffer.positions.tolist()):
            name = self.name(ids[slot], position, sees)
            sees = self.longer(sees, name)
            if name not in self._places:
                fresh.append((name, slot))
                self._pending.pop(name, None)
        if fresh:
            self._keep([name for name, _ in fresh], buffer, [slot for _, slot in fresh])

    def logits(self, name: int) -> torch.Tensor | None:
        """Return a row's logits [V]. If they are not known yet, return None and let the next `compute` compute them."""
        if name not in self._logits:
            self._asked.add(name)
            self._pending[name] = None
        return self._logits.get(name)

    def compute(self) -> None:
        """Compute all pending rows, and the logits that were asked for."""
        some: dict[int, None] = {}
        for name in self._pending:
            row = self._rows[name]
            if isinstance(row, Computed):
                some[name] = None
            if len(some) == _ROWS or (isinstance(row, Moved) and row.origin in some):
                self._compute(list(some))
                some = {}
            if isinstance(row, Moved):
                self._move(name, row)
        if some:
            self._compute(list(some))
        self._pending.clear()
        self._asked.clear()

    def _compute(self, names: Sequence[int]) -> None:
        order = [*(it for it in names if it not in self._asked), *(it for it in names if it in self._asked)]
        logits = sum(it in self._asked for it in names)
        seen = {name: self._seen(name) for name in order}
        before = sorted({it for each in seen.values() for it in each} - set(order))
        column = {name: number for number, name in enumerate([*before, *order])}
        buffer = self.engine.new_buffer(len(column))
        if before:
            self._put(buffer, before, self._kept, [self._places[name] for name in before])
        table = torch.eye(len(column), dtype=torch.bool)
        for name, others in seen.items():
            table[column[name], [column[other] for other in others]] = True
        slots = tuple(range(len(before), len(column)))
        rows = [self._rows[name] for name in order]
        tokens = tuple(row.token for row in rows if isinstance(row, Computed))
        found = self.engine.compute(
            buffer, Rows(tokens, slots, tuple(row.position for row in rows)), logits=logits, chunk=len(order),
            reads=PartReads(torch.arange(len(column)), table),
        )  # fmt: skip
        self._keep(order, buffer, slots)
        self._logits |= zip(order[len(order) - logits :], found, strict=True)

    def _seen(self, name: int) -> list[int]:
        row = self._rows[name]
        assert isinstance(row, Computed)
        number, seen = row.sees, []
        while number != NOTHING:
            number, each = self._lists[number]
            seen.append(each)
        return seen

    def _move(self, name: int, row: Moved) -> None:
        place = self._places[row.origin]
        self._put(self._kept, [name], self._kept, [place])
        own = slice(self._kept.length - 1, self._kept.length)
        rotation = Rotation(torch.tensor([row.position - self._rows[row.origin].position]))
        for layer, rule in enumerate(self.engine.require_relocation().layers):
            keys = self._kept.keys(layer)
            rotation.put(keys[:, :, place : place + 1].clone(), rule.rotation, keys[:, :, own])
        self._places[name] = own.start

    def _keep(self, names: Sequence[int], source: KVBuffer, slots: Sequence[int]) -> None:
        first = self._kept.length
        self._put(self._kept, names, source, slots)
        for place, name in enumerate(names, start=first):
            self._places[name] = place

    def _put(self, buffer: KVBuffer, names: Sequence[int], source: KVBuffer, slots: Sequence[int]) -> None:
        """Append rows of a source. The buffer does not record which rows see each other; the masks made here do."""
        first = buffer.length
        copies = rows_from(source, slots)
        with buffer.writing(range(first, first + len(names)), [self._rows[name].position for name in names]):
            for layer, row in zip(buffer.layers, copies, strict=True):
                layer.update(row.keys, row.values)
