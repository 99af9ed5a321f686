"""Interventions on the cache itself: patch keys and values from another context, swap, inject or ablate them.

Interventions are by layer, KV head and slot. Only the touched rows are copied; they are restored at the end of the
block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.layout import KVLayout
from programmable_kv.cache.overwrite import Overwrite
from programmable_kv.cache.rotation import Rotation
from programmable_kv.engine import Engine
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.lab.tools.hooks import taken_back


@dataclass(frozen=True, slots=True)
class Which:
    """Selects tensors of a cache: layers and KV heads (None: all), and keys, values or both."""

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    keys: bool = True
    values: bool = True

    def of(self, buffer: KVBuffer) -> tuple[int, ...]:
        """Return the selected layers' numbers."""
        return tuple(range(len(buffer))) if self.layers is None else self.layers


EVERYTHING = Which()


@contextmanager
def injected(buffer: KVBuffer, slots: Sequence[int], rows: Sequence[Overwrite]) -> Iterator[None]:
    """Overwrite these slots with other keys and values inside the block. Rows computed inside are rolled back too.

    Raises:
        CacheBufferError: a slot is not in use, or the tensors do not fit.
    """
    with taken_back(buffer):
        buffer.overwrite(slots, rows)
        yield


@contextmanager
def patched(
    buffer: KVBuffer,
    source: KVBuffer,
    slots: Sequence[int],
    which: Which = EVERYTHING,
    *,
    from_slots: Sequence[int] | None = None,
    layout: KVLayout | None = None,
) -> Iterator[None]:
    """Inside the block, copy these slots' keys and values from another buffer of the same model.

    Args:
        from_slots: the source's slots; None: the same slots.
        layout: needed where positions differ, to rotate keys; one with which relocation was proved exact
            (`engine.require_relocation()`).

    Raises:
        InvalidArgumentError: positions differ and there is no layout, or a slot is not in use.
    """
    rows = rows_from(source, slots if from_slots is None else from_slots, which)
    rows = _moved(rows, source, slots if from_slots is None else from_slots, buffer, slots, layout)
    with injected(buffer, slots, rows):
        yield


@contextmanager
def swapped(
    buffer: KVBuffer,
    first: Sequence[int],
    second: Sequence[int],
    which: Which = EVERYTHING,
    *,
    layout: KVLayout | None = None,
) -> Iterator[None]:
    """Exchange keys and values of two equally long sets of slots inside the block. Keys are rotated as in `patched`.

    Raises:
        InvalidArgumentError: the slots' positions differ and there is no layout.
    """
    both, other = [*first, *second], [*second, *first]
    with patched(buffer, buffer, both, which, from_slots=other, layout=layout):
        yield


@contextmanager
def mean_ablated(
    buffer: KVBuffer, sources: Sequence[KVBuffer], slots: Sequence[int], which: Which = EVERYTHING
) -> Iterator[None]:
    """Inside the block, set these slots' keys and values to their mean over several buffers, at the same positions.

    Raises:
        InvalidArgumentError: there are no buffers, or a slot has another position in one of them.
    """
    if not sources:
        raise InvalidArgumentError("a mean ablation needs at least one buffer to average")
    each = [_moved(rows_from(source, slots, which), source, slots, buffer, slots, None) for source in sources]
    rows = [
        Overwrite(same[0].layer, _mean([row.keys for row in same]), _mean([row.values for row in same]), which.heads)
        for same in zip(*each, strict=True)
    ]
    with injected(buffer, slots, rows):
        yield


def rows_from(source: KVBuffer, slots: Sequence[int], which: Which = EVERYTHING) -> list[Overwrite]:
    """Return copies of a buffer's keys and values in some slots, by layer."""
    where = torch.tensor(list(slots))
    if not where.numel() or int(where.min()) < 0 or int(where.max()) >= source.length:
        raise InvalidArgumentError(f"slots {list(slots)[:8]}... are not among the {source.length} in use of the source")
    rows = []
    for layer in which.of(source):
        keys = source.keys(layer)[:, :, where] if which.keys else None
        values = source.values(layer)[:, :, where] if which.values else None
        if which.heads is not None:
            keys, values = (None if t is None else t[:, list(which.heads)] for t in (keys, values))
        rows.append(Overwrite(layer, keys, values, which.heads))
    return rows


def moved_rows(
    engine: Engine, source: KVBuffer, from_slots: Sequence[int], buffer: KVBuffer, slots: Sequence[int]
) -> list[Overwrite]:
    """Return copies of a buffer's keys and values, relocated to the positions of another buffer's slots.

    Raises:
        InvalidArgumentError: a slot is not in use, or the numbers of slots differ.
        UnsupportedModelError: positions differ, and keys of this model cannot be rotated exactly.
    """
    layout = None
    if bool((buffer.positions[list(slots)] - source.positions[list(from_slots)]).any()):
        layout = engine.require_relocation()
    return _moved(rows_from(source, from_slots), source, from_slots, buffer, slots, layout)


def _mean(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    held = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(held).mean(dim=0) if held else None


def _moved(
    rows: list[Overwrite],
    source: KVBuffer,
    from_slots: Sequence[int],
    buffer: KVBuffer,
    slots: Sequence[int],
    layout: KVLayout | None,
) -> list[Overwrite]:
    """Return the rows with keys rotated to the positions of the slots into which they are put."""
    if len(from_slots) != len(slots):
        raise InvalidArgumentError(f"cannot put {len(from_slots)} slots into {len(slots)}")
    if not slots or max(slots) >= buffer.length:
        raise InvalidArgumentError(f"slots {list(slots)[:8]}... are not among the {buffer.length} in use")
    offsets = buffer.positions[list(slots)] - source.positions[list(from_slots)]
    if not bool(offsets.any()):
        return rows
    if layout is None:
        raise InvalidArgumentError(
            "these rows would move to other positions than those they were computed at: pass "
            "layout=engine.require_relocation()"
        )
    rotation = Rotation(offsets)
    result = []
    for row in rows:
        rule = layout.layers[row.layer]
        pair = {"keys": row.keys, "values": row.values}
        turned = pair[rule.rotated]
        if turned is not None:
            rotation.put(turned, rule.rotation, standing := torch.empty_like(turned))
            pair[rule.rotated] = standing
        result.append(Overwrite(row.layer, pair["keys"], pair["values"], row.heads))
    return result
