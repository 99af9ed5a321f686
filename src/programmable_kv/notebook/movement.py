"""How far the keys and values of later tokens move when a field takes another value: where its value has been noted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.span import Span
from programmable_kv.edits.modes import Mode
from programmable_kv.prompt.fields import Value

if TYPE_CHECKING:
    from programmable_kv.notebook.notebook import Notebook


def movement(notebook: Notebook, name: str, value: Value) -> torch.Tensor:
    """[S] for each slot of the context, how far its keys and values move, relative to their size; 0 up to the field.

    The squared distance over the squared size, averaged over layers, keys and values. Every token after the field moves a
    little, because it reads what does: only the order says something. The field's own places count as unmoved, and tokens
    that were computed on another text than the present one count as moved by that, too. The notebook is unchanged afterwards.
    It costs one recomputation of what follows the field's first place.

    Raises:
        UnverifiedError: the value's token length changes and this model's keys cannot be relocated.
        UnknownFieldError, InvalidValueError, InvalidEditError, ContextOverflowError: as `edit`.
    """
    before = _between(notebook, name)
    moved = torch.zeros(len(notebook), dtype=torch.float64)
    mark = notebook.mark()
    try:
        notebook.edit({name: value}, mode=Mode.IN_PLACE)
        after = _between(notebook, name)
        # Beside a place a token may have become part of another: the stretches end alike, so they are matched from there.
        pairs = [
            (old, new)
            for was, now in zip(before, after, strict=True)
            for old, new in zip(reversed(was.range), reversed(now.range), strict=False)
        ]
        if pairs:
            slots = torch.tensor([new for _, new in pairs])
            stale = _rows(notebook.cache, slots)
            notebook.recompute(after[0].start)
            moved[[old for old, _ in pairs]] = _distance(stale, _rows(notebook.cache, slots))
    finally:
        notebook.rollback(mark)
    return moved


def _between(notebook: Notebook, name: str) -> list[Span]:
    """The slots behind each of a field's places, up to the next one or the end."""
    places = notebook.spans(name)
    ends = [*(place.start for place in places[1:]), len(notebook)]
    return [Span(place.stop, max(place.stop, end)) for place, end in zip(places, ends, strict=True)]


def _rows(buffer: KVBuffer, slots: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values of some slots, [B, H, n, D] each, copied."""
    slots = slots.to(buffer.keys(0).device)
    return [cached(layer)[:, :, slots] for layer in range(len(buffer)) for cached in (buffer.keys, buffer.values)]


def _distance(stale: list[torch.Tensor], true: list[torch.Tensor]) -> torch.Tensor:
    """[n] the relative squared distance of each slot, averaged over the tensors."""
    shares = []
    for before, after in zip(stale, true, strict=True):
        off, size = (tensor.cpu().double().pow(2).sum(dim=(0, 1, 3)) for tensor in (after - before, after))
        shares.append(off / size.clamp(min=torch.finfo(torch.float64).tiny))
    return torch.stack(shares).mean(dim=0)
