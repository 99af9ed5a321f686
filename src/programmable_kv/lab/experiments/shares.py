"""What writes a note: the share of its change that attention has added up to each layer. The MLPs added the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.engine import Rows
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.lab.tools.sites import Place, Site, recorded

DEPTHS = (0.33, 0.5, 0.67, 0.75, 0.8, 0.9, 1.0)
"""Fractions of the model's depth. The input of the layer there is decomposed; 1.0 is what the final norm reads."""


def added(pair: Pair, buffer: KVBuffer, slots: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream of some slots' rows before each layer and after the last one [L + 1, slots, d], and what each
    layer's attention adds to it [L, slots, d].
    """
    layers = len(buffer)
    streams = [Site(Place.RESIDUAL, layer) for layer in range(layers + 1)]
    attentions = [Site(Place.ATTENTION, layer) for layer in range(layers)]
    ids = tuple(pair.text.ids[slot] for slot in slots)
    with recorded(pair.engine, buffer, [*streams, *attentions], slots) as found:
        pair.engine.compute(buffer, Rows(ids, tuple(slots), tuple(slots)))
    return torch.stack([found[site] for site in streams]), torch.stack([found[site] for site in attentions])


def shares_by_layer(pair: Pair, slots: Sequence[int]) -> dict[str, dict[str, float | None]]:
    """At each depth, attention's share of the change of the stream between the contexts.

    The share is what all attention below has added along the change, in units of the change. The slots' own tokens are
    the same in both contexts, so the MLPs have added the rest (in models whose layers add their attention's output
    without a norm of it). `size` is the size of the change relative to the stream. A share is None if nothing has
    changed yet.
    """
    (stream, attention), (other, other_attention) = (added(pair, buffer, slots) for buffer in (pair.old, pair.fresh))
    whole = (other - stream).cpu().double()
    read = (other_attention - attention).cpu().double().cumsum(dim=0)
    found: dict[str, dict[str, float | None]] = {}
    for part in DEPTHS:
        layer = round(part * (len(stream) - 1))
        change, size = whole[layer], float((whole[layer] ** 2).sum())
        if layer == 0 or size == 0.0:
            found[_named(part)] = {"attention": None, "size": 0.0}
            continue
        by_attention = float((read[layer - 1] * change).sum()) / size
        relative = (size / float((stream[layer].cpu().double() ** 2).sum())) ** 0.5
        found[_named(part)] = {"attention": round(by_attention, 4), "size": round(relative, 4)}
    return found


def _named(part: float) -> str:
    """A depth as it is spelled in a figure's path: `at_67`."""
    return f"at_{round(100 * part)}"
