"""The pieces of a cached context: units of text that were tokenised one by one, and the fields in them. No tensors here.

A unit's tokens never merge with a neighbour's, so an edit re-tokenises inside one unit only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from programmable_kv.cache.span import Span
from programmable_kv.errors import InvalidEditError
from programmable_kv.prompt.parts import Rendered

_MARGIN = 12
"""tokens re-tokenised on each side of a changed value; the outer half must come out as it was"""


class Kind(StrEnum):
    """Why a unit is in the context."""

    PREFILL = "prefill"
    TURN = "turn"
    SKILL = "skill"
    ERRATUM = "erratum"


class TokenState(StrEnum):
    """What a cached token's keys and values are worth, strongest first; a join of spans takes the weakest."""

    EXACT = "exact"
    RELOCATED = "relocated"
    """computed at another position, alone or behind a preface, and rotated to this one; or kept in fewer bits"""
    REPAIRED = "repaired"
    """the seam of a spliced skill, computed again in its place"""
    REFRESHED = "refreshed"
    ERRATUM = "erratum"
    AFTER_EDIT = "after edit"
    """computed on a context that held traces of several values of a field"""
    STALE = "stale"

    @property
    def rank(self) -> int:
        return list(TokenState).index(self)


def weakest(states: Sequence[TokenState]) -> TokenState:
    """The state of a span that joins others."""
    return max(states, key=lambda state: state.rank, default=TokenState.EXACT)


@dataclass(frozen=True, slots=True)
class Place:
    """One occurrence of a field in a unit: the characters of its value, and the tokens that hold any of them."""

    name: str
    characters: Span
    tokens: Span


Readings = Mapping[str, frozenset[str | None]]
"""for each field, the values under which some tokens were computed; None for a mixture of several"""


@dataclass(frozen=True, slots=True)
class Unit:
    """A run of text that was tokenised on its own. `offsets` are the characters of each token."""

    kind: Kind
    text: str
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    special: bool
    """whether the tokenizer added its own special tokens (only for raw text at the start of a context)"""
    places: tuple[Place, ...] = ()
    corrects: tuple[tuple[str, str], ...] = ()
    """for an erratum: the (field, value) it states"""
    read: Readings = field(default_factory=dict)
    """what those of its tokens that follow a field have read of it; nothing, if they were computed without it"""
    name: str = ""
    """of the skill"""
    foreign: bool = False
    """whether some of its tokens read a preface that is not in the context: what that says of a field is not known"""
    base: tuple[TokenState, ...] = ()
    """each token's state as far as the parts before it are concerned; empty where all are exact"""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def base_states(self) -> tuple[TokenState, ...]:
        return self.base or (TokenState.EXACT,) * len(self.ids)

    def marked(self, tokens: Span, state: TokenState, *, weaken: bool = True) -> Unit:
        """With a state set for some of its tokens; a state that is weaker already stays, unless `weaken` is False."""
        base = list(self.base_states)
        for token in tokens.range:
            base[token] = weakest([base[token], state]) if weaken else state
        return replace(self, base=tuple(base) if any(s is not TokenState.EXACT for s in base) else ())

    def split(self, token: int) -> tuple[Unit, Unit]:
        """Two units out of one, the second from `token` on.

        Raises:
            InvalidEditError: the boundary lies inside a field's value, or is none of the text (a character of several tokens).
        """
        for place in self.places:
            if place.tokens.start < token < place.tokens.stop:
                raise InvalidEditError(
                    f"token {token} of this part lies inside the value of {place.name}: a value cannot be split. Choose "
                    "a boundary before or after it."
                )
        character = self.offsets[token][0]
        if self.offsets[token - 1][1] > character:
            raise InvalidEditError(
                f"tokens {token - 1} and {token} of this part share a character, so the text cannot be split there. Choose "
                "a boundary one token earlier or later."
            )
        head = replace(
            self, text=self.text[:character], ids=self.ids[:token], offsets=self.offsets[:token],
            places=tuple(p for p in self.places if p.tokens.stop <= token), base=self.base[:token],
        )  # fmt: skip
        tail = replace(
            self, text=self.text[character:], ids=self.ids[token:],
            offsets=tuple((a - character, b - character) for a, b in self.offsets[token:]), special=False,
            places=tuple(Place(p.name, p.characters.shifted(-character), p.tokens.shifted(-token))
                         for p in self.places if p.tokens.start >= token),
            base=self.base[token:],
        )  # fmt: skip
        return head, tail


@dataclass(frozen=True, slots=True)
class Replacement:
    """Tokens that an edit replaces: `old` in the slots before the edit, `new` in those after it."""

    old: Span
    new: Span

    @property
    def growth(self) -> int:
        return len(self.new) - len(self.old)

    def joined(self, later: Replacement) -> Replacement:
        """One replacement that covers this one and a later one which touches it."""
        old = Span(self.old.start, max(self.old.stop, later.old.stop))
        start = self.new.start
        return Replacement(old, Span(start, start + len(old) + self.growth + later.growth))


def tokenised(
    tokenizer: Any, rendered: Rendered, kind: Kind, *, special: bool = False, corrects: tuple[tuple[str, str], ...] = ()
) -> Unit:
    """Tokenise a text on its own, with the token span of every field in it."""
    ids, offsets = _encode(tokenizer, rendered.text, special)
    places = tuple(Place(name, span, _covering(offsets, span)) for name, span in rendered.places)
    return Unit(kind, rendered.text, ids, offsets, special, places, corrects)


def _encode(tokenizer: Any, text: str, special: bool) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    return tuple(encoded["input_ids"]), tuple((int(a), int(b)) for a, b in encoded["offset_mapping"])


def _covering(offsets: Sequence[tuple[int, int]], characters: Span) -> Span:
    """The tokens that hold any of the characters: a token that also holds a neighbour widens the span."""
    hit = [i for i, (a, b) in enumerate(offsets) if a < characters.stop and b > characters.start]
    return Span(hit[0], hit[-1] + 1)


def replace_value(tokenizer: Any, unit: Unit, place: Place, value: str) -> tuple[Unit, Span, Span]:
    """The unit with a new value in one place; the tokens that changed before (old span) and after (new span).

    Re-tokenises a few tokens around the value and checks that the outermost came out as they were; if a merge reaches
    further than that, the whole unit is tokenised again. The spans cover the value and whatever merged with it.
    """
    text = unit.text[: place.characters.start] + value + unit.text[place.characters.stop :]
    growth = len(value) - len(place.characters)
    local = _locally(tokenizer, unit, place, text, growth)
    ids, offsets = local if local is not None else _encode(tokenizer, text, unit.special)

    head = 0
    while head < min(len(ids), place.tokens.start) and ids[head] == unit.ids[head]:
        head += 1
    tail, tail_limit = 0, min(len(ids) - head, len(unit.ids) - place.tokens.stop)
    while tail < tail_limit and ids[-1 - tail] == unit.ids[-1 - tail]:
        tail += 1
    characters = Span(place.characters.start, place.characters.stop + growth)
    covering = _covering(offsets, characters)
    # The changed tokens, and at least every token that holds a character of the new value.
    new = Span(min(head, covering.start), max(len(ids) - tail, covering.stop))
    old = Span(new.start, len(unit.ids) - (len(ids) - new.stop))

    places = []
    for other in unit.places:
        moved = other.characters
        if other is place:
            moved = characters
        elif other.characters.start >= place.characters.stop:
            moved = other.characters.shifted(growth)
        places.append(Place(other.name, moved, _covering(offsets, moved)))
    base = unit.base and (*unit.base[: old.start], *(TokenState.EXACT,) * len(new), *unit.base[old.stop :])
    return replace(unit, text=text, ids=ids, offsets=offsets, places=tuple(places), base=base), old, new


def _locally(
    tokenizer: Any, unit: Unit, place: Place, text: str, growth: int
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]] | None:
    """Ids and offsets of the changed unit from a window around the place, or None if the window does not settle it."""
    first, last = place.tokens.start - _MARGIN, place.tokens.stop + _MARGIN
    if first < 1 or last >= len(unit.ids):
        return None
    start, stop = unit.offsets[first][0], unit.offsets[last - 1][1]
    before_ids, _ = _encode(tokenizer, unit.text[start:stop], special=False)
    if before_ids != unit.ids[first:last]:
        return None  # this tokenizer's result depends on more than the window
    window_ids, window_offsets = _encode(tokenizer, text[start : stop + growth], special=False)
    guard = _MARGIN // 2
    if (
        len(window_ids) < 2 * guard
        or window_ids[:guard] != before_ids[:guard]
        or window_ids[-guard:] != before_ids[-guard:]
    ):
        return None
    ids = unit.ids[:first] + window_ids + unit.ids[last:]
    offsets = (
        *unit.offsets[:first],
        *((a + start, b + start) for a, b in window_offsets),
        *((a + growth, b + growth) for a, b in unit.offsets[last:]),
    )
    return ids, offsets
