"""The parts of a context under `visibility="design"`, and which of them read which. No tensors of a model here.

- Text reads the text before it: no fields, no readers, no skills.
- A field's value reads the text before it, and itself.
- A reader is a line, or the rest of one, behind a field that it mentions or holds. It reads the text before it, the values of
  its fields, and earlier readers of one of them.
- A skill reads itself.
- Turns read everything.

Every part also reads its own earlier tokens.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from programmable_kv.cache.masks import PartReads
from programmable_kv.cache.span import Span
from programmable_kv.prompt.context import Context
from programmable_kv.prompt.readers import declared_words, mention_pattern
from programmable_kv.prompt.units import Kind, Unit

_VALUE = "\ufffd"
"""stands for a value, also an empty one, while lines are searched: a part's kind must not depend on a field's value"""
_LINE = re.compile(r"[^\n]*\n|[^\n]+")

Words = Mapping[str, Sequence[str]]
"""field -> what else a line says when it speaks of it (`Notebook.mentions`)"""


class PartKind(StrEnum):
    """What a part may read."""

    TEXT = "text"
    VALUE = "value"
    READER = "reader"
    SKILL = "skill"
    TURN = "turn"


@dataclass(frozen=True, slots=True)
class DesignPart:
    """Consecutive slots that may read the same."""

    span: Span
    position: int
    """of its first token"""
    kind: PartKind
    fields: frozenset[str] = frozenset()
    """of a value, the field; of a reader, the fields that it reads"""
    unit: int = 0
    """which unit of the context it is in"""


def parts_of(context: Context, words: Words) -> tuple[DesignPart, ...]:
    """The parts of a context in slot order, without empty ones.

    A value is a unit of its own (see `units.py`), and the turns are units of the kind `TURN`.
    """
    found: list[DesignPart] = []
    text: list[int] = []
    searcher = _Searcher(context, words)
    for index, unit in enumerate(context.units):
        if unit.kind is Kind.PREFILL:
            text.append(index)
            continue
        found += searcher.parts_in(text)
        text = []
        start, begins = context.starts[index], context.begins[index]
        if unit.kind is Kind.SKILL:
            found += (DesignPart(span, begins + span.start - start, PartKind.SKILL, unit=index)
                      for span in _pieces(unit, start))  # fmt: skip
        else:
            found.append(DesignPart(Span(start, start + len(unit)), begins, PartKind.TURN, unit=index))
    found += searcher.parts_in(text)
    return tuple(part for part in found if len(part.span))


def _pieces(skill: Unit, start: int) -> Iterator[Span]:
    """A skill's slots, cut where a value in it begins: what stands before a value does not change with it."""
    cuts = sorted({0, len(skill), *(place.tokens.start for place in skill.places)})
    for first, stop in pairwise(cuts):
        yield Span(start + first, start + stop)


class _Searcher:
    """Finds the parts of a context's own text, line by line."""

    def __init__(self, context: Context, words: Words) -> None:
        self._context = context
        self._patterns = {
            name: [mention_pattern(word) for word in (name, *declared_words(words, name))] for name in context.fields
        }
        self._ends = {name: spans[0].stop for name, spans in context.places.items()}

    def parts_in(self, units: Sequence[int]) -> Iterator[DesignPart]:
        """The parts of some consecutive units of text and values, which are read as one text."""
        context = self._context
        text, begins = "", []
        for index in units:
            begins.append(len(text))
            unit = context.units[index]
            text += _VALUE if unit.places else unit.text
        holds = [(begins[number], context.units[index].places[0].name)
                 for number, index in enumerate(units) if context.units[index].places]  # fmt: skip
        lines = [Span(*match.span()) for match in _LINE.finditer(text)]
        starts = np.array([line.start for line in lines])
        fields = {line.start: self._fields(text, line, holds) for line in lines}
        for number, index in enumerate(units):
            unit, start = context.units[index], context.starts[index]
            if unit.places:
                name = frozenset({unit.places[0].name})
                span = Span(start, start + len(unit))
                yield DesignPart(span, context.begins[index], PartKind.VALUE, name, index)
                continue
            for tokens, line in _by_line(unit, begins[number], lines, starts):
                span = tokens.shifted(start)
                read = frozenset(name for name in fields[line.start] if self._ends[name] <= span.start)
                kind = PartKind.READER if read else PartKind.TEXT
                yield DesignPart(span, context.begins[index] + tokens.start, kind, read, index)

    def _fields(self, text: str, line: Span, holds: Sequence[tuple[int, str]]) -> frozenset[str]:
        """The fields that a line mentions or holds, wherever they stand."""
        said = text[line.start : line.stop]
        mentioned = {name for name, patterns in self._patterns.items()
                     if name in self._ends and any(pattern.search(said) for pattern in patterns)}  # fmt: skip
        first, last = (bisect_left(holds, (at, "")) for at in (line.start, line.stop))
        held = {name for _, name in holds[first:last]}
        return frozenset(mentioned | held)


def _by_line(
    unit: Unit, begins: int, lines: Sequence[Span], starts: np.ndarray[Any, np.dtype[np.int64]]
) -> Iterator[tuple[Span, Span]]:
    """(tokens of a unit, the line in which they begin), for a unit that begins at a character of a text with these lines."""
    which = np.searchsorted(starts, unit.offsets[:, 0] + begins, side="right") - 1
    cuts = [0, *(np.flatnonzero(np.diff(which)) + 1).tolist(), len(unit)]
    for first, stop in pairwise(cuts):
        if first < stop:
            yield Span(first, stop), lines[int(which[first])]


def reads_of(parts: Sequence[DesignPart], tokens: int, after: int = 0) -> PartReads:
    """Which slots read which, as a mask made of blocks; `after`: so many later slots read everything."""
    part_of = np.full(tokens + after, len(parts), dtype=np.int64)
    for number, part in enumerate(parts):
        part_of[part.span.start : part.span.stop] = number
    return PartReads(torch.from_numpy(part_of), torch.from_numpy(_table(parts)))


def _table(parts: Sequence[DesignPart]) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """[parts + 1, parts + 1] booleans: may the first read the second? The last one stands for what comes after all of them."""
    count = len(parts) + 1
    kinds = np.array([*(part.kind for part in parts), PartKind.TURN])
    is_ = {kind: kinds == kind for kind in PartKind}
    names = sorted({name for part in parts for name in part.fields})
    member = np.zeros((count, len(names) + 1), dtype=bool)
    for number, part in enumerate(parts):
        member[number, [names.index(name) for name in part.fields]] = True
    shares = (member.astype(np.int32) @ member.T.astype(np.int32)) > 0
    reads_text = is_[PartKind.TEXT] | is_[PartKind.VALUE] | is_[PartKind.READER]
    units = np.array([*(part.unit for part in parts), -1])
    same_skill = is_[PartKind.SKILL][:, None] & is_[PartKind.SKILL][None, :] & (units[:, None] == units[None, :])
    drawn = is_[PartKind.VALUE] | is_[PartKind.READER]
    allowed = reads_text[:, None] & is_[PartKind.TEXT][None, :]
    allowed |= is_[PartKind.READER][:, None] & drawn[None, :] & shares
    allowed |= same_skill | is_[PartKind.TURN][:, None]
    table: np.ndarray[tuple[int, int], np.dtype[np.bool_]] = np.tril(allowed, -1) | np.eye(count, dtype=bool)
    return table


def reads_less(parts: Iterable[DesignPart]) -> bool:
    """Whether some of these parts may not read everything, so that computing them takes a mask."""
    return any(part.kind is not PartKind.TURN for part in parts)
