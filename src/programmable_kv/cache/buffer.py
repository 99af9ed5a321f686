"""KVBuffer: a preallocated transformers `Cache` that is written in place and taken back at the cost of what was touched.

Appending costs what is appended (amortised: storage grows by doubling), truncating is O(1), and a mark with an undo
log lets an edit be tried and rolled back without cloning the context. Layers with a sliding window keep every
token; the mask enforces the window, so that an edit far behind the window is still possible.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from programmable_kv.account import Meter
from programmable_kv.cache.buffer_layer import BufferLayer, WriteTarget
from programmable_kv.cache.layout import KVLayout, LayerLayout, Rotated
from programmable_kv.cache.origins import Origins, SavedOrigins, Slots
from programmable_kv.cache.rotation import Move
from programmable_kv.cache.segment import Segment
from programmable_kv.cache.span import Span
from programmable_kv.cache.transformers_api import Cache
from programmable_kv.errors import CacheBufferError

_SMALLEST_CAPACITY = 64


@dataclass(frozen=True, slots=True, eq=False)
class Mark:
    """A state of one buffer that can be returned to. Compared by identity: no other buffer's mark passes for it."""

    length: int
    logged: int


@dataclass(frozen=True, slots=True)
class _Saved:
    """What some slots held before they were overwritten. Tensors are [B, H, n, D] per layer."""

    slots: Slots
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    positions: torch.Tensor
    origins: SavedOrigins


class KVBuffer(Cache):  # type: ignore[misc]
    """Keys and values of one token sequence, all layers, with the position of every slot.

    It is a transformers `Cache`: pass it as `past_key_values` to a forward or to `generate`.
    """

    def __init__(self, layout: KVLayout, *, capacity: int = _SMALLEST_CAPACITY, meter: Meter | None = None) -> None:
        self.layout = layout
        self.capacity = max(capacity, _SMALLEST_CAPACITY)
        self.meter = meter or Meter()
        self.target: WriteTarget | None = None
        self._positions = torch.zeros(self.capacity, dtype=torch.long)
        self._origins = Origins(self.capacity)
        self._undo: list[_Saved] = []
        self._marks: list[Mark] = []
        super().__init__(layers=[BufferLayer(self) for _ in layout.layers])

    # -- reading -----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def length(self) -> int:
        """Slots in use."""
        return int(self.layers[0].length)

    @property
    def positions(self) -> torch.Tensor:
        """[S] position of every slot in use, in slot order (strictly increasing). A view: do not write to it."""
        return self._positions[: self.length]

    @property
    def next_position(self) -> int:
        """The position that an appended token gets."""
        return int(self._positions[self.length - 1]) + 1 if self.length else 0

    def positions_until(self, slot: int) -> torch.Tensor:
        """[slot] positions of the slots before `slot`, those being written included. A view."""
        return self._positions[:slot]

    def dense_until(self, slot: int) -> bool:
        """Whether the position of every slot before `slot` equals its index (positions ascend strictly)."""
        return slot == 0 or int(self._positions[slot - 1]) == slot - 1

    @property
    def dense(self) -> bool:
        """Whether positions equal indices throughout, which transformers' own masks and `generate` assume."""
        return self.dense_until(self.length)

    @property
    def relocated(self) -> torch.Tensor:
        """Slots in use whose keys were rotated away from the position they were computed at, ascending."""
        return (self._origins.computed_at(self._used, self.positions) != self.positions).nonzero().flatten()

    @property
    def _used(self) -> slice:
        return slice(0, self.length)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values in use."""
        return self.length * self.bytes_per_token

    @property
    def bytes_per_token(self) -> int:
        return sum(
            tensor[:, :, :1].numel() * tensor.element_size()
            for layer in self.layers
            if layer.is_initialized
            for tensor in (layer.keys, layer.values)
        )

    def keys(self, layer: int) -> torch.Tensor:
        """Layer's keys in use, [B, H, S, D]; a view."""
        return self.layers[layer].keys[:, :, : self.length]  # type: ignore[no-any-return]

    def values(self, layer: int) -> torch.Tensor:
        """Layer's values in use, [B, H, S, D]; a view."""
        return self.layers[layer].values[:, :, : self.length]  # type: ignore[no-any-return]

    # -- growing and shrinking ---------------------------------------------------------------------------------

    def ensure_capacity(self, slots: int) -> None:
        """Make room for `slots` in all. Doubles, so that appending one by one copies each token O(1) times."""
        if slots <= self.capacity:
            return
        capacity = max(slots, 2 * self.capacity)
        used = self._high_water
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys = self._grown(layer.keys, used, capacity)
                layer.values = self._grown(layer.values, used, capacity)
        self._origins.grow(capacity)
        positions = torch.zeros(capacity, dtype=torch.long)
        positions[: self.capacity] = self._positions
        self._positions, self.capacity = positions, capacity

    def _grown(self, tensor: torch.Tensor, used: int, capacity: int) -> torch.Tensor:
        larger = tensor.new_empty((*tensor.shape[:2], capacity, tensor.shape[-1]))
        larger[:, :, :used] = tensor[:, :, :used]
        self.meter.bytes_moved += tensor[:, :, :used].numel() * tensor.element_size()
        return larger

    @property
    def _high_water(self) -> int:
        """Slots whose content a rollback may still need."""
        lengths: list[int] = [layer.length for layer in self.layers]
        return max(lengths + [mark.length for mark in self._marks])

    def truncate(self, length: int) -> None:
        """Forget every slot from `length` on. O(1); undone by `rollback` to an earlier mark."""
        if not 0 <= length <= self.length:
            raise CacheBufferError(f"cannot truncate {self.length} slots to {length}")
        for layer in self.layers:
            layer.length = length

    def note_append(self, start: int, tokens: int) -> None:
        """Positions of rows that transformers appends by itself (its own `generate`): they follow on."""
        if start == self.layers[0].length:
            self._save(slice(start, start + tokens))
            first = self.next_position
            self._positions[start : start + tokens] = torch.arange(first, first + tokens)
            self._origins.forget(slice(start, start + tokens))

    # -- writing -----------------------------------------------------------------------------------------------

    @contextmanager
    def writing(self, slots: Sequence[int], positions: Sequence[int]) -> Iterator[WriteTarget]:
        """Send the rows of the next forward to `slots` (ascending), which stand at `positions` (ascending).

        Slots must be in use already, or follow on from the last one in use. Inside the block the forward's queries
        see the slots up to the last one written. If it raises, the lengths are put back; content of overwritten
        slots comes back only with a rollback to a mark.
        """
        if not len(slots):
            raise CacheBufferError("there are no slots to write: a forward needs at least one row")
        first, last = slots[0], slots[-1]
        contiguous = last - first + 1 == len(slots)
        fresh = [slot for slot in slots if slot >= self.length]
        if fresh != list(range(self.length, self.length + len(fresh))):
            raise CacheBufferError(f"slots {fresh[:3]}... would leave a gap after the {self.length} in use")
        self.ensure_capacity(last + 1)
        where: Slots = slice(first, last + 1) if contiguous else torch.tensor(slots)
        self._save(where)
        before = self.length
        old_positions, old_origins = self._positions[where].clone(), self._origins.save(where)
        self._positions[where] = torch.tensor(positions, dtype=torch.long)
        self._origins.forget(where)
        self.target = WriteTarget(where, first, last + 1)
        try:
            yield self.target
        except BaseException:
            for layer in self.layers:
                layer.length = before
            self._positions[where] = old_positions
            self._origins.restore(old_origins)
            raise
        finally:
            self.target = None

    def relocate(self, start: int, stop: int, to: int, shift: int, layout: KVLayout) -> None:
        """Move slots [start, stop), which must be the buffer's tail, to slot `to`, and their positions by `shift`.

        `layout` is one with which relocation was proved exact. Keys are rotated from where they were computed, values
        are copied. The caller fills (or has truncated) what lies between. Costs a pass over the moved tokens.
        """
        if stop != self.length or not 0 <= start <= stop or to < 0:
            raise CacheBufferError(f"can only relocate the tail of {self.length} slots, not [{start}, {stop})")
        count = stop - start
        if count:
            self.ensure_capacity(to + count)
            self._save(slice(min(start, to), max(stop, to + count)))
            positions = self._positions[start:stop] + shift
            self._move(slice(start, stop), slice(to, to + count), positions, layout)
            self._set_length(to + count)
        else:
            self._set_length(min(to, stop))

    def _move(self, old: Slots, new: slice, positions: torch.Tensor, layout: KVLayout) -> None:
        """Put what stands in slots `old` into slots `new`, at `positions` [n]. The two may overlap."""
        computed_at = self._origins.computed_at(old, self._positions[old])
        move = Move(positions - computed_at)
        self._origins.follow(layout)
        pairs = [self._tensors(layer, rule) for layer, rule in zip(self.layers, layout.layers, strict=True)]
        shapes = [rotated for rotated, _ in pairs]
        spliced = self._origins.all_from_segments(old)
        for index, ((rotated, still), rule) in enumerate(zip(pairs, layout.layers, strict=True)):
            canonical = self._origins.canonical(index, old, rotated[:, :, old])
            if not spliced:
                self._origins.keep(index, new, canonical, shapes)
            move.put(canonical, rule.rotation, rotated[:, :, new])
            copied = still[:, :, old]
            still[:, :, new] = copied.clone() if isinstance(old, slice) else copied
            self.meter.bytes_moved += (canonical.numel() + copied.numel()) * canonical.element_size()
        self._origins.move(old, new, computed_at)
        self._positions[new] = positions
        self.meter.tokens_relocated += positions.numel()

    @staticmethod
    def _tensors(layer: BufferLayer, rule: LayerLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's cached tensor that turns with the position, and the other one."""
        assert layer.keys is not None
        assert layer.values is not None
        return (layer.keys, layer.values) if rule.rotated == "keys" else (layer.values, layer.keys)

    def exchange(self, start: int, middle: int, stop: int, layout: KVLayout) -> None:
        """Two adjacent runs of slots, [start, middle) and [middle, stop), change places. Positions stay with the slots.

        Costs a pass over both runs. `layout` is one with which relocation was proved exact.

        Raises:
            CacheBufferError: these are no two runs of slots in use.
        """
        if not 0 <= start <= middle <= stop <= self.length:
            raise CacheBufferError(
                f"[{start}, {middle}) and [{middle}, {stop}) are not two adjacent runs of the {self.length} slots in use"
            )
        if middle in (start, stop):
            return
        order = torch.cat((torch.arange(middle, stop), torch.arange(start, middle)))
        self._permute(slice(start, stop), order, layout)

    def reorder(self, start: int, order: Sequence[int], layout: KVLayout) -> None:
        """Permute a run of slots: slot `start + i` gets what stands in slot `order[i]`. Positions stay with the slots.

        Costs a pass over the run. `layout` is one with which relocation was proved exact.
        """
        stop = start + len(order)
        if sorted(order) != list(range(start, stop)) or not 0 <= start <= stop <= self.length:
            raise CacheBufferError(f"the order given is not one of the slots [{start}, {stop}) of {self.length}")
        self._permute(slice(start, stop), torch.tensor(order, dtype=torch.long), layout)

    def _permute(self, run: slice, order: torch.Tensor, layout: KVLayout) -> None:
        self._save(run)
        self._move(order, run, self._positions[run].clone(), layout)

    def insert(self, at: int, segment: Segment, layout: KVLayout, *, replacing: int = 0) -> None:
        """Splice a segment in before slot `at`, in the place of the `replacing` slots from there on.

        What follows moves by the difference in length, in slots and in positions. The segment's keys are rotated once, from
        the canonical; it is kept (not copied) for as long as its tokens stand here. `layout` is one with which relocation was
        proved exact.
        """
        if not 0 <= at <= at + replacing <= self.length:
            raise CacheBufferError(f"cannot insert in the place of slots [{at}, {at + replacing}) of {self.length}")
        if len(segment.keys) != len(self.layers):
            raise CacheBufferError(f"a segment of {len(segment.keys)} layers does not fit {len(self.layers)}")
        count, tail = len(segment), at + replacing
        position = int(self._positions[at - 1]) + 1 if at else 0
        length = self.length + count - replacing
        self.ensure_capacity(length)
        if tail < self.length and count != replacing:
            self._save(slice(at, min(tail, at + count)))
            self.relocate(tail, self.length, at + count, count - replacing, layout)
        else:
            self._save(slice(at, at + count))
        where = slice(at, at + count)
        positions = position + torch.arange(count)
        move = Move(positions - segment.computed_at)
        self._origins.follow(layout)
        for layer, keys, values, rule in zip(self.layers, segment.keys, segment.values, layout.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            rotated, still = self._tensors(layer, rule)
            move.put(keys if rule.rotated == "keys" else values, rule.rotation, rotated[:, :, where])
            still[:, :, where] = values if rule.rotated == "keys" else keys
        self._positions[where] = positions
        self._origins.from_segment(where, segment)
        self.meter.bytes_moved += segment.nbytes
        self.meter.tokens_relocated += count
        self._set_length(length)

    def segment(self, span: Span, ids: Sequence[int]) -> Segment:
        """A copy of some slots' keys (as they were computed) and values, with the token ids that they are of."""
        if span.stop > self.length or len(ids) != len(span):
            raise CacheBufferError(f"cannot take {len(ids)} tokens from slots [{span.start}, {span.stop})")
        slots = slice(span.start, span.stop)
        return Segment(
            tuple(ids),
            self._origins.computed_at(slots, self._positions[slots]).clone(),
            tuple(self._as_computed(index, "keys", slots) for index in range(len(self.layers))),
            tuple(self._as_computed(index, "values", slots) for index in range(len(self.layers))),
        )

    def _as_computed(self, index: int, name: Rotated, slots: Slots) -> torch.Tensor:
        """A copy of a layer's keys or values in some slots, turned back to where they were computed."""
        standing = (self.keys(index) if name == "keys" else self.values(index))[:, :, slots]
        if self._origins.rotated is None or self._origins.rotated[index] != name:
            return standing.clone()
        return self._origins.canonical(index, slots, standing)

    def _set_length(self, length: int) -> None:
        for layer in self.layers:
            layer.length = length

    # -- marks -------------------------------------------------------------------------------------------------

    def mark(self) -> Mark:
        """Remember this state. Until it is released or rolled back, overwritten rows are kept aside."""
        mark = Mark(self.length, len(self._undo))
        self._marks.append(mark)
        return mark

    def rollback(self, mark: Mark) -> None:
        """Return to a mark, dropping it and every later one. Costs what was overwritten since."""
        self._require(mark)
        while len(self._undo) > mark.logged:
            self._restore(self._undo.pop())
        self._set_length(mark.length)
        self._drop(mark)

    def release(self, mark: Mark) -> None:
        """Keep what happened since a mark, dropping it and every later one."""
        self._require(mark)
        self._drop(mark)
        if not self._marks:
            self._undo.clear()
            self._origins.release_unused(self.length)

    def holds(self, mark: Mark) -> bool:
        """Whether this mark is active: neither rolled back nor released, and this buffer's own."""
        return mark in self._marks

    def _require(self, mark: Mark) -> None:
        if not self.holds(mark):
            raise CacheBufferError("this mark is not active: it was rolled back, released, or is another buffer's")

    def _drop(self, mark: Mark) -> None:
        self._marks = self._marks[: self._marks.index(mark)]

    def _save(self, where: Slots) -> None:
        """Keep aside the rows that are about to be overwritten and that some mark still needs."""
        needed = max((mark.length for mark in self._marks), default=0)
        if isinstance(where, slice):
            where = slice(where.start, min(where.stop, needed))
            if where.start >= where.stop:
                return
        else:
            where = where[where < needed]
            if where.numel() == 0:
                return
        keys = [layer.keys[:, :, where].clone() for layer in self.layers]
        values = [layer.values[:, :, where].clone() for layer in self.layers]
        self._undo.append(_Saved(where, keys, values, self._positions[where].clone(), self._origins.save(where)))
        self.meter.bytes_moved += sum(tensor.numel() * tensor.element_size() for tensor in (*keys, *values))

    def _restore(self, saved: _Saved) -> None:
        for layer, keys, values in zip(self.layers, saved.keys, saved.values, strict=True):
            layer.keys[:, :, saved.slots] = keys
            layer.values[:, :, saved.slots] = values
            self.meter.bytes_moved += keys.numel() * keys.element_size() + values.numel() * values.element_size()
        self._positions[saved.slots] = saved.positions
        self._origins.restore(saved.origins)

    # -- copies ------------------------------------------------------------------------------------------------

    def fork(self) -> KVBuffer:
        """An independent copy of what is in use (no marks). This one does copy the context."""
        other = KVBuffer(self.layout, capacity=self.length, meter=self.meter)
        other.load_tensors(self.tensors())
        return other

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is in use, as named views: `keys.I` and `values.I` [B, H, S, D] for layer I, `positions` [S].

        If keys were relocated, also `origins` [S] and `origin_keys.I` (with MLA `origin_values.I`), so that a copy drifts no
        more than this does.
        """
        named = {"positions": self.positions}
        for index in range(len(self.layers) if self.length else 0):
            named[f"keys.{index}"] = self.keys(index)
            named[f"values.{index}"] = self.values(index)
        if self.relocated.numel():
            named["origins"] = self._origins.computed_at(self._used, self.positions)
            for index, name in enumerate(self._origins.rotated or ()):
                named[f"origin_{name}.{index}"] = self._as_computed(index, name, self._used)
        return named

    def load_tensors(self, named: dict[str, torch.Tensor]) -> None:
        """Fill an empty buffer with copies of what `tensors` gave."""
        if self.length or self._marks:
            raise CacheBufferError("tensors can only be loaded into an empty buffer")
        count = int(named["positions"].numel())
        self.ensure_capacity(count)
        self._positions[:count] = named["positions"]
        for index, layer in enumerate(self.layers if count else []):
            keys, values = named[f"keys.{index}"], named[f"values.{index}"]
            layer.lazy_initialization(keys, values)
            layer.keys[:, :, :count] = keys
            layer.values[:, :, :count] = values
        if "origins" in named:
            rotated: list[Rotated] = [
                "keys" if f"origin_keys.{index}" in named else "values" for index in range(len(self.layers))
            ]
            canonical = [named[f"origin_{name}.{index}"] for index, name in enumerate(rotated)]
            self._origins.load(named["origins"], canonical, rotated)
        self._set_length(count)
        self.meter.bytes_moved += self.nbytes
