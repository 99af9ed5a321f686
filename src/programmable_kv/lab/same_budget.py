"""What `readers` has to beat: as many other tokens, computed again in their place."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.span import Span
from programmable_kv.edits.modes import Mode
from programmable_kv.edits.ranking import AttentionInfluence, Ranking
from programmable_kv.engine import Rows
from programmable_kv.notebook.decision import Decision
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.prompt.readers import Why

ATTENTION = "attention_same_budget"
"""`selective` by attention, with as many tokens as `readers` computes"""
RANDOM_LINES = "random_lines_same_budget"
"""the null: the field, the open question, and lines that are no readers, as many tokens in all as `readers` computes"""
ARMS = (ATTENTION, RANDOM_LINES)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A ranking that puts some slots first."""

    slots: frozenset[int]
    rows_to_rank: ClassVar[int] = 0

    def scores(self, engine: object, buffer: KVBuffer, reader: Rows) -> torch.Tensor:
        return torch.tensor([float(slot in self.slots) for slot in range(buffer.length)])


def decisions(
    notebook: Notebook, edit: Mapping[str, str], rng: random.Random, ask: Callable[[Mode, int], Decision]
) -> Iterator[tuple[str, Decision]]:
    """Each arm with its decision; the notebook is put back after each.

    Args:
        edit: the one field that changes.
        ask: (mode, k) -> the decision after the edit in that mode.
    """
    (name,) = edit
    readers = notebook.readers(name)
    places = _slots(notebook.spans(name))
    read = _slots([reader.span for reader in readers]) - places
    asked = _slots([reader.span for reader in readers if reader.why is Why.OPEN]) - places
    lines = _other_lines(notebook, notebook.spans(name)[0].stop, read | places)
    rng.shuffle(lines)
    others = [slot for line in lines for slot in line][: len(read) - len(asked)]
    null = Chosen(frozenset(asked.union(others)))
    rankings: dict[str, tuple[Ranking, int]] = {
        ATTENTION: (AttentionInfluence(), len(read)),
        RANDOM_LINES: (null, len(null.slots)),
    }
    for arm, (ranking, k) in rankings.items():
        with _ranked_by(notebook, ranking):
            mark = notebook.mark()
            # Where a policy has no other text, the null has nothing to compute besides the field.
            decision = ask(Mode.SELECTIVE, k) if k else ask(Mode.IN_PLACE, 1)
            notebook.rollback(mark)
        yield arm, decision


@contextmanager
def _ranked_by(notebook: Notebook, ranking: Ranking) -> Iterator[None]:
    before = notebook.ranking
    notebook.ranking = ranking
    try:
        yield
    finally:
        notebook.ranking = before


def _slots(spans: Sequence[Span]) -> set[int]:
    return {slot for span in spans for slot in span.range}


def _other_lines(notebook: Notebook, start: int, taken: set[int]) -> list[list[int]]:
    """The slots of each line from `start` on, without those that are taken; lines by the tokens that hold a line break."""
    tokenizer, ids = notebook.model.tokenizer, notebook.ids
    lines: list[list[int]] = [[]]
    for slot in range(start, len(ids)):
        if slot not in taken:
            lines[-1].append(slot)
        if "\n" in tokenizer.decode([ids[slot]]):
            lines.append([])
    return [line for line in lines if line]
