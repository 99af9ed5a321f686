"""Computes several continuations (branches) of one context in one forward, each with its own rows and its own mask.

The rows of a branch have their own slots behind the context. Its mask lets a branch see the context without the slots
that it cannot read, and no other branch. So a branch costs its rows instead of a forward. The result is exact: it
equals computing the branches one after the other.
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
"""most rows of one forward"""


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens to compute, at ascending positions, and the slots that they cannot read."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    unread: tuple[int, ...] = ()
    """slots that no row of the branch reads in `layers`"""
    layers: tuple[int, ...] | None = None
    """layers in which `unread` applies; None: all"""
    absent: tuple[int, ...] = ()
    """slots that the branch reads in no layer: rows that replace others, or rows of another branch"""


@dataclass(frozen=True, slots=True, eq=False)
class Grown:
    """The result of a branch."""

    slots: tuple[int, ...]
    """slots of the branch's rows, valid as long as the rows are kept"""
    logits: torch.Tensor
    """[rows, vocabulary], or [1, vocabulary] for only the last row"""


class Branching:
    """Computes the branches of one buffer. Made by `branching`."""

    def __init__(self, engine: Engine, buffer: KVBuffer) -> None:
        self._engine, self._buffer = engine, buffer
        self._branches: Sequence[Branch] = ()
        self._of = torch.empty(0, dtype=torch.long)
        self._seen: dict[tuple[Reach, int | None, tuple[int, ...]], torch.Tensor] = {}

    def beside(self, layers: Sequence[Overwrite], positions: Sequence[int]) -> tuple[int, ...]:
        """Append keys and values of tokens at these positions to the context, and return their slots.

        A branch sees them unless it lists them in `absent` or `unread`.
        """
        first = self._buffer.length
        slots = tuple(range(first, first + len(positions)))
        with self._buffer.writing(slots, positions):
            for layer, row in zip(self._buffer.layers, layers, strict=True):
                layer.update(row.keys, row.values)
        return slots

    def last(self, branches: Sequence[Branch]) -> torch.Tensor:
        """Return the logits of each branch's last row, [branches, vocabulary]. The buffer is unchanged.

        Raises:
            InvalidArgumentError: see `grown`.
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
        """Compute branches in one forward. Their rows are kept, and a later branch sees them unless it excludes them.

        Args:
            every: whether to return the logits of all rows, not only of each branch's last row.

        Raises:
            InvalidArgumentError: a branch has no rows, has not one position for each, or names a slot that is not in
                use.
        """
        used = self._buffer.length
        for each in branches:
            if not each.ids or len(each.ids) != len(each.positions):
                raise InvalidArgumentError(
                    f"a branch needs at least one token, and one position for each token: {each}"
                )
            if not set(each.unread + each.absent) <= set(range(used)):
                raise InvalidArgumentError(f"a branch names slots that are not among the {used} in use: {each}")
        # Each branch's last row goes to the end, where its logits are asked for. Positions ascend in both groups.
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
        """Return what the rows of the running forward see in a layer, booleans [1, T, S]."""
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
    """Yield a `Branching` that computes branches of this buffer. At the end of the block the buffer is rolled back.

    Run no other forwards of the buffer inside the block.

    Raises:
        InvalidArgumentError: the buffer is empty.
        UnsupportedModelError: attention depends on positions in other ways than through the keys and the mask.
    """
    require_rotary(engine, buffer)
    found = Branching(engine, buffer)
    with masked(engine, buffer, found.allowed, range(len(buffer)), Reached(())):
        yield found
