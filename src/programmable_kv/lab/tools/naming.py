"""Answers many questions to notebooks in a few large forwards.

The cache of a notebook on a `NamingEngine` contains names of rows (`SharedRows`) in place of keys and values. The
notebook works like any other and counts the same rows as computed, but the computation is deferred, and logits that are
not known yet are guesses. `settled` asks many questions in this way, computes all their rows together, and repeats the
questions that were answered from guesses, until there are none. Results that depend on the tensors themselves
(attention, and how far keys and values moved) are not deferred: asking for them computes all pending rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from programmable_kv.account import Meter
from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.layout import KVLayout
from programmable_kv.cache.masks import PartReads
from programmable_kv.cache.origins import Slots
from programmable_kv.engine import Engine, Rows
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.lab.tools.shared_rows import NOTHING, SharedRows
from programmable_kv.models.load import Model
from programmable_kv.models.loaded import remember
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.verify.relocation import RelocationProof
from programmable_kv.verify.rows import RowsProof

Answer = TypeVar("Answer")


class NamedBuffer(KVBuffer):
    """A buffer whose only key in each slot is the name of the slot's row."""

    def __init__(self, shared: SharedRows, layout: KVLayout, capacity: int, meter: Meter | None = None) -> None:
        super().__init__(replace(layout, layers=layout.layers[:1]), capacity=capacity, meter=meter)
        self._shared = shared

    @property
    def names(self) -> list[int]:
        """Names of the rows in use, in slot order."""
        return [int(name) for name in self.keys(0)[0, 0, :, 0]] if self.length else []

    def name(self, names: Sequence[int]) -> None:
        """Write the names of rows. Call it inside `writing`."""
        self.layers[0].update(*[torch.tensor(names)[None, None, :, None]] * 2)

    def copied(self, slots: Sequence[int]) -> list[torch.Tensor]:
        """Return copies of the named rows' keys and values. Pending rows are computed first."""
        names = self.names
        self._shared.compute()
        return self._shared.buffer([names[slot] for slot in slots]).copied(range(len(slots)))

    def _move(self, old: Slots, new: slice, positions: torch.Tensor, layout: KVLayout) -> None:
        standing = self.layers[0].keys[0, 0, old, 0].tolist()
        names = [self._shared.moved(*each) for each in zip(standing, positions.tolist(), strict=True)]
        self.layers[0].keys[0, 0, new, 0] = torch.tensor(names)
        self._positions[new] = positions
        self.meter.count(relocated=len(names))


class NamingEngine(Engine):
    """Names rows instead of computing them.

    Logits that are not known yet are guessed to predict the next row's token. In the last row of a computation they are
    guessed to predict the token in `follows`, or the end of the text.
    """

    def __init__(self, shared: SharedRows, end: int) -> None:
        """`end`: the token that ends a text."""
        super().__init__(shared.engine.model)
        self.shared, self.end = shared, end
        self.follows: dict[int, int] = {}
        """token -> the token that is guessed to follow it"""
        self.guessed = False
        """whether logits were guessed since this was set to False"""
        self._attended: dict[tuple[int, ...], torch.Tensor] = {}
        """names of rows -> attention of the last of them"""

    @property
    def relocation(self) -> RelocationProof:
        return self.shared.engine.relocation

    @property
    def rows(self) -> RowsProof:
        return self.shared.engine.rows

    def new_buffer(self, capacity: int = 0) -> KVBuffer:
        return NamedBuffer(self.shared, self.layout, capacity, self.meter)

    def _compute_some(
        self, buffer: KVBuffer, ids: torch.Tensor, rows: Rows, logits: int, reads: PartReads | None
    ) -> torch.Tensor:
        """
        Raises:
            InvalidArgumentError: the buffer belongs to another engine.
        """
        if not isinstance(buffer, NamedBuffer):
            raise InvalidArgumentError("rows can only be named in a buffer of this engine")
        until = self._named(buffer, rows, reads)
        names = [until[slot] for slot in rows.slots]
        with buffer.writing(rows.slots, rows.positions):
            buffer.name(names)
        buffer.meter.count(computed=len(rows))
        asked = len(rows) - logits
        nexts = [*rows.ids[asked + 1 :], self.follows.get(rows.ids[-1], self.end)]
        found = [self._logits(*each) for each in zip(names[asked:], nexts, strict=False)]
        return torch.stack(found) if found else torch.empty(0)

    def _named(self, buffer: NamedBuffer, rows: Rows, reads: PartReads | None = None) -> list[int]:
        """Return the names of all rows up to the last of `rows`, which are computed against the buffer.

        `reads`: which earlier rows each of `rows` reads; None means all of them.
        """
        standing, stop = buffer.names, rows.slots[-1] + 1
        tokens = dict(zip(rows.slots, zip(rows.ids, rows.positions, strict=True), strict=True))
        allowed = {} if reads is None else dict(zip(rows.slots, reads.allowed(rows.slots, stop).tolist(), strict=True))
        names: list[int] = []
        everything = NOTHING
        for slot in range(stop):
            if slot in tokens:
                sees = everything
                if not all(allowed.get(slot, [])[:slot]):
                    sees = NOTHING
                    for earlier, read in zip(names, allowed[slot], strict=False):
                        sees = self.shared.longer(sees, earlier) if read else sees
                names.append(self.shared.name(*tokens[slot], sees))
            else:
                names.append(standing[slot])
            everything = self.shared.longer(everything, names[-1])
        return names

    def attention_of(self, buffer: KVBuffer, rows: Rows) -> torch.Tensor:
        """See `Engine.attention_of`. Pending rows are computed first, and the last row once more for its attention."""
        if not isinstance(buffer, NamedBuffer):
            raise InvalidArgumentError("rows can only be named in a buffer of this engine")
        names = tuple(self._named(buffer, rows))
        if names not in self._attended:
            self.shared.compute()
            last = Rows(rows.ids[-1:], rows.slots[-1:], rows.positions[-1:])
            self._attended[names] = self.shared.engine.attention_of(self.shared.buffer(names), last)
        buffer.meter.count(computed=len(rows))
        return self._attended[names]

    def _logits(self, name: int, follows: int) -> torch.Tensor:
        known = self.shared.logits(name)
        if known is None:
            self.guessed = True
            known = torch.zeros(self.vocabulary, dtype=self.dtype)
            known[follows] = 1
        return known

    def _forward(self, *_: Any, **__: Any) -> Any:
        """
        Raises:
            InvalidArgumentError: always.
        """
        raise InvalidArgumentError(
            "rows that are only named have neither attention nor activations: use the model's own engine"
        )


def naming(model: Model, shared: SharedRows) -> tuple[Model, NamingEngine]:
    """Return a model whose notebooks name their rows, and its engine."""
    engine = NamingEngine(shared, model.tokenizer.eos_token_id)
    named = replace(model, engine=engine)
    remember(model)  # notebooks that are read from a file get the model that computes
    return named, engine


def tried(notebook: Notebook, ask: Callable[[], Answer]) -> Answer:
    """The answer to a question that may change the notebook. Afterwards the notebook is as it was."""
    mark = notebook.mark()
    try:
        return ask()
    finally:
        notebook.rollback(mark)


def settled(engine: NamingEngine, asks: Mapping[str, Callable[[], Answer]]) -> dict[str, Answer]:
    """Return the answer to each question. Each may be called several times, so it must leave its notebook unchanged."""
    found: dict[str, Answer] = {}
    while len(found) < len(asks):
        for name, ask in asks.items():
            if name not in found:
                engine.guessed = False
                answer = ask()
                if not engine.guessed:
                    found[name] = answer
        engine.shared.compute()
    return {name: found[name] for name in asks}
