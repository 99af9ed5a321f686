"""One layer of a `KVBuffer`, with transformers' cache layer API: `update` writes rows in place and returns views."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from programmable_kv.cache.origins import Slots
from programmable_kv.cache.transformers_api import CacheLayerMixin
from programmable_kv.errors import CacheBufferError

if TYPE_CHECKING:
    from programmable_kv.cache.slot_storage import SlotStorage


@dataclass(frozen=True, slots=True)
class WriteTarget:
    """Where the next forward writes, and how many slots its queries see."""

    slots: Slots
    first: int
    visible: int


class BufferLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values, [B, H, capacity, D]; the first `length` slots are in use."""

    is_sliding = False
    is_croppable = True

    def __init__(self, owner: SlotStorage) -> None:
        super().__init__()
        # The buffer refers to its layers. The reference back is weak, so that the memory is freed as soon as the last
        # reference to the buffer goes away. The garbage collector would wait long: it counts objects, not their bytes.
        self._weak_owner = weakref.ref(owner)
        self.length = 0

    @property
    def _owner(self) -> SlotStorage:
        owner = self._weak_owner()
        if owner is None:
            raise CacheBufferError(
                "the KVBuffer of this layer no longer exists: keep a reference to the buffer, not only to its layers"
            )
        return owner

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        capacity = self._owner.capacity
        self.keys = key_states.new_empty((*key_states.shape[:2], capacity, key_states.shape[-1]))
        self.values = value_states.new_empty((*value_states.shape[:2], capacity, value_states.shape[-1]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write T new rows [B, H, T, D] in place; returns views of every visible slot, [B, H, S, D].

        Raises:
            CacheBufferError: B is not 1.
            FrequencyRegimeError: transformers appends across a length at which the model's frequencies change.
        """
        if key_states.shape[0] != 1:
            raise CacheBufferError(
                f"a KVBuffer holds one sequence, and this forward has a batch of {key_states.shape[0]}. Run the sequences one "
                "by one, each on a fork; with `generate`, use num_beams=1 and num_return_sequences=1."
            )
        tokens = key_states.shape[-2]
        target = self._owner.target
        if target is None:
            self._owner.ensure_capacity(self.length + tokens)
            target = WriteTarget(slice(self.length, self.length + tokens), self.length, self.length + tokens)
            self._owner.note_append(self.length, tokens)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, target.slots] = key_states
        self.values[:, :, target.slots] = value_states
        self.length = max(self.length, target.visible)
        return self.keys[:, :, : target.visible], self.values[:, :, : target.visible]

    def get_seq_length(self) -> int:
        """The number of slots before the first row being written: transformers' past length."""
        target = self._owner.target
        return self.length if target is None else target.first

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        target = self._owner.target
        return (self.length + query_length if target is None else target.visible), 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end; as in transformers, their number is given as a negative integer."""
        if tokens_to_remove > 0:
            raise CacheBufferError(
                f"crop needs the number of tokens to remove as a negative number; got {tokens_to_remove}"
            )
        self.length = max(0, self.length + tokens_to_remove)

    def reset(self) -> None:
        self.length = 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise CacheBufferError(
            "a KVBuffer holds one sequence, and beam search needs several. Use num_beams=1 (greedy or sampling)."
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise CacheBufferError("a KVBuffer holds one sequence and cannot be repeated. Fork the notebook instead.")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        raise CacheBufferError("a KVBuffer holds one sequence and cannot be re-batched. Fork the notebook instead.")
