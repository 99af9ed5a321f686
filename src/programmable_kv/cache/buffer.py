"""KVBuffer: a preallocated transformers `Cache` that is edited in place; undoing an edit costs what it touched.

`SlotStorage` has the slots, their positions and the undo log. This module writes, moves, exchanges and splices. Layers
with a sliding window keep every token and the mask enforces the window, so tokens before the window can be edited too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from programmable_kv.cache.buffer_layer import BufferLayer, WriteTarget
from programmable_kv.cache.frequencies import tables_at
from programmable_kv.cache.history import Mark
from programmable_kv.cache.layout import KVLayout, LayerLayout, Rotated
from programmable_kv.cache.origins import Slots
from programmable_kv.cache.overwrite import Overwrite
from programmable_kv.cache.rotation import Rotation
from programmable_kv.cache.segment import Segment
from programmable_kv.cache.slot_storage import SlotStorage
from programmable_kv.cache.span import Span
from programmable_kv.errors import CacheBufferError, InvalidArgumentError

__all__ = ["KVBuffer", "Mark"]


class KVBuffer(SlotStorage):
    """Keys and values of one token sequence, all layers, with the position of every slot.

    It is a transformers `Cache`: pass it as `past_key_values` to a forward or to `generate`.
    """

    @contextmanager
    def writing(self, slots: Sequence[int], positions: Sequence[int]) -> Iterator[WriteTarget]:
        """Inside the block, the next forward writes its rows to `slots` at `positions` (both ascending).

        Slots must be in use already, or continue from the last one in use. Inside the block the forward's queries see
        the slots up to the last one written. If the block raises, lengths and positions are restored; the content of
        overwritten slots is restored only by a rollback to a mark.

        Raises:
            CacheBufferError: there are no slots, or they would leave a gap.
            FrequencyRegimeError: the forward would use other frequencies than the rows that stay.
        """
        if not len(slots):
            raise CacheBufferError("no slots to write: a forward needs at least one row")
        first, last = slots[0], slots[-1]
        contiguous = last - first + 1 == len(slots)
        used = self.length
        fresh = slots[bisect_left(slots, used) :]  # slots ascend, so the new ones are the last
        if fresh and (fresh[0] != used or fresh[-1] - used + 1 != len(fresh)):
            raise CacheBufferError(f"slots {list(fresh[:3])}... would leave a gap after the {used} slots in use")
        tables = self.require_tables(max(positions) + 1, remaining=used - (len(slots) - len(fresh)))
        self.ensure_capacity(last + 1)
        where: Slots = slice(first, last + 1) if contiguous else torch.tensor(slots)
        self._save(where)
        before, tables_before = self.length, self._tables
        old_positions, old_origins = self._positions[where].clone(), self._origins.save(where)
        self._positions[where] = torch.tensor(positions, dtype=torch.long)
        self._origins.forget(where)
        self._tables = tables
        self.target = WriteTarget(where, first, last + 1)
        try:
            yield self.target
        except BaseException:
            self._set_length(before)
            self._tables = tables_before
            self._positions[where] = old_positions
            self._origins.restore(old_origins)
            raise
        finally:
            self.target = None

    def overwrite(self, slots: Sequence[int], layers: Sequence[Overwrite]) -> None:
        """Replace keys and values of slots in use, in some layers and heads. Positions stay; a rollback undoes it.

        Raises:
            CacheBufferError: a slot is not in use or given twice, or the tensors do not fit. Nothing was written.
        """
        if not slots or len(set(slots)) != len(slots) or min(slots) < 0 or max(slots) >= self.length:
            raise CacheBufferError(
                f"slots to overwrite must be among the {self.length} in use, without repeats; got {slots[:8]}..."
            )
        for each in layers:
            if not 0 <= each.layer < len(self.layers):
                raise CacheBufferError(f"layer {each.layer} does not exist; the buffer has {len(self.layers)} layers")
            each.check(len(self.layers), self.layers[each.layer], len(slots))
        where = torch.tensor(slots)
        self._save(where)
        self._origins.forget(where)
        for each in layers:
            each.put(self.layers[each.layer], where)

    def relocate(self, start: int, stop: int, to: int, shift: int, layout: KVLayout) -> None:
        """Move slots [start, stop), which must be the buffer's tail, to slot `to`; shift their positions by `shift`.

        `layout` is one with which relocation was proved exact. Keys are rotated from the position where they were
        computed; values are copied. The caller fills (or has truncated) the slots between. Costs a pass over the moved
        tokens.

        Raises:
            CacheBufferError: [start, stop) is not the tail.
            FrequencyRegimeError: the keys were computed with other frequencies than those that relocation was proved
                with.
        """
        if stop != self.length or not 0 <= start <= stop or to < 0:
            raise CacheBufferError(
                f"only the tail of the {self.length} slots in use can be relocated, not [{start}, {stop})"
            )
        count = stop - start
        if count:
            self._require_rotation(self.tables, int(self._positions[stop - 1]) + shift + 1)
            self.ensure_capacity(to + count)
            self._save(slice(min(start, to), max(stop, to + count)))
            positions = self._positions[start:stop] + shift
            self._move(slice(start, stop), slice(to, to + count), positions, layout)
            # Unused slots in between still have the origins of freed tokens, whose segments may have been released.
            self._origins.forget(slice(stop, max(stop, to)))
            self._set_length(to + count)
        else:
            self._set_length(min(to, stop))

    def _move(self, old: Slots, new: slice, positions: torch.Tensor, layout: KVLayout) -> None:
        """Copy slots `old` to slots `new` and rotate their keys to `positions` [n]. `old` and `new` may overlap."""
        if torch.equal(positions, self._positions[old]):
            self._slide(old, new)
            return
        computed_at = self._origins.computed_at(old, self._positions[old])
        rotation = Rotation(positions - computed_at)
        self._origins.follow(layout)
        pairs = [self._tensors(layer, rule) for layer, rule in zip(self.layers, layout.layers, strict=True)]
        shapes = [rotated for rotated, _ in pairs]
        spliced = self._origins.all_from_segments(old)
        for index, ((rotated, still), rule) in enumerate(zip(pairs, layout.layers, strict=True)):
            canonical = self._origins.canonical(index, old, rotated[:, :, old])
            if not spliced:
                self._origins.keep(index, new, canonical, shapes)
            rotation.put(canonical, rule.rotation, rotated[:, :, new])
            copied = still[:, :, old]
            still[:, :, new] = copied.clone() if isinstance(old, slice) else copied
            self.meter.count(moved=(canonical.numel() + copied.numel()) * canonical.element_size())
        self._origins.move(old, new, computed_at)
        self._positions[new] = positions
        self.meter.count(relocated=positions.numel())

    def _slide(self, old: Slots, new: slice) -> None:
        """Copy slots `old` to slots `new` with unchanged positions, so no key is rotated."""
        for layer in self.layers:
            for tensor in (layer.keys, layer.values):
                copied = tensor[:, :, old]
                tensor[:, :, new] = copied.clone() if isinstance(old, slice) else copied
                self.meter.count(moved=copied.numel() * copied.element_size())
        self._origins.slide(old, new)
        positions = self._positions[old].clone()
        self._positions[new] = positions
        self.meter.count(relocated=positions.numel())

    @staticmethod
    def _tensors(layer: BufferLayer, rule: LayerLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's two cached tensors: first the one that rotates with the position, then the other."""
        assert layer.keys is not None
        assert layer.values is not None
        return (layer.keys, layer.values) if rule.rotated == "keys" else (layer.values, layer.keys)

    def exchange(self, start: int, middle: int, stop: int, layout: KVLayout, positions: Sequence[int] = ()) -> None:
        """Swap two adjacent runs of slots, [start, middle) and [middle, stop).

        The slots keep their positions unless `positions` gives one for each slot. Costs a pass over both runs. `layout`
        is one with which relocation was proved exact.

        Raises:
            CacheBufferError: the runs are not slots in use, or the positions are not one for each slot, ascending.
            FrequencyRegimeError: the keys were computed with other frequencies than those that relocation was proved
                with.
        """
        if not 0 <= start <= middle <= stop <= self.length:
            raise CacheBufferError(
                f"[{start}, {middle}) and [{middle}, {stop}) are not two adjacent runs of the {self.length} slots in use"
            )
        if middle in (start, stop):
            return
        self._require_rotation(self.tables, self.next_position)
        order, run = torch.cat((torch.arange(middle, stop), torch.arange(start, middle))), slice(start, stop)
        self._save(run)
        stand = torch.tensor(positions) if positions else self._positions[run].clone()
        before = self._positions[start - 1 : start] if start else stand[:0]
        row = torch.cat((before, stand, self._positions[stop : min(stop + 1, self.length)]))
        if len(stand) != stop - start or bool((row[1:] <= row[:-1]).any()):
            raise CacheBufferError(
                f"slots [{start}, {stop}) need one position each, ascending, between those of the slots around them; "
                f"got {list(positions[:8])}"
            )
        self._move(order, run, stand, layout)

    def insert(
        self,
        at: int,
        segment: Segment,
        layout: KVLayout,
        *,
        replacing: int = 0,
        positions: Sequence[int] = (),
        ends: int | None = None,
    ) -> None:
        """Splice a segment in at slot `at`; it replaces the `replacing` slots that start there.

        The segment takes `positions` (ascending), or if empty, those right after the slot before. What follows moves to
        the position `ends`, or if None, right after the segment. The segment's canonical keys are rotated once. The
        buffer keeps a reference to the segment, not a copy, while its tokens stand here. `layout` is one with which
        relocation was proved exact.

        Raises:
            InvalidArgumentError: `segment` is not a Segment.
            CacheBufferError: the slots are not in use, or the segment or the positions do not fit.
            FrequencyRegimeError: the segment's keys, or those in the buffer, were computed with other frequencies than
                those that relocation was proved with.
        """
        if not isinstance(segment, Segment):
            raise InvalidArgumentError(f"insert needs a Segment; got {type(segment).__name__}")
        if not 0 <= at <= at + replacing <= self.length:
            raise CacheBufferError(
                f"cannot insert at slots [{at}, {at + replacing}): the buffer has {self.length} slots in use"
            )
        if len(segment.keys) != len(self.layers):
            raise CacheBufferError(f"the segment has {len(segment.keys)} layers; the buffer has {len(self.layers)}")
        count, tail = len(segment), at + replacing
        behind = int(self._positions[at - 1]) + 1 if at else 0
        own = torch.tensor(positions, dtype=torch.long) if positions else behind + torch.arange(count)
        if len(own) != count or bool((own.diff(prepend=torch.tensor([behind - 1])) < 1).any()):
            raise CacheBufferError(
                f"cannot insert {count} tokens at {len(own)} positions from {positions[:1]} on: give one for each "
                f"token, ascending, after the previous slot's position {behind - 1}"
            )
        last = int(own[-1]) + 1 if count else behind
        ends = last if ends is None else ends
        if ends < last:
            raise CacheBufferError(
                f"the tokens after the segment cannot move to position {ends}: its last token is at {last - 1}"
            )
        shift = ends - int(self._positions[tail]) if tail < self.length else 0
        self._require_rotation(self.tables, max(self.next_position + shift, last))
        made_with = segment.tables
        if made_with is None and len(segment):
            made_with = tables_at(self.layout.frequency_rules, int(segment.computed_at.max()) + 1)
        self._require_rotation(made_with, 0)
        length = self.length + count - replacing
        self.ensure_capacity(length)
        if tail < self.length and (shift or count != replacing):
            self._save(slice(at, min(tail, at + count)))
            self.relocate(tail, self.length, at + count, shift, layout)
        else:
            self._save(slice(at, at + count))
        where = slice(at, at + count)
        rotation = Rotation(own - segment.computed_at)
        self._origins.follow(layout)
        for layer, keys, values, rule in zip(self.layers, segment.keys, segment.values, layout.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(keys, values)
            rotated, still = self._tensors(layer, rule)
            rotation.put(keys if rule.rotated == "keys" else values, rule.rotation, rotated[:, :, where])
            still[:, :, where] = values if rule.rotated == "keys" else keys
        self._positions[where] = own
        self._origins.from_segment(where, segment)
        self.meter.count(moved=segment.nbytes, relocated=count)
        self._tables = made_with if count else self._tables
        self._set_length(length)

    def segment(self, span: Span, ids: Sequence[int]) -> Segment:
        """A copy of some slots as a segment: the given token ids, the canonical keys and the values."""
        if span.stop > self.length or len(ids) != len(span):
            raise CacheBufferError(f"cannot take {len(ids)} tokens from slots [{span.start}, {span.stop})")
        slots = slice(span.start, span.stop)
        return Segment(
            tuple(ids),
            self._origins.computed_at(slots, self._positions[slots]).clone(),
            tuple(self._as_computed(index, "keys", slots) for index in range(len(self.layers))),
            tuple(self._as_computed(index, "values", slots) for index in range(len(self.layers))),
            self.tables,
        )

    def _as_computed(self, index: int, name: Rotated, slots: Slots) -> torch.Tensor:
        """A copy of a layer's keys or values in some slots, at the positions where they were computed."""
        standing = (self.keys(index) if name == "keys" else self.values(index))[:, :, slots]
        if self._origins.rotated is None or self._origins.rotated[index] != name:
            return standing.clone()
        return self._origins.canonical(index, slots, standing)

    def __deepcopy__(self, memo: dict[int, object]) -> KVBuffer:
        return self.fork()

    def fork(self) -> KVBuffer:
        """An independent buffer with a copy of the slots in use, without marks. It copies the whole context."""
        other = KVBuffer(self.layout, capacity=self.length, meter=self.meter.shared)
        other.load_tensors(self.tensors())
        return other
