"""The origins of relocated keys, so that every relocation starts from the key as it was computed.

(With MLA, "keys" here means the rotary keys, which are cached as values next to a latent that does not rotate.)

Relocating a key rounds it once. Relocating the result again would round it twice, and so on: keys that move with every
edit would drift. Therefore each moved slot records the position where its key was computed, and where the unrotated key
is stored: as a copy in this store, or in the `Segment` that it was spliced from, which needs no copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from programmable_kv.cache.layout import KVLayout, Rotated
from programmable_kv.cache.segment import Segment

_NONE = -1

Slots = slice | torch.Tensor


@dataclass(frozen=True, slots=True)
class SavedOrigins:
    """The entries of an `Origins` for some slots, saved to be restored."""

    slots: Slots
    positions: torch.Tensor
    sources: torch.Tensor
    rows: torch.Tensor
    keys: list[torch.Tensor] | None


class Origins:
    """For each slot: the position where its key was computed (-1: its current one), and where that key is stored."""

    def __init__(self, capacity: int) -> None:
        self._positions = torch.full((capacity,), _NONE, dtype=torch.long)
        self._sources = torch.full((capacity,), _NONE, dtype=torch.long)
        self._rows = torch.zeros(capacity, dtype=torch.long)
        self._segments: list[Segment | None] = []
        self.rotated: tuple[Rotated, ...] | None = None
        """for each layer, the cached tensor that rotates; None until something is moved"""
        self._keys: list[torch.Tensor] | None = None
        """canonical keys [B, H, capacity, D] of each layer, for moved slots that do not come from a segment"""

    def follow(self, layout: KVLayout) -> None:
        """Take from this layout which cached tensor rotates in each layer."""
        self.rotated = tuple(layer.rotated for layer in layout.layers)

    def all_from_segments(self, slots: Slots) -> bool:
        """Whether the canonical keys of all these slots are stored in segments."""
        return bool((self._sources[slots] != _NONE).all())

    def moved(self, slots: Slots) -> torch.Tensor:
        """[n] booleans: whether the position where the key was computed is recorded here, for each of the slots."""
        return self._positions[slots] != _NONE

    def computed_at(self, slots: Slots, standing_at: torch.Tensor) -> torch.Tensor:
        """The positions [n] where the keys of some slots were computed; they now stand at `standing_at` [n]."""
        return torch.where(self._positions[slots] == _NONE, standing_at, self._positions[slots])

    def grow(self, capacity: int) -> None:
        self._positions = _grown(self._positions, 0, capacity, _NONE)
        self._sources = _grown(self._sources, 0, capacity, _NONE)
        self._rows = _grown(self._rows, 0, capacity, 0)
        if self._keys is not None:
            self._keys = [_grown(tensor, 2, capacity, 0) for tensor in self._keys]

    def forget(self, slots: Slots) -> None:
        """Drop the records of these slots: their keys count as computed at their current positions."""
        self._positions[slots] = _NONE
        self._sources[slots] = _NONE

    def canonical(self, layer: int, slots: Slots, standing: torch.Tensor) -> torch.Tensor:
        """A layer's canonical keys in some slots, [B, H, n, D]: new tensors.

        `standing` [B, H, n, D] are the keys in the buffer, which are canonical for slots that were not moved.
        """
        keys = standing.clone()
        sources, rows = self._sources[slots], self._rows[slots]
        own = self.moved(slots) & (sources == _NONE)
        if bool(own.any()):
            assert self._keys is not None
            keys[:, :, own] = self._keys[layer][:, :, slots][:, :, own]
        for source in set(sources.tolist()) - {_NONE} if bool((sources != _NONE).any()) else ():
            segment, held = self._segments[source], sources == source
            assert segment is not None
            assert self.rotated is not None
            keys[:, :, held] = segment.tensors(self.rotated[layer])[layer][:, :, rows[held]]
        return keys

    def keep(self, layer: int, slots: Slots, canonical: torch.Tensor, layers: Sequence[torch.Tensor]) -> None:
        """Store a layer's canonical keys [B, H, n, D] for `slots`. `layers` gives the shape of every layer's keys."""
        if self._keys is None:
            capacity = self._positions.numel()
            self._keys = [tensor.new_empty((*tensor.shape[:2], capacity, tensor.shape[-1])) for tensor in layers]
        self._keys[layer][:, :, slots] = canonical

    def move(self, old: Slots, new: Slots, computed_at: torch.Tensor) -> None:
        """Record that the keys of slots `old`, computed at `computed_at` [n], now stand in slots `new`."""
        sources, rows = self._sources[old].clone(), self._rows[old].clone()
        self._positions[new], self._sources[new], self._rows[new] = computed_at, sources, rows

    def slide(self, old: Slots, new: Slots) -> None:
        """Record that the keys of slots `old` now stand in slots `new`, at unchanged positions."""
        if self._keys is not None and bool((self.moved(old) & (self._sources[old] == _NONE)).any()):
            for tensor in self._keys:
                tensor[:, :, new] = tensor[:, :, old].clone()
        for each in (self._positions, self._sources, self._rows):
            each[new] = each[old].clone()

    def from_segment(self, slots: slice, segment: Segment) -> None:
        """Record that the keys in these slots are a segment's, rotated. Keeps a reference to the segment, no copy."""
        source = next((i for i, known in enumerate(self._segments) if known is segment), None)
        if source is None:
            # No slot refers to an entry whose segment was released, so the entry can be reused.
            source = next((i for i, known in enumerate(self._segments) if known is None), len(self._segments))
            self._segments[source : source + 1] = [segment]
        self._positions[slots] = segment.computed_at
        self._sources[slots] = source
        self._rows[slots] = torch.arange(len(segment))

    def release_unused(self, length: int) -> None:
        """Drop the records of the slots from `length` on, and release the segments that no other slot comes from."""
        self.forget(slice(length, None))
        used = set(torch.unique(self._sources[:length]).tolist()) if self._segments else set()
        self._segments = [segment if i in used else None for i, segment in enumerate(self._segments)]

    def save(self, slots: Slots) -> SavedOrigins:
        keys = None
        if self._keys is not None and bool(self.moved(slots).any()):
            keys = [tensor[:, :, slots].clone() for tensor in self._keys]
        return SavedOrigins(
            slots, self._positions[slots].clone(), self._sources[slots].clone(), self._rows[slots].clone(), keys
        )

    def restore(self, saved: SavedOrigins) -> None:
        self._positions[saved.slots], self._sources[saved.slots] = saved.positions, saved.sources
        self._rows[saved.slots] = saved.rows
        if saved.keys is not None:
            assert self._keys is not None
            for tensor, keys in zip(self._keys, saved.keys, strict=True):
                tensor[:, :, saved.slots] = keys

    def load(self, positions: torch.Tensor, keys: Sequence[torch.Tensor], rotated: Sequence[Rotated]) -> None:
        """Set the origins of the first slots from copies of `positions` [n] and canonical `keys`."""
        self.rotated = tuple(rotated)
        count = positions.numel()
        self._positions[:count] = positions
        for layer, tensor in enumerate(keys):
            self.keep(layer, slice(0, count), tensor, keys)


def _grown(tensor: torch.Tensor, dim: int, capacity: int, fill: int) -> torch.Tensor:
    shape = list(tensor.shape)
    used, shape[dim] = shape[dim], capacity
    larger = tensor.new_full(shape, fill) if tensor.dtype == torch.long else tensor.new_empty(shape)
    larger.narrow(dim, 0, used).copy_(tensor)
    return larger
