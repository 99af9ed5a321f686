"""Recomputes some rows of a context many times in one forward, each time with other activations.

Each copy of the rows has its own slots behind the context. Its mask shows it the context without the rows that it
replaces, and hides the other copies. So an intervention costs a few rows instead of a forward. The result is exact: it
equals computing the rows in place, one intervention after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.masks import visible
from programmable_kv.engine import Engine, Rows
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.lab.tools.changes import replaced
from programmable_kv.lab.tools.head_outputs import Head, require_heads
from programmable_kv.lab.tools.hooks import Change, Reached
from programmable_kv.lab.tools.masks import masked
from programmable_kv.lab.tools.sites import Place, Site, all_changed
from programmable_kv.lab.tools.together import require_rotary

_ROWS = 192
"""The most rows in one forward."""
_Edit = tuple[Site, Change, Sequence[int]]


@dataclass(frozen=True, slots=True, eq=False)
class Exchanged:
    """One copy's intervention: the new residual stream before a layer, [rows - 1, d], of all rows except the last."""

    layer: int
    streams: torch.Tensor


@dataclass(frozen=True, slots=True)
class Rewritten:
    """One copy's intervention: replaces the outputs of heads in all rows except the last."""

    heads: tuple[Head, ...]
    """The heads with replaced outputs."""
    readers: tuple[Head, ...] | None = None
    """The heads of the last row that read the copy's rows. All other heads read the original rows. None: all heads."""


def computed_in_copies(engine: Engine, buffer: KVBuffer, rows: Rows, exchanges: Sequence[Exchanged]) -> torch.Tensor:
    """Return the last row's logits under each exchange, [exchanges, vocabulary]. The buffer is unchanged.

    Args:
        rows: rows whose slots are in use; the last row may also be a new one behind the context.

    Raises:
        InvalidArgumentError: there is only one row, or the streams have another number of rows.
        UnsupportedModelError: attention depends on positions in other ways than through the keys and the mask.
    """
    require_rotary(engine, buffer)
    _require_several(rows)
    for each in exchanges:
        _require_one_each(rows, len(each.streams), "streams")
    found = []
    for start, stop in _forwards(len(exchanges), len(rows)):
        copies = _Copies(buffer, rows, stop - start)
        edits: list[_Edit] = []
        for layer in sorted({each.layer for each in exchanges[start:stop]}):
            which = [number for number, each in enumerate(exchanges[start:stop]) if each.layer == layer]
            streams = torch.cat([exchanges[start + number].streams for number in which])
            edits.append((Site(Place.RESIDUAL, layer), replaced(streams), copies.slots_of(which)))
        found.append(_in_one_forward(engine, buffer, copies, edits, _Seen(buffer, copies)))
    return torch.cat(found) if found else torch.empty(0)


def rewritten_in_copies(
    engine: Engine, buffer: KVBuffer, rows: Rows, outputs: torch.Tensor, several: Sequence[Rewritten]
) -> torch.Tensor:
    """Return the last row's logits when outputs of heads in the other rows are replaced, [several, vocabulary].

    The buffer is unchanged.

    Args:
        rows: rows whose slots are in use; the last row may also be a new one behind the context.
        outputs: head outputs of all rows except the last, [L, rows - 1, heads, D_v]. Each copy takes the outputs of the
            heads that it names.

    Raises:
        InvalidArgumentError: there is only one row, the outputs have another number of rows, or a head does not exist.
        UnsupportedModelError: attention depends on positions in other ways than through the keys and the mask.
    """
    require_rotary(engine, buffer)
    _require_several(rows)
    _require_one_each(rows, outputs.shape[1], "rows of outputs")
    for each in several:
        require_heads(outputs, (*each.heads, *(each.readers or ())))
    found = []
    for start, stop in _forwards(len(several), len(rows)):
        some, copies = several[start:stop], _Copies(buffer, rows, stop - start)
        readers = [each.readers for each in some]
        seen = _Seen(buffer, copies, readers=readers, heads=outputs.shape[2])
        found.append(_in_one_forward(engine, buffer, copies, _writings(copies, outputs, some), seen))
    return torch.cat(found) if found else torch.empty(0)


def _require_several(rows: Rows) -> None:
    if len(rows) < 2:
        raise InvalidArgumentError(f"all rows except the last are changed, so give at least two rows; got {len(rows)}")


def _require_one_each(rows: Rows, given: int, what: str) -> None:
    if given != len(rows) - 1:
        raise InvalidArgumentError(
            f"all rows except the last are changed: {len(rows)} rows need {len(rows) - 1} {what}, got {given}"
        )


def _forwards(count: int, rows: int) -> list[tuple[int, int]]:
    """Return the half-open range (start, stop) of the copies in each forward."""
    some = max(1, _ROWS // rows)
    return [(start, min(start + some, count)) for start in range(0, count, some)]


class _Copies:
    """All copies of the first row, then of the second, and so on. So positions ascend, and the last rows come last."""

    def __init__(self, buffer: KVBuffer, rows: Rows, count: int) -> None:
        self.rows, self.count, self.past = rows, count, buffer.length
        self.every = Rows(
            tuple(token for token in rows.ids for _ in range(count)),
            tuple(range(self.past, self.past + count * len(rows))),
            tuple(position for position in rows.positions for _ in range(count)),
        )

    def slots_of(self, which: Sequence[int]) -> list[int]:
        """Return the slots of some copies, copy by copy, without each copy's last row."""
        return [self.past + row * self.count + number for number in which for row in range(len(self.rows) - 1)]


def _writings(copies: _Copies, outputs: torch.Tensor, some: Sequence[Rewritten]) -> list[_Edit]:
    edits: list[_Edit] = []
    for layer in sorted({layer for each in some for layer, _ in each.heads}):
        which = [number for number, each in enumerate(some) if any(at == layer for at, _ in each.heads)]
        taken = torch.zeros(len(which), outputs.shape[2], dtype=torch.bool)
        for index, number in enumerate(which):
            taken[index, [head for at, head in some[number].heads if at == layer]] = True
        taken = taken.repeat_interleave(outputs.shape[1], dim=0)
        edits.append((Site(Place.HEADS, layer), _taking(outputs[layer], taken), copies.slots_of(which)))
    return edits


def _taking(outputs: torch.Tensor, taken: torch.Tensor) -> Change:
    """Replace head outputs in copies of rows by `outputs` [rows, heads, D_v], where `taken` [copies * rows, heads]."""

    def change(rows: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        here = taken[which].to(rows.device)[:, :, None]
        return torch.where(here, outputs.to(rows)[which % len(outputs)], rows)

    return change


def _in_one_forward(
    engine: Engine, buffer: KVBuffer, copies: _Copies, edits: Sequence[_Edit], seen: _Seen
) -> torch.Tensor:
    with _seeing(engine, buffer, copies, seen), all_changed(engine, buffer, edits):
        return engine.compute(buffer, copies.every, logits=copies.count, chunk=len(copies.every))


@contextmanager
def copied(engine: Engine, buffer: KVBuffer, rows: Rows, count: int) -> Iterator[Rows]:
    """Yield copies of rows for one forward by the caller: all copies of the first row, then of the second, and so on.

    Inside the block, each copy sees the context and no other copy. Then the buffer is rolled back.

    Raises:
        UnsupportedModelError: attention depends on positions in other ways than through the keys and the mask.
    """
    require_rotary(engine, buffer)
    copies = _Copies(buffer, rows, count)
    with _seeing(engine, buffer, copies, _Seen(buffer, copies)):
        yield copies.every


@contextmanager
def _seeing(engine: Engine, buffer: KVBuffer, copies: _Copies, seen: _Seen) -> Iterator[None]:
    reached = Reached(copies.every.slots)

    def allowed(layer: int, slots: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        reached.met.update(slots.tolist())
        return seen.by(layer).to(engine.device)

    with masked(engine, buffer, allowed, range(len(buffer)), reached):
        yield


class _Seen:
    """The attention mask of the copied rows, [1 or heads, T, S]. The slots are the context, then the copies."""

    def __init__(
        self, buffer: KVBuffer, copies: _Copies, *, readers: Sequence[tuple[Head, ...] | None] = (), heads: int = 1
    ) -> None:
        self._layout, self._past, self._count = buffer.layout, buffer.length, copies.count
        self._queries = torch.tensor(copies.every.positions)
        self._keys = torch.cat((buffer.positions, self._queries))
        self._replaced = [slot for slot in copies.rows.slots if slot < self._past]
        self._own = copies.rows.slots[-1]
        copy = torch.arange(len(copies.every)) % copies.count
        self._together = copy[:, None] == copy[None, :]
        self._readers, self._heads = dict(enumerate(readers)), heads

    def by(self, layer: int) -> torch.Tensor:
        rule = self._layout.layers[layer]
        context = visible(self._queries, self._keys, rule.reach, rule.window)
        seen = context.clone()
        seen[:, self._replaced] = False
        seen[:, self._past :] &= self._together
        if all(readers is None for readers in self._readers.values()):
            return seen[None]
        by_head = seen.expand(self._heads, -1, -1).clone()
        last = len(seen) - self._count
        for number, readers in self._readers.items():
            if readers is not None:
                elsewhere = torch.ones(self._heads, dtype=torch.bool)
                elsewhere[[head for at, head in readers if at == layer]] = False
                # These heads see the row itself, and the original rows of the context instead of the copy.
                unread = context[last + number].clone()
                unread[[slot for slot in self._replaced if slot == self._own]] = False
                unread[self._past :] = False
                unread[self._past + last + number] = True
                by_head[elsewhere, last + number] = unread
        return by_head
