"""Slots: the storage under a `KVBuffer`. Tensors that grow by steps, each slot's position, and an undo log.

The cost of appending is proportional to the tokens appended (amortised), and truncating is O(1). A mark and the undo log
make it possible to try an edit and roll it back without cloning the context.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from programmable_kv.account import BufferMeter, Meter
from programmable_kv.cache.buffer_layer import BufferLayer, WriteTarget
from programmable_kv.cache.copies import fill, named_tensors
from programmable_kv.cache.frequencies import Tables, require_first, require_same, tables_at
from programmable_kv.cache.history import History, Mark, SavedRows
from programmable_kv.cache.layout import KVLayout
from programmable_kv.cache.origins import Origins, Slots
from programmable_kv.cache.transformers_api import Cache
from programmable_kv.errors import CacheBufferError

SMALLEST_CAPACITY = 64
_LARGEST_STEP = 8192
"""slots"""


class SlotStorage(Cache):  # type: ignore[misc]
    """Keys and values of one token sequence in slots, all layers. `KVBuffer` adds writing, moving and splicing."""

    def __init__(self, layout: KVLayout, *, capacity: int = SMALLEST_CAPACITY, meter: Meter | None = None) -> None:
        self.layout = layout
        self.capacity = max(capacity, SMALLEST_CAPACITY)
        self.meter = BufferMeter(meter)
        """the work done on this buffer, in any thread; also counted in the meter passed as `meter`"""
        self.target: WriteTarget | None = None
        self._positions = torch.zeros(self.capacity, dtype=torch.long)
        self._origins = Origins(self.capacity)
        self._history = History()
        self._tables: Tables | None = None
        self.foreign_from: int | None = None
        """the first slot that transformers wrote by itself, or None; the owner resets it after handling those slots"""
        super().__init__(layers=[BufferLayer(self) for _ in layout.layers])

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def length(self) -> int:
        """The number of slots in use."""
        return int(self.layers[0].length)

    @property
    def positions(self) -> torch.Tensor:
        """The position of every slot in use, [S], in slot order (strictly increasing). A view: do not write to it."""
        return self._positions[: self.length]

    @property
    def next_position(self) -> int:
        """The position that an appended token gets."""
        return int(self._positions[self.length - 1]) + 1 if self.length else 0

    def positions_until(self, slot: int) -> torch.Tensor:
        """The positions of the slots before `slot`, [slot], including slots that are being written. A view."""
        return self._positions[:slot]

    def dense_until(self, slot: int) -> bool:
        """Whether the position of every slot before `slot` equals its index, that is, whether there are no holes."""
        return slot == 0 or int(self._positions[slot - 1]) == slot - 1

    @property
    def dense(self) -> bool:
        """Whether every position equals its slot index, which transformers' own masks and `generate` assume."""
        return self.dense_until(self.length)

    @property
    def relocated(self) -> torch.Tensor:
        """The slots in use whose keys stand at another position than the one they were computed at, ascending."""
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
        """The keys in use of a layer, [B, H, S, D]; a view."""
        return self.layers[layer].keys[:, :, : self.length]  # type: ignore[no-any-return]

    def values(self, layer: int) -> torch.Tensor:
        """The values in use of a layer, [B, H, S, D]; a view."""
        return self.layers[layer].values[:, :, : self.length]  # type: ignore[no-any-return]

    def copied(self, slots: Sequence[int]) -> list[torch.Tensor]:
        """Copies of the keys and values of some slots, [B, H, n, D] each: for each layer its keys, then its values."""
        where = torch.tensor(list(slots), dtype=torch.long, device=self.keys(0).device)
        return [cached(layer)[:, :, where] for layer in range(len(self)) for cached in (self.keys, self.values)]

    @property
    def tables(self) -> Tables | None:
        """The frequency tables that the rows in use were computed with (`FrequencyRule.table`); None without rows."""
        return self._tables if self.length else None

    @property
    def fits_its_length(self) -> bool:
        """Whether a full forward over these positions would use the tables that the rows were computed with.

        False if a long context was cut and the model has other frequencies for the shorter length: the rows agree with
        each other, but not with a new prefill.
        """
        return not self.length or self._tables == tables_at(self.layout.frequency_rules, self.next_position)

    def require_tables(self, length: int, *, remaining: int) -> Tables:
        """The tables of a forward that reaches `length` positions while `remaining` cached rows stay unchanged.

        Raises:
            FrequencyRegimeError: the remaining rows were computed with other tables.
        """
        cached = self._tables if remaining else None
        return require_same(self.layout.frequency_rules, length, cached, self.layout.model_type)

    def _require_rotation(self, tables: Tables | None, reach: int) -> None:
        """
        Raises:
            FrequencyRegimeError: keys computed with these tables, or with those of `reach` positions, cannot be
                rotated.
        """
        rules = self.layout.frequency_rules
        for each in (tables, tables_at(rules, reach)):
            require_first(rules, each, self.layout.model_type)

    def ensure_capacity(self, slots: int) -> None:
        """Grow the storage to at least `slots` slots in total.

        The capacity doubles, so that appending one by one copies each token O(1) times. A step is at most 8192 slots,
        because twice the memory of a long context does not fit many devices. Computing 8192 tokens takes far longer
        than the copy.
        """
        if slots <= self.capacity:
            return
        capacity = max(slots, self.capacity + min(self.capacity, _LARGEST_STEP))
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
        self.meter.count(moved=tensor[:, :, :used].numel() * tensor.element_size())
        return larger

    @property
    def _high_water(self) -> int:
        """The number of slots whose content is in use or may be restored by a rollback."""
        lengths: list[int] = [layer.length for layer in self.layers]
        return max(*lengths, self._history.needed)

    def truncate(self, length: int) -> None:
        """Drop every slot from `length` on, in O(1). A `rollback` to an earlier mark undoes it."""
        if not isinstance(length, int) or not 0 <= length <= self.length:
            raise CacheBufferError(f"cannot truncate {self.length} slots to {length!r}: give a number of slots to keep")
        self._set_length(length)

    def note_append(self, start: int, tokens: int) -> None:
        """Set the positions of rows that transformers appends by itself (its own `generate`): they follow the last one.

        Raises:
            CacheBufferError: there are free positions; transformers uses a row's index as its position.
        """
        if start == self.layers[0].length:
            if not self.dense:
                raise CacheBufferError(
                    "transformers would append at wrong positions: it uses a row's index as its position, and this "
                    "cache keeps some positions free. Use the notebook's own generate, decide and add."
                )
            self.foreign_from = start if self.foreign_from is None else min(start, self.foreign_from)
            first = self.next_position
            tables = self.require_tables(first + tokens, remaining=self.length)
            self._save(slice(start, start + tokens))
            self._tables = tables
            self._positions[start : start + tokens] = torch.arange(first, first + tokens)
            self._origins.forget(slice(start, start + tokens))

    def _set_length(self, length: int) -> None:
        for layer in self.layers:
            layer.length = length

    def mark(self) -> Mark:
        """Mark this state. Until the mark is released or rolled back, overwritten rows are saved."""
        return self._history.mark(self.length, self.tables, self.foreign_from)

    def rollback(self, mark: Mark) -> None:
        """Restore the state at a mark; drop it and every later mark. The cost is that of the rows overwritten since."""
        self._history.require(mark)
        for rows in self._history.since(mark):
            self._restore(rows)
        self._set_length(mark.length)
        self._tables, self.foreign_from = mark.tables, mark.foreign_from
        self._drop(mark)

    def release(self, mark: Mark) -> None:
        """Keep the changes since a mark; drop it and every later mark."""
        self._history.require(mark)
        self._drop(mark)

    def holds(self, mark: Mark) -> bool:
        """Whether a mark is active: it belongs to this buffer and was neither rolled back nor released."""
        return self._history.holds(mark)

    def _drop(self, mark: Mark) -> None:
        self._history.drop(mark)
        if not self._history:
            self._origins.release_unused(self.length)

    def _save(self, where: Slots) -> None:
        """Save the rows that are about to be overwritten and that an active mark needs."""
        needed = self._history.needed_of(where)
        if needed is None:
            return
        keys = [layer.keys[:, :, needed].clone() for layer in self.layers]
        values = [layer.values[:, :, needed].clone() for layer in self.layers]
        rows = SavedRows(needed, keys, values, self._positions[needed].clone(), self._origins.save(needed))
        self._history.keep(rows)
        self.meter.count(moved=rows.nbytes)

    def _restore(self, rows: SavedRows) -> None:
        for layer, keys, values in zip(self.layers, rows.keys, rows.values, strict=True):
            layer.keys[:, :, rows.slots], layer.values[:, :, rows.slots] = keys, values
        self._positions[rows.slots] = rows.positions
        self._origins.restore(rows.origins)
        self.meter.count(moved=rows.nbytes)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything in use, as named views: see `copies.named_tensors`."""
        return named_tensors(self)

    def load_tensors(self, named: dict[str, torch.Tensor]) -> None:
        """Fill an empty buffer with copies of the tensors that `tensors` returned.

        Raises:
            CacheBufferError: the buffer is not empty, or these are not the tensors of a buffer of this model.
        """
        fill(self, named)
