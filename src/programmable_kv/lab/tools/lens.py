"""The logit lens, which applies the model's own head to the residual stream before each layer; and attention by row.

The model's own forward applies the final norm, projection, soft cap and scale, to a batch of all layers.
Source: nostalgebraist, interpreting GPT: the logit lens (2020).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.modules import DecoderModules
from programmable_kv.engine import Engine, Rows
from programmable_kv.lab.tools.hooks import Reached, hooked, taken_back


def logit_lens(engine: Engine, buffer: KVBuffer, rows: Rows, *, logits: int = 1) -> torch.Tensor:
    """Return logits [L + 1, logits, vocabulary] of the last `logits` rows, from the stream before layer 0, 1, ..., L.

    The last entry is the model's own output. The rows are computed against the buffer, which is unchanged.
    """
    streams: list[torch.Tensor] = []
    found: list[torch.Tensor] = []
    modules = DecoderModules.of(engine.model)

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams.append((args[0] if args else kwargs["hidden_states"]).detach())

    def all_streams(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The model's own stream is first, because the caller of the forward reads the first entry of a batch.
        batch = torch.cat([args[0], *streams])
        streams.clear()
        return (batch, *args[1:]), kwargs

    hooks = [*((layer, keep) for layer in modules.layers), (modules.final_norm, all_streams)]
    with hooked(buffer, hooks, Reached(())), _logits_kept(engine.model, buffer, found):
        engine.compute(buffer, rows, logits=logits)
    own, *earlier = found[-1]
    return torch.stack([*earlier, own])


@contextmanager
def _logits_kept(model: nn.Module, buffer: KVBuffer, found: list[torch.Tensor]) -> Iterator[None]:
    """Keep the logits of the whole batch, [L + 1, T, vocabulary]."""

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if buffer.target is not None:
            found.append(output.logits)

    handle = model.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def attention_by_row(
    engine: Engine, buffer: KVBuffer, ids: Sequence[int], slots: Sequence[int]
) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Yield each of some slots in use with its row's attention weights, [heads, slot + 1] for each layer.

    `ids` has the tokens of all slots. Only one row is computed and in memory at a time. The buffer is unchanged.
    """
    for slot in slots:
        position = int(buffer.positions[slot])
        with taken_back(buffer):
            yield slot, engine.attention_weights(buffer, Rows((ids[slot],), (slot,), (position,)))
