"""Attention knock-out: some rows cannot attend to some slots, in a band of layers and in some query heads.

The keys keep their positions, and attention is normalised over the remaining slots, as if the blocked slots did not
exist.
Source: Geva et al., Dissecting Recall of Factual Associations (arXiv 2304.14767), section 5.1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.engine import Engine
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.lab.tools.hooks import Reached
from programmable_kv.lab.tools.masks import masked


@dataclass(frozen=True, slots=True)
class Knockout:
    """Rows in the slots `queries` cannot attend to the slots `keys`, in `layers` and query `heads` (None: all)."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None


@contextmanager
def knocked_out(engine: Engine, buffer: KVBuffer, *knockouts: Knockout) -> Iterator[None]:
    """Apply the knock-outs to the rows that are computed inside the block. Then the buffer is rolled back.

    Raises:
        InvalidArgumentError: a row would see no slot, a layer or head does not exist, or no row of a query slot was
            computed.
    """
    count, heads = len(buffer), _heads(engine)
    for each in knockouts:
        if not set(each.layers or ()) <= set(range(count)) or not set(each.heads or ()) <= set(range(heads)):
            raise InvalidArgumentError(
                f"{each} names an unknown layer or head: there are {count} layers and {heads} heads"
            )
    layers = sorted({layer for each in knockouts for layer in (range(count) if each.layers is None else each.layers)})
    reached = Reached(tuple(dict.fromkeys(slot for each in knockouts for slot in each.queries)))

    def allowed(layer: int, slots: torch.Tensor, seen: torch.Tensor) -> torch.Tensor | None:
        reached.met.update(slots.tolist())
        now = seen
        for each in knockouts:
            if each.layers is None or layer in each.layers:
                now = now & ~_blocked(each, slots, seen, heads)
        return now

    with masked(engine, buffer, allowed, layers, reached):
        yield


@contextmanager
def blinded(engine: Engine, buffer: KVBuffer, blind: Callable[[int], Collection[int]]) -> Iterator[None]:
    """Inside the block, a row in slot `s` cannot attend to the slots `blind(s)` in any layer. Then all is rolled back.

    `blind` is called in every forward. So rows can be generated one by one, without knowing how many there will be, and
    a row can be computed again under another rule.

    Raises:
        InvalidArgumentError: a row would see no slot.
    """

    def allowed(_: int, slots: torch.Tensor, seen: torch.Tensor) -> torch.Tensor | None:
        unseen = torch.zeros((len(slots), seen.shape[-1]), dtype=torch.bool)
        for row, slot in enumerate(slots.tolist()):
            unseen[row, [key for key in blind(slot) if key < seen.shape[-1]]] = True
        return seen & ~unseen[None].to(seen.device) if bool(unseen.any()) else None

    with masked(engine, buffer, allowed, range(len(buffer)), Reached(())):
        yield


def _blocked(knockout: Knockout, slots: torch.Tensor, seen: torch.Tensor, heads: int) -> torch.Tensor:
    """Return which slots each row may not see because of a knock-out, as booleans [1 or heads, T, S]."""
    keys = torch.zeros(seen.shape[-1], dtype=torch.bool)
    keys[[slot for slot in knockout.keys if slot < seen.shape[-1]]] = True
    rows = torch.isin(slots, torch.tensor(knockout.queries))
    blocked = (rows[:, None] & keys[None, :])[None].to(seen.device)
    if knockout.heads is None:
        return blocked
    chosen = torch.zeros(heads, dtype=torch.bool, device=seen.device)
    chosen[list(knockout.heads)] = True
    return blocked & chosen[:, None, None]


def _heads(engine: Engine) -> int:
    return int(engine.model.config.get_text_config(decoder=True).num_attention_heads)
