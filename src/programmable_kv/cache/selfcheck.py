"""Proves on a loaded model what cached keys and values allow, or says why they do not.

A chunk prefilled alone has nothing before it, so its hidden states do not depend on where it stands: prefilled at
position 0 and at position d it must cache the same values, and keys that differ by exactly one rotation. If the
rotation we read from the model were wrong in frequency, pairing, width or scale, this would show it.

Rows recomputed in the middle of an exact cache must come out as they were. If a model built its mask from indices, by itself,
or a window were not the one that its configuration names, this would show it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.layout import KVLayout, PositionEncoding
from programmable_kv.cache.rotation import Pairing, Rotary, rotate

Prefill = Callable[[tuple[int, ...], tuple[int, ...]], KVBuffer]
"""(token ids, positions) -> a buffer in which they were prefilled alone"""

Recompute = Callable[[KVBuffer, tuple[int, ...], tuple[int, ...]], torch.Tensor]
"""(buffer, token ids, slots) -> compute those tokens where they stand; the last one's logits [1, vocabulary]"""

_CHUNK = 12
_ROWS_CHUNK = 40
_WIDEST_WINDOW = 512
"""tokens; a window up to this size is looked past, at the price of a forward of as many tokens"""
_DISPLACEMENTS = (1, 17, 200)


@dataclass(frozen=True, slots=True)
class RelocationProof:
    """The outcome of the check: is it exact, with which layout, and how far off was the worst layer."""

    exact: bool
    layout: KVLayout
    worst: float
    """largest error over the tolerance of its place; at most 1 when exact"""
    reason: str = ""


def tolerance(model_dtype: torch.dtype, frequencies: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """How far a correct relocation may be off, relative to a key's norm, for each rotary pair [R / 2].

    The model computes an angle p f in float32, whatever its own dtype: the product is rounded once, an error of
    p f 2^-24 at each of the two positions, and cos and sin are rounded too. Keys in a narrower dtype are rounded when
    they are cached, at both positions and after the rotation. The hidden states behind the two caches are equal in
    exact arithmetic but pass through layers whose attention saw angles with those errors, hence the margin of 32.
    """
    angle = frequencies * (low + high) * 2.0**-24
    return 32 * (angle + 4 * 2.0**-24 + 4 * torch.finfo(model_dtype).eps)


def prove_relocation(layout: KVLayout, prefill: Prefill, vocabulary: int, dtype: torch.dtype) -> RelocationProof:
    """Run the check on a model, given how to prefill with it. Keeps the pairing of rotary channels that holds."""
    if layout.encoding is PositionEncoding.LEARNED:
        return RelocationProof(False, layout, float("inf"), "its position embeddings are learned")
    if layout.regime is not None:
        return RelocationProof(
            False,
            layout,
            float("inf"),
            f"its rope type '{layout.regime}' changes frequencies with the context's length",
        )
    limit = layout.position_limit
    displacements = [d for d in _DISPLACEMENTS if limit is None or d + _CHUNK <= limit]
    best: RelocationProof | None = None
    for pairing in Pairing:
        candidate = replace(
            layout,
            layers=tuple(
                replace(layer, rotary=layer.rotary.paired(pairing) if layer.rotary is not None else None)
                for layer in layout.layers
            ),
        )
        worst, where = 0.0, ""
        for displacement in displacements:
            error, place = _error(candidate, prefill, vocabulary, dtype, displacement)
            if error > worst:
                worst, where = error, place
        proof = RelocationProof(worst <= 1.0, candidate, worst, "" if worst <= 1.0 else where)
        if proof.exact:
            return proof
        best = proof if best is None or proof.worst < best.worst else best
    assert best is not None
    return best


def _error(
    layout: KVLayout, prefill: Prefill, vocabulary: int, dtype: torch.dtype, displacement: int
) -> tuple[float, str]:
    """Largest error over its tolerance, and a sentence on where it was."""
    ids = tuple((7 + 31 * i) % vocabulary for i in range(_CHUNK))
    here = prefill(ids, tuple(range(_CHUNK)))
    there = prefill(ids, tuple(range(displacement, displacement + _CHUNK)))
    offsets = torch.full((_CHUNK,), displacement)
    worst, where = 0.0, ""
    for index, layer in enumerate(layout.layers):
        moved = here.keys(index) if layer.rotary is None else rotate(here.keys(index), offsets, layer.rotary)
        for name, ours, theirs in (
            ("keys", moved, there.keys(index)),
            ("values", here.values(index), there.values(index)),
        ):
            scale = theirs.double().norm(dim=-1).amax().clamp_min(1e-30)
            error = (ours.double() - theirs.double()).abs().amax(dim=(0, 1, 2)) / scale
            allowed = _allowed(dtype, layer.rotary, error.numel(), displacement).to(error.device)
            ratio = error / allowed
            if float(ratio.max()) > worst:
                worst = float(ratio.max())
                channel = int(ratio.argmax())
                where = (
                    f"in layer {index} the {name} of a chunk moved by {displacement} positions differ from those computed "
                    f"there by {float(error[channel]):.2e} of their norm in channel {channel}, where "
                    f"{float(allowed[channel]):.2e} is the rounding"
                )
    return worst, where


def _allowed(dtype: torch.dtype, rotary: Rotary | None, channels: int, displacement: int) -> torch.Tensor:
    """Tolerance of each channel, [D]. Hidden states carry the largest pair's error into every channel."""
    frequencies = torch.tensor(rotary.frequencies if rotary is not None else (1.0,), dtype=torch.float64)
    return tolerance(dtype, frequencies, _CHUNK, _CHUNK + displacement).max().expand(channels)


@dataclass(frozen=True, slots=True)
class RowsProof:
    """Whether rows in the middle of a context can be computed again, and why not."""

    exact: bool
    worst: float
    """largest error over its tolerance"""
    reason: str = ""


def prove_rows(
    layout: KVLayout,
    windows: tuple[int, ...],
    prefill: Prefill,
    recompute: Recompute,
    vocabulary: int,
    dtype: torch.dtype,
) -> RowsProof:
    """Recompute scattered rows of an exact cache. `windows` are the sizes that the model's configuration speaks of.

    Rows computed in another batch differ by rounding: each of L layers adds one of the dtype's, relative to a key's norm, and
    independent ones add up as the square root of L. 32 is the margin.
    """
    length = max([_ROWS_CHUNK, *(window + 16 for window in windows if window <= _WIDEST_WINDOW)])
    if layout.position_limit is not None:
        length = min(length, layout.position_limit)
    ids = tuple((5 + 29 * i) % vocabulary for i in range(length))
    slots = (1, length // 4, length // 2, length // 2 + 1, length - 1)
    buffer = prefill(ids[:-1], tuple(range(length - 1)))
    expected = recompute(buffer, ids[-1:], slots[-1:])
    before = [(buffer.keys(i).clone(), buffer.values(i).clone()) for i in range(len(buffer))]
    try:
        logits = recompute(buffer, tuple(ids[slot] for slot in slots), slots)
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        return RowsProof(
            False, float("inf"), f"its attention takes no mask from outside ({str(error).splitlines()[0]})"
        )
    allowed = min(0.5, 32 * len(layout.layers) ** 0.5 * torch.finfo(dtype).eps)
    worst, where = 0.0, ""
    # The last layer's attention leaves no trace in the cache: only the logits show it.
    compared = [("logits after", len(before), logits, expected)]
    for index, (keys, values) in enumerate(before):
        compared += [("keys of", index, buffer.keys(index), keys), ("values of", index, buffer.values(index), values)]
    for name, index, ours, theirs in compared:
        scale = theirs.double().norm(dim=-1).amax().clamp_min(1e-30)
        off = float((ours.double() - theirs.double()).norm(dim=-1).amax() / scale)
        if not off / allowed <= worst:
            worst = off / allowed
            where = (
                f"the {name} layer {index}, of rows computed again in their place, differ by {off:.2e} of their norm, where "
                f"{allowed:.2e} is the rounding"
            )
    return RowsProof(worst <= 1.0, worst, "" if worst <= 1.0 else where)
