"""Head outputs: reads them in some rows and patches them into another context, to find which heads write there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.engine import Engine, Rows
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.lab.tools.changes import of_heads, replaced
from programmable_kv.lab.tools.hooks import taken_back
from programmable_kv.lab.tools.sites import Place, Site, all_changed, recorded

Head = tuple[int, int]
"""(layer, query head)"""


def head_outputs(engine: Engine, buffer: KVBuffer, rows: Rows, slots: Sequence[int]) -> torch.Tensor:
    """Return every head's output in the rows of these slots, [L, slots, heads, D_v]. The buffer is unchanged."""
    sites = [Site(Place.HEADS, layer) for layer in range(len(buffer))]
    with recorded(engine, buffer, sites, slots) as found:
        engine.compute(buffer, rows)
    return torch.stack([found[site] for site in sites])


def head_slopes(
    engine: Engine, buffer: KVBuffer, rows: Rows, slots: Sequence[int], target: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return the gradient of `target` with respect to every head's output in these slots, [L, slots, heads, D_v].

    `target` maps the last row's logits to a number. The rows are appended, as `Engine.graph` requires. The buffer is
    unchanged.
    """
    leaves: list[torch.Tensor] = []

    def watch(read: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        leaves.append(torch.zeros_like(read, requires_grad=True))
        return read + leaves[-1]

    watched = [(Site(Place.HEADS, layer), watch, slots) for layer in range(len(buffer))]
    with all_changed(engine, buffer, watched), engine.graph(buffer, rows) as graph:
        found = torch.autograd.grad(target(graph.logits[-1]), leaves)
    return torch.stack(found)


@contextmanager
def heads_from(
    engine: Engine, buffer: KVBuffer, outputs: torch.Tensor, heads: Sequence[Head], slots: Sequence[int]
) -> Iterator[None]:
    """Inside the block, replace these heads' outputs in the rows of these slots by `outputs` [L, slots, heads, D_v].

    Everything downstream is computed from the replaced outputs. At the end of the block the buffer is rolled back.

    Raises:
        InvalidArgumentError: a layer or head does not exist, or the block did not compute the row of a slot.
    """
    require_heads(outputs, heads)
    by_layer: dict[int, list[int]] = {}
    for layer, head in sorted(set(heads)):
        by_layer.setdefault(layer, []).append(head)
    changes = [
        (Site(Place.HEADS, layer), of_heads(replaced(outputs[layer][:, which]), which), slots)
        for layer, which in by_layer.items()
    ]
    with taken_back(buffer), all_changed(engine, buffer, changes):
        yield


def require_heads(outputs: torch.Tensor, heads: Sequence[Head]) -> None:
    """
    Raises:
        InvalidArgumentError: the outputs [L, slots, heads, D_v] do not have one of the layers or heads.
    """
    layers, width = outputs.shape[0], outputs.shape[2]
    if any(not (0 <= layer < layers and 0 <= head < width) for layer, head in heads):
        raise InvalidArgumentError(f"there are {layers} layers of {width} heads; got {list(heads)[:8]}...")
