"""What writes a note: how much of its change attention has added up to each layer. The rest was added by the MLPs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.engine import Rows
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.lab.tools.sites import Place, Site, recorded

DEPTHS = (0.33, 0.5, 0.67, 0.75, 0.8, 0.9, 1.0)
"""of the layers whose input is decomposed; 1.0 is what the final norm reads"""


def added(pair: Pair, buffer: KVBuffer, slots: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of some slots' rows in a context: the residual stream before each layer and after the last one [L + 1, slots, d], and
    what each layer's attention adds to it [L, slots, d].
    """
    layers = len(buffer)
    streams = [Site(Place.RESIDUAL, layer) for layer in range(layers + 1)]
    attentions = [Site(Place.ATTENTION, layer) for layer in range(layers)]
    ids = tuple(pair.text.ids[slot] for slot in slots)
    with recorded(pair.engine, buffer, [*streams, *attentions], slots) as found:
        pair.engine.compute(buffer, Rows(ids, tuple(slots), tuple(slots)))
    return torch.stack([found[site] for site in streams]), torch.stack([found[site] for site in attentions])


def shares_by_layer(pair: Pair, slots: Sequence[int]) -> dict[str, dict[str, float | None]]:
    """At each depth: attention's share of the change of the stream between the contexts.

    That is what all attention below has added to the change, along it, in units of it. The slots' own tokens are the same in
    both contexts, so the MLPs have added the rest (in models whose layers add what their attention gives, without a norm of
    it). `size`: how large the change is, relative to the stream. A share is None where nothing has changed yet.
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
    """A depth as a figure's path spells it: `at_67`."""
    return f"at_{round(100 * part)}"
