"""Sites of a forward where activations of slots are read and changed: residual stream, heads, attention outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.modules import DecoderModules
from programmable_kv.engine import Engine
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.lab.tools.hooks import Change, Reached, hooked, rows_of


class Place(StrEnum):
    """A kind of activation."""

    RESIDUAL = "residual"
    """residual stream before layer i, [hidden]; with i = L, the input of the final norm"""
    HEADS = "heads"
    """outputs of layer i's heads, [heads, D_v], before the output projection mixes them"""
    ATTENTION = "attention"
    """what layer i's attention adds to the residual stream, [hidden], before a norm that may follow"""


@dataclass(frozen=True, slots=True)
class Site:
    """A kind of activation in a layer."""

    place: Place
    layer: int


@contextmanager
def changed(engine: Engine, buffer: KVBuffer, site: Site, change: Change, slots: Sequence[int]) -> Iterator[None]:
    """Change an activation in the rows of these slots while the block computes them. Then the buffer is rolled back.

    Raises:
        InvalidArgumentError: the layer does not exist, or the block did not compute the row of a slot.
    """
    with all_changed(engine, buffer, [(site, change, slots)]):
        yield


@contextmanager
def all_changed(
    engine: Engine, buffer: KVBuffer, changes: Sequence[tuple[Site, Change, Sequence[int]]]
) -> Iterator[None]:
    """Apply several changes at once, each in the rows of its own slots. The model's modules are looked up once.

    Raises:
        InvalidArgumentError: a layer does not exist, or the block did not compute the row of a slot.
    """
    modules = DecoderModules.of(engine.model)
    with ExitStack() as stack:
        for site, change, slots in changes:
            stack.enter_context(_changed(modules, buffer, site, change, slots))
        yield


@contextmanager
def _changed(
    modules: DecoderModules, buffer: KVBuffer, site: Site, change: Change, slots: Sequence[int]
) -> Iterator[None]:
    module, heads = _module(modules, site)
    wanted, reached = torch.tensor(list(slots)), Reached(tuple(slots))

    def edit(activation: torch.Tensor) -> torch.Tensor:
        at, which = rows_of(buffer, wanted)
        if not at.numel():
            return activation
        reached.met.update(wanted[which].tolist())
        rows = activation[0, at]
        shaped = rows.view(len(at), heads, -1) if heads else rows
        result = change(shaped, which)
        if result.shape != shaped.shape:
            raise InvalidArgumentError(
                f"a change must keep the shape {list(shaped.shape)}; it returned {list(result.shape)}"
            )
        edited = activation.clone()
        edited[0, at] = result.flatten(1) if heads else result
        return edited

    if site.place is Place.ATTENTION:
        with _output_hook(module, buffer, edit), hooked(buffer, [], reached):
            yield
        return

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    with hooked(buffer, [(module, before)], reached):
        yield


@contextmanager
def recorded(
    engine: Engine, buffer: KVBuffer, sites: Sequence[Site], slots: Sequence[int]
) -> Iterator[dict[Site, torch.Tensor]]:
    """Record activations of these slots' rows: site -> [slots, ...], available once the block has computed the rows.

    The buffer is rolled back at the end of the block.
    """
    found: dict[Site, torch.Tensor] = {}

    def keep(site: Site) -> Change:
        def change(rows: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
            if site not in found:
                found[site] = rows.new_zeros((len(slots), *rows.shape[1:]))
            found[site][which] = rows.detach()
            return rows

        return change

    with all_changed(engine, buffer, [(site, keep(site), slots) for site in sites]):
        yield found


@contextmanager
def _output_hook(module: nn.Module, buffer: KVBuffer, edit: Any) -> Iterator[None]:
    def after(_: nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        return None if buffer.target is None else edit(output)

    handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def _module(modules: DecoderModules, site: Site) -> tuple[nn.Module, int]:
    """Return the module whose input (`ATTENTION`: output) is the activation, and its number of heads (0: not split)."""
    count = len(modules.layers)
    if not 0 <= site.layer < count + (site.place is Place.RESIDUAL):
        raise InvalidArgumentError(f"this model has {count} layers, so it has no {site.place} of layer {site.layer}")
    if site.place is Place.RESIDUAL:
        return (*modules.layers, modules.final_norm)[site.layer], 0
    return modules.projections[site.layer], modules.heads if site.place is Place.HEADS else 0
