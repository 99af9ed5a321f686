"""Export of a buffer as named tensors, for copying and saving, and import. Both use private parts of `SlotStorage`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from programmable_kv.cache.layout import Rotated
from programmable_kv.errors import CacheBufferError

if TYPE_CHECKING:
    from programmable_kv.cache.slot_storage import SlotStorage


def named_tensors(buffer: SlotStorage) -> dict[str, torch.Tensor]:
    """Everything in use, as named views: `keys.I` and `values.I` [B, H, S, D] for layer I, `positions` [S].

    If the model's frequencies depend on the length, also `frequencies`: the tables that the rows were computed with. If
    keys were relocated, also copies: `origins` [S], the positions where they were computed, and `origin_keys.I` (with
    MLA `origin_values.I`), the canonical keys. With these a copy of the buffer drifts no more than the buffer itself.
    """
    named = {"positions": buffer.positions}
    if buffer.tables:
        named["frequencies"] = torch.tensor(buffer.tables)
    for index in range(len(buffer) if buffer.length else 0):
        named[f"keys.{index}"] = buffer.keys(index)
        named[f"values.{index}"] = buffer.values(index)
    if buffer.relocated.numel():
        used = slice(0, buffer.length)
        named["origins"] = buffer._origins.computed_at(used, buffer.positions)
        for index, name in enumerate(buffer._origins.rotated or ()):
            named[f"origin_{name}.{index}"] = buffer._as_computed(index, name, used)
    return named


def fill(buffer: SlotStorage, named: Mapping[str, torch.Tensor]) -> None:
    """Fill an empty buffer with copies of named tensors.

    Raises:
        CacheBufferError: the buffer is not empty, or the tensors are not those of a buffer of this model.
    """
    if buffer.length or buffer._history:
        raise CacheBufferError("tensors can only be loaded into an empty buffer")
    count = _count(buffer, named)
    rules = buffer.layout.frequency_rules
    if count and rules and ("frequencies" not in named or named["frequencies"].numel() != len(rules)):
        raise CacheBufferError(
            "these tensors do not say which frequencies they were computed with, and this model has several "
            f"({rules[0].name}). Recompute the context."
        )
    buffer.ensure_capacity(count)
    buffer._tables = tuple(named["frequencies"].tolist()) if count and rules else ()
    buffer._positions[:count] = named["positions"]
    for index, layer in enumerate(buffer.layers if count else []):
        keys, values = named[f"keys.{index}"], named[f"values.{index}"]
        layer.lazy_initialization(keys, values)
        layer.keys[:, :, :count], layer.values[:, :, :count] = keys, values
    if "origins" in named:
        rotated: list[Rotated] = [
            "keys" if f"origin_keys.{index}" in named else "values" for index in range(len(buffer.layers))
        ]
        canonical = [named[f"origin_{name}.{index}"] for index, name in enumerate(rotated)]
        buffer._origins.load(named["origins"], canonical, rotated)
    buffer._set_length(count)
    buffer.meter.count(moved=buffer.nbytes)


def _count(buffer: SlotStorage, named: Mapping[str, torch.Tensor]) -> int:
    """The number of rows in the tensors.

    Raises:
        CacheBufferError: a tensor is missing, or has another number of rows.
    """
    if "positions" not in named or named["positions"].ndim != 1:
        raise CacheBufferError(
            f"these are not a buffer's tensors: there is no `positions` [S] among {sorted(named)[:5]}"
        )
    count = int(named["positions"].numel())
    for index in range(len(buffer) if count else 0):
        for name in (f"keys.{index}", f"values.{index}"):
            shape = tuple(named[name].shape) if name in named else None
            if shape is None or len(shape) != 4 or shape[0] != 1 or shape[2] != count:
                found = "missing" if shape is None else f"of shape {list(shape)}"
                raise CacheBufferError(
                    f"{name} is {found}; expected [1, H, {count}, D] in each of {len(buffer)} layers"
                )
    return count
