"""Some rows of a context computed again many times in one forward, each time with other activations.

Each copy of the rows stands behind the context in slots of its own. By its mask it sees the context without the rows that it
stands for, and of the copies itself alone. So an intervention costs a few rows and not a forward. Exact: equal to computing the
rows in their places, one intervention after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.masks import visible
from programmable_kv.engine import Engine, Rows
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.lab.tools.changes import replaced
from programmable_kv.lab.tools.hooks import Reached, taken_back
from programmable_kv.lab.tools.masks import masked
from programmable_kv.lab.tools.sites import Place, Site, changed
from programmable_kv.lab.tools.together import require_rotary

_ROWS = 192
"""of one forward"""


@dataclass(frozen=True, slots=True, eq=False)
class Exchanged:
    """Of one copy: the residual stream of all rows but the last before a layer, [rows - 1, d]."""

    layer: int
    streams: torch.Tensor


def computed_in_copies(engine: Engine, buffer: KVBuffer, rows: Rows, exchanges: Sequence[Exchanged]) -> torch.Tensor:
    """The logits of the last of some rows under each exchange, [exchanges, vocabulary]. The buffer is unchanged.

    `rows` are in use, but the last one may stand behind the context.

    Raises:
        InvalidArgumentError: there is one row only, or streams of another number of rows.
        UnsupportedModelError: attention depends on positions by more than the keys and the mask.
    """
    require_rotary(engine, buffer)
    if len(rows) < 2 or any(len(each.streams) != len(rows) - 1 for each in exchanges):
        raise InvalidArgumentError(f"of {len(rows)} rows all but the last are exchanged, so there must be two or more")
    some = max(1, _ROWS // len(rows))
    found = [
        _in_one_forward(engine, buffer, rows, exchanges[start : start + some])
        for start in range(0, len(exchanges), some)
    ]
    return torch.cat(found) if found else torch.empty(0)


def _in_one_forward(engine: Engine, buffer: KVBuffer, rows: Rows, exchanges: Sequence[Exchanged]) -> torch.Tensor:
    """Row by row all copies of it, so that positions ascend and the last rows come last."""
    count, past = len(exchanges), buffer.length
    every = Rows(
        tuple(token for token in rows.ids for _ in range(count)),
        tuple(range(past, past + count * len(rows))),
        tuple(position for position in rows.positions for _ in range(count)),
    )
    reached = Reached(every.slots)
    seen = _Seen(buffer, rows, every, count)

    def allowed(layer: int, slots: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        reached.met.update(slots.tolist())
        return seen.by(layer).to(engine.device)

    with taken_back(buffer), ExitStack() as stack:
        stack.enter_context(masked(engine, buffer, allowed, range(len(buffer)), reached))
        for layer in sorted({each.layer for each in exchanges}):
            which = [number for number, each in enumerate(exchanges) if each.layer == layer]
            slots = [past + row * count + number for number in which for row in range(len(rows) - 1)]
            streams = torch.cat([exchanges[number].streams for number in which])
            stack.enter_context(changed(engine, buffer, Site(Place.RESIDUAL, layer), replaced(streams), slots))
        return engine.compute(buffer, every, logits=count, chunk=len(every))


class _Seen:
    """What each copy of a row sees: [1, T, S], the context first and then the copies."""

    def __init__(self, buffer: KVBuffer, rows: Rows, every: Rows, count: int) -> None:
        self._layout, self._past = buffer.layout, buffer.length
        self._queries = torch.tensor(every.positions)
        self._keys = torch.cat((buffer.positions, self._queries))
        self._replaced = [slot for slot in rows.slots if slot < self._past]
        copy = torch.arange(len(every)) % count
        self._together = copy[:, None] == copy[None, :]

    def by(self, layer: int) -> torch.Tensor:
        rule = self._layout.layers[layer]
        seen = visible(self._queries, self._keys, rule.reach, rule.window)
        seen[:, self._replaced] = False
        seen[:, self._past :] &= self._together
        return seen[None]
