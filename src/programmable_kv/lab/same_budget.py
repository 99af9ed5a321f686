"""Baselines for `readers`: edits that recompute as many other tokens instead."""

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
from programmable_kv.notebook.movement import movement
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.prompt.readers import Why

ATTENTION = "attention_same_budget"
"""`selective` by attention, with as many tokens as `readers` computes."""
RANDOM_LINES = "random_lines_same_budget"
"""The null: the field, the open question, and lines that are not readers; as many tokens as `readers` computes."""
DEVIATION = "deviation_same_budget"
"""CacheBlend's rule: as many tokens as `readers` computes, those whose keys and values differ most from a full
prefill's. Source: Yao et al. (arXiv 2405.16444), section 4, which looks at the first layers; this looks at all. The
cost of finding the tokens is not counted."""
ARMS = (ATTENTION, DEVIATION, RANDOM_LINES)


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """A ranking whose scores [S] are already known. Slots after them rank last."""

    known: torch.Tensor
    rows_to_rank: ClassVar[int] = 0

    def scores(self, engine: object, buffer: KVBuffer, reader: Rows) -> torch.Tensor:
        later = self.known.new_full((buffer.length - len(self.known),), -1.0)
        return torch.cat([self.known, later])


def decisions(
    notebook: Notebook,
    edit: Mapping[str, str],
    rng: random.Random,
    ask: Callable[[Mode, int], Decision],
    arms: Sequence[str] = ARMS,
) -> Iterator[tuple[str, Decision]]:
    """Yield each arm with its decision. Rolls the notebook back after each.

    Args:
        edit: the one field that changes, with its new value.
        ask: (mode, k) -> the decision after the edit in that mode.
    """
    ((name, value),) = edit.items()
    readers = notebook.readers(name)
    places = _slots(notebook.spans(name))
    read = _slots([reader.span for reader in readers]) - places
    asked = _slots([reader.span for reader in readers if reader.why is Why.OPEN]) - places
    lines = _other_lines(notebook, notebook.spans(name)[0].stop, read | places)
    rng.shuffle(lines)
    others = [slot for line in lines for slot in line][: len(read) - len(asked)]
    null = torch.zeros(len(notebook))
    null[[*asked, *others]] = 1.0
    rankings: dict[str, Callable[[], tuple[Ranking, int]]] = {
        ATTENTION: lambda: (AttentionInfluence(), len(read)),
        DEVIATION: lambda: (Given(movement(notebook, name, value)), len(read)),
        RANDOM_LINES: lambda: (Given(null), len(asked) + len(others)),
    }
    for arm in arms:
        ranking, k = rankings[arm]()
        with _ranked_by(notebook, ranking):
            mark = notebook.mark()
            # If a policy has no other text, the null has nothing to compute besides the field.
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
    """The slots of each line from `start` on, without those taken. A token with a line break ends a line."""
    tokenizer, ids = notebook.model.tokenizer, notebook.ids
    lines: list[list[int]] = [[]]
    for slot in range(start, len(ids)):
        if slot not in taken:
            lines[-1].append(slot)
        if "\n" in tokenizer.decode([ids[slot]]):
            lines.append([])
    return [line for line in lines if line]
