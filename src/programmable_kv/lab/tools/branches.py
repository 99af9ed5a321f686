"""Continuations of one context computed side by side in one forward, each with rows and with sights of its own.

The rows of a branch stand behind the context in slots of their own. By its mask a branch sees the context, without the slots
that it cannot read, and of all branches itself alone. So a branch costs its rows and not a forward. Exact: equal to computing
the branches one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.layout import Reach
from programmable_kv.cache.masks import visible
from programmable_kv.cache.overwrite import Overwrite
from programmable_kv.engine import Engine, Rows
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.lab.tools.hooks import Reached, taken_back
from programmable_kv.lab.tools.masks import masked
from programmable_kv.lab.tools.together import require_rotary

_ROWS = 192
"""of one forward"""


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens to compute, at ascending positions, and what they cannot read."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    unread: tuple[int, ...] = ()
    """slots of the context that no row of it reads"""
    layers: tuple[int, ...] | None = None
    """where `unread` holds; None: in all layers"""
    absent: tuple[int, ...] = ()
    """slots that it reads in no layer: rows that stand for others, or belong to another branch"""


@dataclass(frozen=True, slots=True, eq=False)
class Grown:
    """What came of a branch."""

    slots: tuple[int, ...]
    """of its rows, as long as they are kept"""
    logits: torch.Tensor
    """[rows, vocabulary], or of the last row alone, [1, vocabulary]"""


class Branching:
    """The branches of one buffer. Made by `branching`."""

    def __init__(self, engine: Engine, buffer: KVBuffer) -> None:
        self._engine, self._buffer = engine, buffer
        self._branches: Sequence[Branch] = ()
        self._of = torch.empty(0, dtype=torch.long)
        self._seen: dict[tuple[Reach, int | None, tuple[int, ...]], torch.Tensor] = {}

    def beside(self, layers: Sequence[Overwrite], positions: Sequence[int]) -> tuple[int, ...]:
        """Put keys and values of tokens at these positions behind the context: their slots. Every branch sees them that is
        not told that they are absent."""
        first = self._buffer.length
        slots = tuple(range(first, first + len(positions)))
        with self._buffer.writing(slots, positions):
            for layer, row in zip(self._buffer.layers, layers, strict=True):
                layer.update(row.keys, row.values)
        return slots

    def last(self, branches: Sequence[Branch]) -> torch.Tensor:
        """The logits of each branch's last row, [branches, vocabulary]. The buffer is unchanged.

        Raises:
            InvalidArgumentError: as `grown`.
        """
        found, start = [], 0
        while start < len(branches):
            stop, rows = start + 1, len(branches[start].ids)
            while stop < len(branches) and rows + len(branches[stop].ids) <= _ROWS:
                rows += len(branches[stop].ids)
                stop += 1
            with taken_back(self._buffer):
                found += [each.logits for each in self.grown(branches[start:stop], every=False)]
            start = stop
        return torch.cat(found) if found else torch.empty(0)

    def grown(self, branches: Sequence[Branch], *, every: bool = True) -> list[Grown]:
        """Compute branches in one forward. Their rows are kept: a later branch sees them that is not told otherwise.

        Args:
            every: the logits of all rows, not only of each branch's last one.

        Raises:
            InvalidArgumentError: a branch has no rows, not a position for each, or names a slot that is not in use.
        """
        used = self._buffer.length
        for each in branches:
            if not each.ids or len(each.ids) != len(each.positions):
                raise InvalidArgumentError(f"a branch has a position for each of its tokens, one at least: {each}")
            if not set(each.unread + each.absent) <= set(range(used)):
                raise InvalidArgumentError(f"a branch cannot read slots that are not among the {used} in use: {each}")
        # The last rows last, whose logits are asked for, and positions ascending among them.
        order = sorted(
            (row == len(each.ids) - 1, position, number, row)
            for number, each in enumerate(branches)
            for row, position in enumerate(each.positions)
        )
        places = [(number, row) for _, _, number, row in order]
        slots = tuple(range(used, used + len(places)))
        rows = Rows(
            tuple(branches[number].ids[row] for number, row in places), slots, tuple(at for _, at, _, _ in order)
        )
        self._branches, self._of, self._seen = branches, torch.tensor([number for number, _ in places]), {}
        count = len(places) if every else len(branches)
        logits = self._engine.compute(self._buffer, rows, logits=count, chunk=len(places))
        at = {place: index for index, place in enumerate(places)}
        found = []
        for number, each in enumerate(branches):
            own = [at[number, row] for row in range(len(each.ids))]
            asked = own if every else own[-1:]
            found.append(Grown(tuple(slots[index] for index in own), logits[[i - len(places) for i in asked]]))
        return found

    def allowed(self, layer: int, slots: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        """[1, T, S] booleans: what the rows of the forward now running see in a layer."""
        rule = self._buffer.layout.layers[layer]
        blocked = tuple(n for n, each in enumerate(self._branches) if each.layers is None or layer in each.layers)
        key = (rule.reach, rule.window, blocked)
        if key not in self._seen:
            first = int(slots[0])
            positions = self._buffer.positions_until(first + len(slots))
            seen = visible(positions[slots], positions, rule.reach, rule.window)
            seen[:, first:] &= self._of[:, None] == self._of[None, :]
            for number, each in enumerate(self._branches):
                hidden = torch.zeros(len(positions), dtype=torch.bool)
                hidden[list(each.absent + (each.unread if number in blocked else ()))] = True
                seen[self._of == number] &= ~hidden
            self._seen[key] = seen[None].to(self._engine.device)
        return self._seen[key]


@contextmanager
def branching(engine: Engine, buffer: KVBuffer) -> Iterator[Branching]:
    """Inside the block branches of this buffer are computed; at its end all is taken back. No other forwards of it run inside.

    Raises:
        InvalidArgumentError: the buffer is empty.
        UnsupportedModelError: attention depends on positions by more than the keys and the mask.
    """
    require_rotary(engine, buffer)
    found = Branching(engine, buffer)
    with masked(engine, buffer, found.allowed, range(len(buffer)), Reached(())):
        yield found
