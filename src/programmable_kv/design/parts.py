"""The parts of a context under `visibility="design"`, and which of them read which. It uses no tensors of a model.

- Text reads the text before it, but no fields, no readers and no skills.
- A field's value reads the text before it, and itself.
- A reader is a line, or the rest of a line, after a field that it mentions or contains. It reads the text before it,
  the values of its fields, and earlier readers that share one of its fields.
- Turns read everything.

Every part also reads its own earlier tokens. A skill is a separate *scope*: these rules apply inside it, and nothing in
it reads anything outside. (A skill that was compiled under causal visibility is text from its first token to its last.)

An author can change this (`Declared`): a field can be read by all lines after it, or by none, and a skill can be open
to the text after it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from programmable_kv.cache.masks import PartReads
from programmable_kv.cache.span import Span
from programmable_kv.design.declared import Declared, ReadBy
from programmable_kv.prompt.context import Context
from programmable_kv.prompt.readers import mention_pattern
from programmable_kv.prompt.units import Kind, Unit

_VALUE = "\ufffd"
"""Stands for a value (even an empty one) while lines are searched: a part's kind must not depend on a field's value."""
_LINE = re.compile(r"[^\n]*\n|[^\n]+")


class PartKind(StrEnum):
    """What a part may read."""

    TEXT = "text"
    VALUE = "value"
    READER = "reader"
    TURN = "turn"


@dataclass(frozen=True, slots=True)
class Scope:
    """Text that reads only itself: the context's own text, or a skill."""

    skill: int = -1
    """the index of the skill's first unit; -1 for the context's own text"""
    position: int = 0
    """the position of its first token"""
    open: bool = False
    """whether this is a skill that the text after it reads"""

    @property
    def is_skill(self) -> bool:
        return self.skill >= 0


OWN = Scope()
"""The context's own text."""


@dataclass(frozen=True, slots=True)
class DesignPart:
    """Consecutive slots that may read the same parts."""

    span: Span
    position: int
    """the position of its first token"""
    kind: PartKind
    fields: frozenset[str] = frozenset()
    """for a value, its field; for a reader, the fields that it reads"""
    unit: int = 0
    """the index of the context's unit that it is in"""
    scope: Scope = OWN


def parts_of(context: Context, declared: Declared) -> tuple[DesignPart, ...]:
    """The parts of a context in slot order, without empty ones.

    A value is a separate unit (see `units.py`), except in a skill that was compiled under causal visibility. Turns are
    units of the kind `TURN`.
    """
    known: tuple[Declared, tuple[DesignPart, ...]] | None = context.derived.get("parts")
    if known is None or known[0] != declared:
        known = declared, _parts(context, declared)
        context.derived["parts"] = known
    return known[1]


def declared_in(context: Context, declared: Declared) -> Declared:
    """All declarations that apply in a context: its own, and those of the skills in it."""
    for words in {unit.words for unit in context.units} - {()}:
        declared = declared.with_words(dict(words))
    return declared


def _parts(context: Context, declared: Declared) -> tuple[DesignPart, ...]:
    declared = declared_in(context, declared)
    own = [index for index, unit in enumerate(context.units) if unit.kind is Kind.PREFILL]
    searcher = _Searcher(context, declared, own, OWN)
    found: list[DesignPart] = []
    text: list[int] = []
    for group in context.groups:
        first = group.start
        unit, start, begins = context.units[first], context.starts[first], context.begins[first]
        if unit.kind is Kind.PREFILL:
            text.append(first)
            continue
        found += searcher.parts_in(text)
        text = []
        if unit.kind is not Kind.SKILL:
            found.append(DesignPart(Span(start, start + len(unit)), begins, PartKind.TURN, unit=first))
            continue
        scope = Scope(first, begins, declared.opens(unit.name))
        if len(group) > 1:
            found += _Searcher(context, declared, group.range, scope).parts_in(group.range)
        else:
            found += (DesignPart(span, begins + span.start - start, PartKind.TEXT, unit=first, scope=scope)
                      for span in _pieces(unit, start))  # fmt: skip
    found += searcher.parts_in(text)
    return tuple(part for part in found if len(part.span))


def _pieces(skill: Unit, start: int) -> Iterator[Span]:
    """A skill's slots, cut at the start of each value in it: the text before a value does not depend on the value."""
    cuts = sorted({0, len(skill), *(place.tokens.start for place in skill.places)})
    for first, stop in pairwise(cuts):
        yield Span(start + first, start + stop)


class _Searcher:
    """Finds the parts of a scope's text, line by line."""

    def __init__(self, context: Context, declared: Declared, units: Sequence[int], scope: Scope) -> None:
        """`units`: the indices of all units in the scope."""
        self._context, self._scope = context, scope
        self._ends: dict[str, int] = {}
        """field -> the slot after its first place in the scope"""
        for index in units:
            for place in context.units[index].places:
                self._ends.setdefault(place.name, context.starts[index] + place.tokens.stop)
        by = {name: declared.readers_of(name) for name in self._ends}
        self._everywhere = frozenset(name for name, readers in by.items() if readers is ReadBy.ALL)
        self._mentioned = frozenset(name for name, readers in by.items() if readers is ReadBy.MENTIONS)
        self._patterns = {name: [mention_pattern(word) for word in declared.words_of(name)] for name in self._mentioned}

    def parts_in(self, units: Sequence[int]) -> Iterator[DesignPart]:
        """The parts of some consecutive units of text and values, which are searched as one text."""
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
        fields = self._fields(text, lines, holds)
        for number, index in enumerate(units):
            unit, start = context.units[index], context.starts[index]
            if unit.places:
                name = frozenset({unit.places[0].name})
                span = Span(start, start + len(unit))
                yield DesignPart(span, context.begins[index], PartKind.VALUE, name, index, self._scope)
                continue
            for tokens, line in _by_line(unit, begins[number], lines, starts):
                span = tokens.shifted(start)
                read = frozenset(name for name in fields[line.start] if self._ends[name] <= span.start)
                kind = PartKind.READER if read else PartKind.TEXT
                yield DesignPart(span, context.begins[index] + tokens.start, kind, read, index, self._scope)

    def _fields(self, text: str, lines: Sequence[Span], holds: Sequence[tuple[int, str]]) -> dict[int, frozenset[str]]:
        """Start of a line -> the fields that it reads, provided that it is after them.

        These are the fields that it mentions or contains, and the fields that all text reads.
        """
        starts = [line.start for line in lines]
        found = {start: set(self._everywhere) for start in starts}
        for at, name in holds:
            if name in self._mentioned:
                found[starts[bisect_right(starts, at) - 1]].add(name)
        for name, patterns in self._patterns.items():
            for start in {start for pattern in patterns for start in _lines_with(pattern, text, lines, starts)}:
                found[start].add(name)
        return {start: frozenset(fields) for start, fields in found.items()}


def _lines_with(pattern: re.Pattern[str], text: str, lines: Sequence[Span], starts: Sequence[int]) -> Iterator[int]:
    """The starts of the lines that contain a match. Each search runs over the rest of the text at once."""
    at = 0
    while (match := pattern.search(text, at)) is not None:
        line = lines[bisect_right(starts, match.start()) - 1]
        if match.end() <= line.stop:  # a phrase that continues in the next line counts for neither line
            yield line.start
        at = line.stop


def _by_line(
    unit: Unit, begins: int, lines: Sequence[Span], starts: np.ndarray[Any, np.dtype[np.int64]]
) -> Iterator[tuple[Span, Span]]:
    """(tokens of a unit, the line in which they begin). The unit begins at character `begins` of the lines' text."""
    which = np.searchsorted(starts, unit.offsets[:, 0] + begins, side="right") - 1
    cuts = [0, *(np.flatnonzero(np.diff(which)) + 1).tolist(), len(unit)]
    for first, stop in pairwise(cuts):
        if first < stop:
            yield Span(first, stop), lines[int(which[first])]


def reads_of(parts: Sequence[DesignPart], tokens: int, after: int = 0) -> PartReads:
    """Which slots read which, as a block mask; `after` is a number of later slots, which read everything."""
    part_of = np.full(tokens + after, len(parts), dtype=np.int64)
    for number, part in enumerate(parts):
        part_of[part.span.start : part.span.stop] = number
    return PartReads(torch.from_numpy(part_of), torch.from_numpy(_table(parts)))


def reads_behind(read: int, parts: Sequence[DesignPart], tokens: int) -> PartReads:
    """Which slots read which in a skill that is compiled behind `read` tokens; all of the skill reads those."""
    apart = reads_of(parts, tokens)
    part_of = torch.cat([torch.full((read,), len(parts)), apart.part_of])
    reads = apart.reads.clone()
    reads[:, len(parts)] = True
    return PartReads(part_of, reads)


def _table(parts: Sequence[DesignPart]) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """[parts + 1, parts + 1] booleans: whether the first may read the second. The last one means all later slots."""
    count = len(parts) + 1
    kinds = np.array([*(part.kind for part in parts), PartKind.TURN])
    scopes = np.array([*(part.scope.skill for part in parts), OWN.skill])
    opened = np.array([*(part.scope.open for part in parts), False])
    is_ = {kind: kinds == kind for kind in PartKind}
    names = sorted({name for part in parts for name in part.fields})
    member = np.zeros((count, len(names) + 1), dtype=bool)
    for number, part in enumerate(parts):
        member[number, [names.index(name) for name in part.fields]] = True
    shares = (member.astype(np.int32) @ member.T.astype(np.int32)) > 0
    written = ~is_[PartKind.TURN]
    drawn = is_[PartKind.VALUE] | is_[PartKind.READER]
    allowed = written[:, None] & is_[PartKind.TEXT][None, :]
    allowed |= is_[PartKind.READER][:, None] & drawn[None, :] & shares
    allowed &= scopes[:, None] == scopes[None, :]
    allowed |= (written & (scopes == OWN.skill))[:, None] & opened[None, :]
    allowed |= is_[PartKind.TURN][:, None]
    table: np.ndarray[tuple[int, int], np.dtype[np.bool_]] = np.tril(allowed, -1) | np.eye(count, dtype=bool)
    return table


def reads_less(parts: Iterable[DesignPart]) -> bool:
    """Whether some of these parts may not read everything, so that computing them needs a mask."""
    return any(part.kind is not PartKind.TURN for part in parts)
