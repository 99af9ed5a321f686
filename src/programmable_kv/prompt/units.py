"""Units: pieces of text that are tokenised separately, and the fields in them. No tensors here.

A unit's tokens never merge with a neighbour's, so an edit re-tokenises only the units that hold the field, and in them
only the text around the value.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from itertools import accumulate
from operator import itemgetter
from typing import Any

import numpy as np

from programmable_kv.cache.span import Span
from programmable_kv.errors import InvalidEditError
from programmable_kv.prompt.parts import Rendered, unshielded
from programmable_kv.prompt.tokens import Offsets, encode

_MARGIN = 12
"""Tokens re-tokenised on each side of a changed value."""
_GUARD = _MARGIN // 2
"""The outermost of these tokens, which must stay the same: otherwise a merge may reach beyond the window."""


class Kind(StrEnum):
    """Why a unit is in the context."""

    PREFILL = "prefill"
    TURN = "turn"
    SKILL = "skill"
    ERRATUM = "erratum"


@dataclass(frozen=True, slots=True)
class Place:
    """One occurrence of a field in a unit: the characters of its value, and the tokens that hold any of them."""

    name: str
    characters: Span
    tokens: Span


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """A piece of text that was tokenised on its own."""

    kind: Kind
    text: str
    ids: tuple[int, ...]
    offsets: Offsets
    special: bool = False
    """Whether the tokenizer added its own special tokens (only for raw text at the start of a context)."""
    places: tuple[Place, ...] = ()
    """The places of fields, ascending."""
    corrects: tuple[tuple[str, str], ...] = ()
    """For an erratum: the (field, value) pairs that it states."""
    name: str = ""
    """For a skill: its name."""
    plain: tuple[Span, ...] = ()
    """Characters that are plain text though they spell a special token, ascending; those of values are not listed."""
    width: int = 0
    """Positions reserved for this unit, if more than its tokens; the next unit begins after all of them."""
    read: tuple[int, ...] = ()
    """For a skill: ids of the tokens that it read while it was compiled but does not contain."""
    piece: int = 0
    """For a skill of several units: the number of this unit, from 1; 0 if the skill is one unit."""
    words: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """For a skill of several units: (field, the other words by which its lines refer to the field)."""

    def __len__(self) -> int:
        return len(self.ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Unit):
            return NotImplemented
        return self._key() == other._key() and np.array_equal(self.offsets, other.offsets)

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        return (
            self.kind, self.text, self.ids, self.special, self.places, self.corrects, self.name, self.plain, self.width,
            self.read, self.piece, self.words,
        )  # fmt: skip

    @property
    def positions(self) -> int:
        """The number of positions that the unit takes."""
        return max(self.width, len(self.ids))

    def covering(self, characters: Span) -> Span:
        """The tokens that hold any of these characters."""
        return _covering(self.offsets, characters)

    def text_of(self, tokens: Span) -> str:
        """The text of a span of tokens."""
        return (
            self.text[int(self.offsets[tokens.start, 0]) : int(self.offsets[tokens.stop - 1, 1])] if len(tokens) else ""
        )

    def split(self, token: int) -> tuple[Unit, Unit]:
        """Split the unit in two. The second begins at `token`.

        Raises:
            InvalidEditError: the boundary lies inside a field's value, or inside a character that spans several tokens.
        """
        for place in self.places:
            if place.tokens.start < token < place.tokens.stop:
                raise InvalidEditError(
                    f"token {token} of this part is inside the value of {place.name}: a value cannot be split. Choose a "
                    "boundary before or after it."
                )
        character = int(self.offsets[token, 0])
        if self.offsets[token - 1, 1] > character:
            raise InvalidEditError(
                f"tokens {token - 1} and {token} of this part share a character, so the text cannot be split there. Choose "
                "a boundary one token earlier or later."
            )
        head = replace(
            self, text=self.text[:character], ids=self.ids[:token], offsets=self.offsets[:token],
            places=tuple(p for p in self.places if p.tokens.stop <= token),
            plain=tuple(span for span in self.plain if span.start < character),
        )  # fmt: skip
        tail = replace(
            self, text=self.text[character:], ids=self.ids[token:], offsets=self.offsets[token:] - character,
            special=False,
            places=tuple(Place(p.name, p.characters.shifted(-character), p.tokens.shifted(-token))
                         for p in self.places if p.tokens.start >= token and p.tokens.stop > token),
            plain=tuple(span.shifted(-character) for span in self.plain if span.start >= character),
        )  # fmt: skip
        return head, tail


@dataclass(frozen=True, slots=True)
class Replacement:
    """Tokens that an edit replaces: `old` is their span before the edit, `new` their span after it."""

    old: Span
    new: Span

    @property
    def growth(self) -> int:
        return len(self.new) - len(self.old)

    def shifted(self, old: int, new: int) -> Replacement:
        return Replacement(self.old.shifted(old), self.new.shifted(new))


def tokenised(
    tokenizer: Any, rendered: Rendered, kind: Kind, *, special: bool = False, corrects: tuple[tuple[str, str], ...] = ()
) -> Unit:
    """Tokenise a text on its own, with the token span of every field in it."""
    rendered = unshielded(rendered)
    values = [span for _, span in rendered.places]
    ids, offsets = encode(tokenizer, rendered.text, [*rendered.plain, *values], special=special)
    places = tuple(Place(name, span, _covering(offsets, span)) for name, span in rendered.places)
    return Unit(kind, rendered.text, ids, offsets, special, places, corrects, plain=rendered.plain)


def joined_unit(units: Sequence[Unit]) -> Unit:
    """Consecutive units as one unit with the same tokens."""
    begins = [0, *accumulate(len(unit.text) for unit in units)]
    starts = [0, *accumulate(len(unit) for unit in units)]
    offsets: Offsets = np.concatenate([unit.offsets + np.int32(at) for unit, at in zip(units, begins, strict=False)])
    return Unit(
        units[0].kind,
        "".join(unit.text for unit in units),
        tuple(token for unit in units for token in unit.ids),
        offsets,
        places=tuple(Place(place.name, place.characters.shifted(at), place.tokens.shifted(start))
                     for unit, at, start in zip(units, begins, starts, strict=False) for place in unit.places),
        plain=tuple(span.shifted(at) for unit, at in zip(units, begins, strict=False) for span in unit.plain),
    )  # fmt: skip


_START, _STOP = itemgetter(0), itemgetter(1)


def _covering(offsets: Offsets, characters: Span) -> Span:
    """The tokens that hold any of the characters. A token that also holds a neighbouring character widens the span.

    For an empty span of characters (an empty value) it is the empty span between two tokens there, or the token around
    them.
    """
    first = bisect_right(offsets, characters.start, key=_STOP)
    last = bisect_left(offsets, characters.stop, key=_START)
    return Span(first, max(first, last))


def replace_values(tokenizer: Any, unit: Unit, changes: Mapping[str, str]) -> tuple[Unit, list[Replacement]]:
    """The unit with new values in all places of the changed fields, and the tokens replaced (counted within the unit).

    Places close to each other are re-tokenised in one window that adds a few tokens on either side. If merges reach
    beyond a window, the whole unit is tokenised again, and all tokens between its unchanged beginning and end are
    replaced.
    """
    changed = [place for place in unit.places if place.name in changes]
    if not changed:
        return unit, []
    retokenise = partial(_retokenised, tokenizer, unit, changes)
    windows = [retokenise(group, local=True) for group in _grouped(changed)]
    found = [window for window in windows if window is not None]
    if len(found) < len(windows):
        whole = retokenise(changed, local=False)
        assert whole is not None
        found = [whole]
    return _assembled(unit, changes, found)


def _grouped(places: Sequence[Place]) -> list[list[Place]]:
    """The places in groups, so that the windows of different groups do not overlap."""
    groups: list[list[Place]] = []
    for place in places:
        if groups and place.tokens.start - groups[-1][-1].tokens.stop < 2 * _MARGIN:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


@dataclass(frozen=True, slots=True)
class _Window:
    """New tokens for the unit's tokens `old`. Offsets count in the unit's text after this change alone."""

    old: Span
    ids: tuple[int, ...]
    offsets: Offsets
    growth: int
    """Characters that the text gains."""


def _retokenised(
    tokenizer: Any, unit: Unit, changes: Mapping[str, str], group: Sequence[Place], *, local: bool
) -> _Window | None:
    """The tokens that change with new values in neighbouring places; None if a merge may reach beyond the window."""
    first = max(0, group[0].tokens.start - _MARGIN) if local else 0
    last = min(len(unit), group[-1].tokens.stop + _MARGIN) if local else len(unit)
    start = int(unit.offsets[first, 0]) if first else 0
    stop = int(unit.offsets[last - 1, 1]) if last < len(unit) else len(unit.text)
    special = unit.special and first == 0
    text, values = _written(unit.text, start, stop, group, changes)
    ids, offsets = encode(tokenizer, text, _plain_in(unit, start, stop, changes), special=special)
    if local:
        before, _ = encode(tokenizer, unit.text[start:stop], _plain_in(unit, start, stop, {}), special=special)
        aligned = _common(before, unit.ids[first:last], from_end=True)
        # Some tokenizers treat the beginning of a text differently (a metaspace): the window's first few tokens may
        # differ from the unit's, provided that they differ alike before and after the change and do not reach the
        # value.
        own, skipped = len(before) - aligned, last - first - aligned
        clear = skipped + 2 <= group[0].tokens.start - first or own == skipped == 0
        guard = own + 2 if own else _GUARD if first else 0
        left = ids[:guard] == before[:guard]
        right = last == len(unit) or ids[-_GUARD:] == before[-_GUARD:]
        if not (clear and left and right and own <= _GUARD and len(ids) >= own):
            return None
        first, ids, offsets = first + skipped, ids[own:], offsets[own:]
    offsets = offsets + np.int32(start)
    old_ids = unit.ids[first:last]
    covering = _covering(offsets, values)
    head = min(_common(ids, old_ids), covering.start, group[0].tokens.start - first)
    tail = min(
        _common(ids, old_ids, from_end=True),
        len(ids) - max(head, covering.stop),
        last - max(first + head, group[-1].tokens.stop),
    )
    kept = len(ids) - tail
    return _Window(Span(first + head, last - tail), ids[head:kept], offsets[head:kept], len(text) - (stop - start))


def _written(text: str, start: int, stop: int, group: Sequence[Place], changes: Mapping[str, str]) -> tuple[str, Span]:
    """The characters [start, stop) with new values, and the span of the text from the first new value to the last."""
    pieces, cursor = [], start
    for place in group:
        pieces += [text[cursor : place.characters.start], changes[place.name]]
        cursor = place.characters.stop
    values_stop = start + sum(map(len, pieces))
    pieces.append(text[cursor:stop])
    return "".join(pieces), Span(group[0].characters.start, values_stop)


def _plain_in(unit: Unit, start: int, stop: int, changes: Mapping[str, str]) -> list[Span]:
    """The characters of a window that are plain text after the changes: values, and what is plain text in the unit.

    They are counted from the window's beginning.
    """
    found: list[Span] = []
    grown = -start
    held = [(place.characters, changes.get(place.name)) for place in unit.places] + [(s, None) for s in unit.plain]
    for span, value in sorted(held, key=lambda item: item[0]):
        if span.stop < start or span.start > stop:
            continue
        length = len(span) if value is None else len(value)
        found.append(Span(max(0, span.start + grown), max(0, span.start + grown + length)))
        grown += length - len(span)
    return found


def _common(one: Sequence[int], other: Sequence[int], *, from_end: bool = False) -> int:
    """The number of tokens that two sequences have in common at their beginning (or end)."""
    shortest = min(len(one), len(other))
    if from_end:
        one, other = one[len(one) - shortest :][::-1], other[len(other) - shortest :][::-1]
    if one[:shortest] == other[:shortest]:
        return shortest
    return next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def _assembled(unit: Unit, changes: Mapping[str, str], windows: Sequence[_Window]) -> tuple[Unit, list[Replacement]]:
    """The unit with the new tokens of every window, and the tokens that they replace."""
    ids: list[int] = []
    offsets: list[Offsets] = []
    replacements = []
    cursor, grown = 0, 0
    for window in windows:
        ids += unit.ids[cursor : window.old.start]
        offsets.append(unit.offsets[cursor : window.old.start] + np.int32(grown))
        start = len(ids)
        ids += window.ids
        offsets.append(window.offsets + np.int32(grown))
        replacements.append(Replacement(window.old, Span(start, len(ids))))
        cursor, grown = window.old.stop, grown + window.growth
    ids += unit.ids[cursor:]
    offsets.append(unit.offsets[cursor:] + np.int32(grown))
    joined: Offsets = np.concatenate(offsets)
    pieces, places, end = [], [], 0
    length = 0
    for place in unit.places:
        before = unit.text[end : place.characters.start]
        value = changes.get(place.name, unit.text[place.characters.start : place.characters.stop])
        characters = Span(length + len(before), length + len(before) + len(value))
        places.append(Place(place.name, characters, _covering(joined, characters)))
        pieces += [before, value]
        length, end = characters.stop, place.characters.stop
    pieces.append(unit.text[end:])
    changed = replace(
        unit, text="".join(pieces), ids=tuple(ids), offsets=joined, places=tuple(places),
        plain=tuple(_after(span, unit.places, places) for span in unit.plain),
    )  # fmt: skip
    return changed, replacements


def _after(span: Span, old: Sequence[Place], new: Sequence[Place]) -> Span:
    """The span of characters outside any value after the values before them have changed."""
    before = [(was, now) for was, now in zip(old, new, strict=True) if was.characters.stop <= span.start]
    return span.shifted(before[-1][1].characters.stop - before[-1][0].characters.stop) if before else span
