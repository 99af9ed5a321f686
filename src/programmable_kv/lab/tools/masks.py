"""Changes a layer's attention mask inside a forward, for any attention the model runs (sdpa, eager, grouped sdpa)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.masks import visible
from programmable_kv.cache.modules import DecoderModules
from programmable_kv.engine import Engine
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.lab.tools.hooks import Reached, hooked, slots_in_flight

Allowed = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None]
"""(layer, slots of the rows [T], what they may see [1 or heads, T, S]) -> what they may see instead; None: no change"""


@contextmanager
def masked(
    engine: Engine, buffer: KVBuffer, allowed: Allowed, layers: Sequence[int], reached: Reached
) -> Iterator[None]:
    """Inside the block, rows of this buffer see in these layers what `allowed` returns. Then the buffer is rolled back.

    Raises:
        InvalidArgumentError: a row would see no slot, or the block did not compute one of the rows to intervene in.
    """
    modules = DecoderModules.of(engine.model)
    hooks = [(modules.attentions[layer], _hook(engine, buffer, allowed, layer)) for layer in layers]
    with hooked(buffer, hooks, reached):
        yield


def _hook(engine: Engine, buffer: KVBuffer, allowed: Allowed, layer: int) -> Callable[..., Any]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments.get("attention_mask")
        slots = slots_in_flight(buffer)
        seen = _seen(engine, buffer, layer, slots, given)
        now = allowed(layer, slots, seen)
        if now is None:
            return None
        if not bool(now.any(dim=-1).all()):
            raise InvalidArgumentError(
                f"a row could attend to nothing in layer {layer}, so its attention cannot be computed"
            )
        mask = _as_given(engine, given, now)
        position = list(inspect.signature(module.forward).parameters).index("attention_mask")
        if position < len(args):
            return (*args[:position], mask, *args[position + 1 :]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    return before


def _seen(
    engine: Engine, buffer: KVBuffer, layer: int, slots: torch.Tensor, given: torch.Tensor | None
) -> torch.Tensor:
    """Return what the rows may see by the given mask, or by their positions if None: booleans [1 or heads, T, S]."""
    assert buffer.target is not None
    count = buffer.target.visible
    if given is None:
        rule, positions = buffer.layout.layers[layer], buffer.positions_until(count)
        return visible(positions[slots], positions, rule.reach, rule.window)[None].to(engine.device)
    seen = given[0, :, :, :count]
    return seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2


def _as_given(engine: Engine, given: torch.Tensor | None, now: torch.Tensor) -> torch.Tensor:
    """Return the mask [1, 1 or heads, T, S] in the form that the model expects. Biases of a given mask are kept."""
    eager = engine.model.config._attn_implementation == "eager"
    if (given is None and not eager) or (given is not None and given.dtype == torch.bool):
        return now[None]
    dtype = engine.dtype if given is None else given.dtype
    blocked = torch.finfo(dtype).min
    if given is None:
        return torch.zeros(now.shape, dtype=dtype, device=now.device).masked_fill(~now, blocked)[None]
    bias = given[0, :, :, : now.shape[-1]]
    bias = torch.where(bias > blocked / 2, bias, torch.zeros_like(bias))
    return bias.expand_as(now).masked_fill(~now, blocked)[None]
