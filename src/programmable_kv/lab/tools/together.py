"""Many interventions on what the last row reads, in one forward with a copy of the row for each.

The other context's rows are appended to this context's. The mask of each copy of the last row selects, for each slot,
layer and head, whether it sees this context's row, the other context's row, or neither. So a patch costs one row
instead of one forward, and nothing is overwritten. The result is exact: it equals patching the cache and computing the
row alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.layout import Reach
from programmable_kv.cache.masks import visible
from programmable_kv.engine import Engine, Rows
from programmable_kv.errors import InvalidArgumentError, UnsupportedModelError
from programmable_kv.lab.tools.hooks import Reached, taken_back
from programmable_kv.lab.tools.kv import rows_from
from programmable_kv.lab.tools.masks import masked
from programmable_kv.verify.relocation import PositionEncoding

_PROBES = 256
"""most rows of one forward; their masks are at most [heads, rows, slots]"""


@dataclass(frozen=True, slots=True)
class Probe:
    """What one copy of the last row reads differently, in `layers` and `heads` (KV heads; None: all).

    It reads the slots `patched` from the other context, and does not read the slots `blocked`.
    """

    patched: tuple[int, ...] = ()
    blocked: tuple[int, ...] = ()
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    places: tuple[tuple[int, int], ...] | None = None
    """pairs (layer, query head), given in place of `layers` and `heads`"""
    also: tuple[Probe, ...] = ()
    """further probes of the same copy, for other layers, heads or slots"""

    def parts(self) -> tuple[Probe, ...]:
        """Return this probe and all probes in `also`."""
        return (self, *(part for each in self.also for part in each.parts()))


def each_slot(slots: Sequence[int]) -> list[Probe]:
    """Return one patch for each slot, in all layers and heads."""
    return [Probe((slot,)) for slot in slots]


def each_place(engine: Engine, buffer: KVBuffer, slots: Sequence[int]) -> list[Probe]:
    """Return one patch for each layer, KV head and slot, in this order."""
    require_rotary(engine, buffer)
    heads = buffer.keys(0).shape[1]
    return [
        Probe((slot,), layers=(layer,), heads=(head,))
        for layer in range(len(buffer))
        for head in range(heads)
        for slot in slots
    ]


def probed(
    engine: Engine, buffer: KVBuffer, token: int, probes: Sequence[Probe], source: KVBuffer | None = None
) -> torch.Tensor:
    """Return the logits [probes, vocabulary] of `token`, appended to the buffer, under each probe. Changes nothing.

    Args:
        source: the other context, with its slots at the same positions; needed if a probe patches.

    Raises:
        InvalidArgumentError: a slot, layer or head does not exist, a probe has both `places` and `layers` or `heads`, a
            needed source is missing, or the two contexts' slots have different positions.
        UnsupportedModelError: attention depends on positions in other ways than through the keys and the mask (ALiBi),
            or keys have no heads.
    """
    require_rotary(engine, buffer)
    parts = [part for probe in probes for part in probe.parts()]
    patched = tuple(sorted({slot for part in parts for slot in part.patched}))
    _check(engine, buffer, parts, patched, source)
    found = []
    for start in range(0, len(probes), _PROBES):
        some = probes[start : start + _PROBES]
        with taken_back(buffer):
            table = _Table(engine, buffer, some, patched)
            if source is not None and patched:
                _append(buffer, source, patched)
            with _seeing(engine, buffer, table):
                # All copies have the same position: none of them sees another.
                rows = Rows((token,) * len(some), table.slots, (table.position,) * len(some))
                found.append(engine.compute(buffer, rows, logits=len(some), chunk=len(some)))
    return torch.cat(found) if found else torch.empty(0)


class _Table:
    """Which slots each copy of the row sees. Slots: [own context][patched rows of the other one][copies of the row]."""

    def __init__(self, engine: Engine, buffer: KVBuffer, probes: Sequence[Probe], patched: tuple[int, ...]) -> None:
        self.probes, self.position, past = [probe.parts() for probe in probes], buffer.next_position, buffer.length
        self.slots = tuple(range(past + len(patched), past + len(patched) + len(probes)))
        self.positions = torch.cat((buffer.positions, buffer.positions[list(patched)]))
        self._past, self._place = past, {slot: past + index for index, slot in enumerate(patched)}
        self._heads, self._groups = _query_heads(engine), _query_heads(engine) // buffer.keys(0).shape[1]
        self._by_head = any(it.heads is not None or it.places is not None for parts in self.probes for it in parts)
        self._by_layer = any(it.layers is not None or it.places is not None for parts in self.probes for it in parts)
        self._layout = buffer.layout
        self._known: dict[tuple[Reach, int | None, int | None], torch.Tensor] = {}

    def seen(self, layer: int) -> torch.Tensor:
        """Return a layer's mask, booleans [1 or query heads, T, S]. Layers with equal masks share it."""
        rule = self._layout.layers[layer]
        key = (rule.reach, rule.window, layer if self._by_layer else None)
        if key not in self._known:
            self._known[key] = self._seen(layer)
        return self._known[key]

    def _seen(self, layer: int) -> torch.Tensor:
        rule, count = self._layout.layers[layer], len(self.probes)
        reads = visible(torch.tensor([self.position]), self.positions, rule.reach, rule.window)[0]
        own = torch.zeros(count, self._past, dtype=torch.bool) | reads[: self._past]
        other = torch.zeros(count, len(self._place), dtype=torch.bool)
        context = torch.cat((own, other, torch.eye(count, dtype=torch.bool)), dim=1)
        seen = context.expand(self._heads if self._by_head else 1, -1, -1).clone()
        for row, parts in enumerate(self.probes):
            for part in parts:
                heads = self._where(part, layer)
                if heads:
                    chosen = torch.tensor(heads)[:, None]
                    seen[chosen, row, list(part.blocked + part.patched)] = False
                    beside = [self._place[slot] for slot in part.patched]
                    seen[chosen, row, beside] = reads[beside]
        return seen

    def _where(self, part: Probe, layer: int) -> list[int]:
        """Return a layer's query heads in which a part reads differently; head 0 means all if no part is by head."""
        if part.places is not None:
            return [head for each, head in part.places if each == layer]
        if part.layers is not None and layer not in part.layers:
            return []
        if part.heads is None:
            return list(range(self._heads if self._by_head else 1))
        return [kept * self._groups + each for kept in part.heads for each in range(self._groups)]


@contextmanager
def _seeing(engine: Engine, buffer: KVBuffer, table: _Table) -> Iterator[None]:
    reached = Reached(table.slots)

    def allowed(layer: int, slots: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        reached.met.update(slots.tolist())
        return table.seen(layer).to(engine.device)

    with masked(engine, buffer, allowed, range(len(buffer)), reached):
        yield


def _append(buffer: KVBuffer, source: KVBuffer, slots: tuple[int, ...]) -> None:
    """Append the source's rows to the buffer at placeholder positions. The masks made here use their real positions."""
    first, position = buffer.length, buffer.next_position
    where = range(first, first + len(slots))
    with buffer.writing(where, range(position, position + len(slots))):
        for layer, row in zip(buffer.layers, rows_from(source, slots), strict=True):
            layer.update(row.keys, row.values)


def require_rotary(engine: Engine, buffer: KVBuffer) -> None:
    """Check that copies of rows can be computed in one forward: positions may matter only in the keys and the mask.

    Raises:
        InvalidArgumentError: the buffer is empty.
        UnsupportedModelError: attention depends on positions in other ways than through the keys and the mask (ALiBi),
            or keys have no heads.
    """
    proof = engine.relocation
    rotated = {layer.rotated for layer in proof.layout.layers}
    if not proof.exact or proof.encoding is not PositionEncoding.ROTARY or rotated != {"keys"}:
        raise UnsupportedModelError(
            f"many probes in one forward need rotary keys by head, which {engine.layout.model_type} does not cache: "
            "patch the cache and compute the row for one probe at a time"
        )
    if not buffer.length:
        raise InvalidArgumentError("an empty buffer has nothing to patch or block")


def _check(
    engine: Engine, buffer: KVBuffer, parts: Sequence[Probe], patched: tuple[int, ...], source: KVBuffer | None
) -> None:
    layers, kept, heads = len(buffer), buffer.keys(0).shape[1], _query_heads(engine)
    for part in parts:
        outside = set(part.patched + part.blocked) - set(range(buffer.length))
        unknown = set(part.layers or ()) - set(range(layers)) or set(part.heads or ()) - set(range(kept))
        nowhere = [at for at in part.places or () if not (0 <= at[0] < layers and 0 <= at[1] < heads)]
        if outside or unknown or nowhere:
            raise InvalidArgumentError(f"{part} names a slot, layer or head that this buffer does not have")
        if part.places is not None and (part.layers is not None or part.heads is not None):
            raise InvalidArgumentError(
                f"{part} names places (layers with heads), so it must not also name layers or heads"
            )
    if patched and (source is None or max(patched) >= source.length):
        raise InvalidArgumentError("a probe patches slots, but there is no source that contains them")
    if source is not None and not torch.equal(source.positions[list(patched)], buffer.positions[list(patched)]):
        raise InvalidArgumentError("slots to patch have other positions in the source")


def _query_heads(engine: Engine) -> int:
    return int(engine.model.config.get_text_config(decoder=True).num_attention_heads)
