"""How far the keys and values of later tokens move when a field's value changes, which shows where it is noted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from programmable_kv.edits.modes import Mode
from programmable_kv.edits.plan import Plan, Shift, Truncate
from programmable_kv.prompt.fields import Value

if TYPE_CHECKING:
    from programmable_kv.notebook.notebook import Notebook


def movement(notebook: Notebook, name: str, value: Value) -> torch.Tensor:
    """[S] for each slot of the context, how far its keys and values move, relative to their size; 0 up to the field.

    The measure is the squared distance over the squared size, averaged over layers, keys and values. Every token after
    the field moves a little, because it reads tokens that move: only the order of the tokens is informative. The
    field's own tokens count as unmoved. In tokens that were stale before, the movement includes what makes them stale.
    The notebook is unchanged afterwards. The cost is one recomputation of everything after the field's first place.

    Raises:
        UnverifiedError: the value's token length changes and this model's keys cannot be relocated.
        UnknownFieldError, InvalidValueError, InvalidEditError, ContextOverflowError: as in `edit`.
    """
    plan = notebook.plan.edit({name: value}, mode=Mode.IN_PLACE)
    moved = torch.zeros(len(notebook), dtype=torch.float64)
    first = min((span.stop for span in notebook.spans(name)), default=len(notebook))
    pairs = [(old, new) for old, new in _kept(plan) if old >= first]
    if not pairs:
        return moved
    slots = [new for _, new in pairs]
    mark = notebook.mark()
    try:
        notebook.edit({name: value}, mode=Mode.IN_PLACE)
        stale = notebook.cache.copied(slots)
        notebook.recompute(min(slots))
        moved[[old for old, _ in pairs]] = _distance(stale, notebook.cache.copied(slots))
    finally:
        notebook.rollback(mark)
    return moved


def _kept(plan: Plan) -> Iterator[tuple[int, int]]:
    """(slot before, slot after) of every token that a plan keeps, in order."""
    slots: list[int | None] = list(range(plan.before))
    for step in plan.steps:
        if isinstance(step, Truncate):
            del slots[step.length :]
        elif isinstance(step, Shift):
            slots[min(step.start, step.to) : step.start] = [None] * (step.to - step.start)
    computed = {slot for compute in plan.compute for slot in compute.span.range}
    return ((old, new) for new, old in enumerate(slots) if old is not None and new not in computed)


def _distance(stale: list[torch.Tensor], true: list[torch.Tensor]) -> torch.Tensor:
    """[n] the squared distance of each slot relative to its squared size, averaged over the tensors."""
    shares = []
    for before, after in zip(stale, true, strict=True):
        off, size = (tensor.cpu().double().pow(2).sum(dim=(0, 1, 3)) for tensor in (after - before, after))
        shares.append(off / size.clamp(min=torch.finfo(torch.float64).tiny))
    return torch.stack(shares).mean(dim=0)
