"""Hooks on a model's modules that act on the forwards of one buffer, within a block.

At the end of the block, or after an error in it, the hooks are removed and everything that was computed in the buffer
is rolled back. Forwards of other buffers are not affected, even in other threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.errors import InvalidArgumentError

Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows [n, ...], each row's index among the given slots [n]) -> rows of the same shape"""


@contextmanager
def taken_back(buffer: KVBuffer) -> Iterator[None]:
    """Roll the buffer back at the end of the block. The cost is proportional to what was touched."""
    mark = buffer.mark()
    try:
        yield
    finally:
        if buffer.holds(mark):
            buffer.rollback(mark)


@dataclass(slots=True)
class Reached:
    """Records which slots forwards computed. An intervention that reached none would look like one without effect."""

    slots: tuple[int, ...]
    met: set[int] = field(default_factory=set)

    def require(self) -> None:
        """
        Raises:
            InvalidArgumentError: no forward inside the block computed one of the slots.
        """
        missed = [slot for slot in self.slots if slot not in self.met]
        if missed:
            raise InvalidArgumentError(
                f"the intervention was never reached for slots {missed[:8]}: compute these rows inside the block"
            )


@contextmanager
def hooked(buffer: KVBuffer, hooks: Sequence[tuple[nn.Module, Callable[..., Any]]], reached: Reached) -> Iterator[None]:
    """Run forward pre-hooks (module, arguments, keyword arguments) in this buffer's forwards, then roll it back.

    Raises:
        InvalidArgumentError: the block ended before forwards had computed all slots to intervene in.
    """
    handles = []
    with taken_back(buffer):
        try:
            for module, hook in hooks:
                handles.append(module.register_forward_pre_hook(_only_for(buffer, hook), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
        reached.require()


def _only_for(buffer: KVBuffer, hook: Callable[..., Any]) -> Callable[..., Any]:
    def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return None if buffer.target is None else hook(module, args, kwargs)

    return run


def slots_in_flight(buffer: KVBuffer) -> torch.Tensor:
    """Return the slots [T] that the running forward computes."""
    assert buffer.target is not None
    slots = buffer.target.slots
    return torch.arange(slots.start, slots.stop) if isinstance(slots, slice) else slots


def rows_of(buffer: KVBuffer, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (row numbers in the running forward, their indices in `slots` [n]), both [m]."""
    flying = slots_in_flight(buffer)
    at, which = (flying[:, None] == slots[None, :]).nonzero(as_tuple=True)
    return at, which
