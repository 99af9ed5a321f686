"""The bookkeeping of a cached context: its text, tokens and spans. No tensors here.

A context is a list of *units* that were tokenised one by one (the prefilled text, later turns, errata, skills). A unit's tokens
never merge with a neighbour's, so an edit re-tokenises inside one unit only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from programmable_kv.cache.span import Span
from programmable_kv.errors import InvalidEditError
from programmable_kv.notebook.parts import Rendered

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


@dataclass(slots=True)
class FieldState:
    """A field's values: `current` is the truth, `written` stands in its places."""

    current: str
    written: str


@dataclass(slots=True)
class Context:
    """Units in slot order, and the state of every field. Copying is cheap: units are immutable."""

    units: list[Unit] = field(default_factory=list)
    fields: dict[str, FieldState] = field(default_factory=dict)
    refreshed: frozenset[int] = frozenset()
    """slots that the last selective edit recomputed, outside fields"""

    def copy(self) -> Context:
        fields = {name: replace(state) for name, state in self.fields.items()}
        return Context(list(self.units), fields, self.refreshed)

    def __len__(self) -> int:
        return sum(len(unit) for unit in self.units)

    @property
    def ids(self) -> list[int]:
        return [token for unit in self.units for token in unit.ids]

    @property
    def text(self) -> str:
        return "".join(unit.text for unit in self.units)

    def starts(self) -> Iterator[tuple[int, Unit]]:
        """(first slot, unit) in order."""
        slot = 0
        for unit in self.units:
            yield slot, unit
            slot += len(unit)

    def spans(self, name: str) -> list[Span]:
        """The slots of every place of a field."""
        return [
            place.tokens.shifted(slot) for slot, unit in self.starts() for place in unit.places if place.name == name
        ]

    def split_at(self, slot: int) -> int:
        """Make a slot the start of a unit; returns that unit's index (the number of units for the context's end)."""
        if slot == len(self):
            return len(self.units)
        for index, (start, unit) in enumerate(self.starts()):
            if start == slot:
                return index
            if start < slot < start + len(unit):
                self.units[index : index + 1] = unit.split(slot - start)
                return index + 1
        raise InvalidEditError(f"there is no slot {slot} in a context of {len(self)} tokens")

    def forget_lost_fields(self) -> None:
        """Drop the fields that no text holds any more."""
        held = {place.name for unit in self.units for place in unit.places}
        self.fields = {name: state for name, state in self.fields.items() if name in held}

    def mark_stale(self, first: int) -> None:
        """Everything from unit `first` on was computed before what precedes it changed, and may stand elsewhere now."""
        self.refreshed = frozenset()
        for index in range(first, len(self.units)):
            unit = self.units[index]
            self.units[index] = unit.marked(Span(0, len(unit)), TokenState.STALE)

    def corrections(self, name: str) -> list[int]:
        """Indices of the units that are errata about a field."""
        return [i for i, unit in enumerate(self.units) if any(field == name for field, _ in unit.corrects)]

    def write(self, tokenizer: Any, changes: Mapping[str, str]) -> list[Replacement]:
        """Put new values into every place of the changed fields.

        Returns the replaced tokens in slot order, with their slots as of before and after the whole edit; places that
        share a token come back as one replacement.
        """
        found: list[Replacement] = []
        grown = slot = 0
        for index, unit in enumerate(self.units):
            length = len(unit)
            for number in range(len(unit.places)):
                place = unit.places[number]
                if place.name not in changes:
                    continue
                inside = len(unit) - length
                unit, old, new = replace_value(tokenizer, unit, place, changes[place.name])
                replacement = Replacement(old.shifted(slot - inside), new.shifted(slot + grown))
                if found and replacement.old.start <= found[-1].old.stop:
                    replacement = found.pop().joined(replacement)
                found.append(replacement)
            self.units[index] = unit
            grown += len(unit) - length
            slot += length
        return found

    # -- what was computed under which values --------------------------------------------------------------------

    def first_place(self, name: str) -> int:
        """The slot after a field's first place: tokens from here on can have read it. The end, if it is still to come."""
        return min((span.stop for span in self.spans(name)), default=len(self))

    def reading(self, slot: int) -> Readings:
        """What a token computed now, at `slot`, reads of each field: one value if all before it agrees, else a mixture.

        Of a field whose places were cut out, and which may come back, it reads what was noted before it.
        """
        lost: dict[str, frozenset[str | None]] = {
            name: frozenset({None})
            for begins, unit in self.starts()
            for name, seen in unit.read.items()
            if begins < slot and seen and name not in self.fields
        }
        return lost | {name: self._reading_of(name, state.written, slot) for name, state in self.fields.items()}

    def _reading_of(self, name: str, written: str, slot: int) -> frozenset[str | None]:
        seen: set[str | None] = {written}
        place = self.first_place(name)
        for begins, unit in self._following(name):
            if max(begins, place) >= slot:
                break
            seen |= unit.read[name]
            if any(corrected == name for corrected, _ in unit.corrects):
                seen.add(None)
        return frozenset(seen) if len(seen) == 1 else frozenset({None})

    def _following(self, name: str) -> Iterator[tuple[int, Unit]]:
        """The units that hold tokens after a field's first place."""
        place = self.first_place(name)
        return ((begins, unit) for begins, unit in self.starts() if begins + len(unit) > place)

    def read_only(self, name: str, value: str) -> bool:
        """Whether the field's places and every token after them have seen this value and no other."""
        return self.fields[name].written == value and all(
            unit.read[name] <= {value} for _, unit in self._following(name)
        )

    def known(self, name: str, value: str) -> bool:
        """`read_only`, and nothing here has read a preface that may say otherwise."""
        return self.read_only(name, value) and not any(unit.foreign for unit in self.units)

    def computed_base(self, slot: int) -> TokenState:
        """The base state of a token computed now, at `slot`: exact only on exact parts, or repaired ones (which are)."""
        for begins, unit in self.starts():
            if begins >= slot:
                break
            if not set(unit.base[: slot - begins]) <= {TokenState.EXACT, TokenState.REPAIRED}:
                return TokenState.AFTER_EDIT
        return TokenState.EXACT

    def append(self, unit: Unit) -> None:
        """Take in a unit that was computed at the context's end."""
        end = len(self)
        unit = replace(unit, read=self.reading(end))
        self.units.append(unit.marked(Span(0, len(unit)), self.computed_base(end)))

    def note_computed_from(self, start: int) -> None:
        """Every token from slot `start` on was computed, in one go, on what precedes it."""
        begins = 0
        base = self.computed_base(start)
        for index, unit in enumerate(self.units):
            if begins + len(unit) > start:
                now = self.reading(max(start, begins))
                read = {}
                for name in now.keys() | unit.read.keys():
                    kept = max(begins, self.first_place(name)) < start  # some of its readers in this unit stay
                    value = now.get(name, frozenset())
                    read[name] = unit.read.get(name, frozenset()) | value if kept else value
                recomputed = Span(max(0, start - begins), len(unit))
                foreign = unit.foreign and begins < start
                self.units[index] = replace(unit, read=read, foreign=foreign).marked(recomputed, base, weaken=False)
            begins += len(unit)

    def note_computed(self, slots: Iterable[int], *, repaired: bool = False) -> None:
        """Some tokens were computed on what precedes them. A field's own places do not count as readers of it.

        `repaired`: they are a spliced skill's, and called so where they are as good as exact.
        """
        own = {name: {slot for span in self.spans(name) for slot in span.range} for name in self.fields}
        first = {name: self.first_place(name) for name in self.fields}
        bounds = list(self.starts())
        for slot in sorted(slots):
            index = max(i for i, (begins, _) in enumerate(bounds) if begins <= slot)
            unit, now = self.units[index], self.reading(slot)
            read = dict(unit.read)
            for name, value in now.items():
                if slot >= first.get(name, 0) and slot not in own.get(name, ()):
                    read[name] = read.get(name, frozenset()) | value
            token = slot - bounds[index][0]
            base = self.computed_base(slot)
            base = TokenState.REPAIRED if repaired and base is TokenState.EXACT else base
            unit = unit.marked(Span(token, token + 1), base, weaken=False)
            self.units[index] = replace(unit, read=read)

    def states(self, relocated: Iterable[int] = ()) -> list[TokenState]:
        """The state of every cached token, derived from what it has read and which slots were `relocated`."""
        states: list[TokenState] = []
        for unit in self.units:
            states += [TokenState.ERRATUM] * len(unit) if unit.kind is Kind.ERRATUM else unit.base_states
        for name, field_state in self.fields.items():
            place = self.first_place(name)
            for begins, unit in self._following(name):
                mark = _worth(unit.read[name], field_state.current)
                if unit.kind is not Kind.ERRATUM:
                    for slot in range(max(begins, place), begins + len(unit)):
                        states[slot] = weakest([states[slot], mark])
        for slot in self.refreshed:
            if states[slot] in (TokenState.STALE, TokenState.AFTER_EDIT):
                states[slot] = TokenState.REFRESHED
        for name, field_state in self.fields.items():
            for span in self.spans(name):
                if field_state.written != field_state.current:
                    mark = TokenState.STALE
                elif not self.read_only(name, field_state.written):
                    mark = TokenState.REFRESHED
                else:
                    continue
                states[span.start : span.stop] = [mark] * len(span)
        for slot in relocated:
            states[slot] = weakest([states[slot], TokenState.RELOCATED])
        return states


def _worth(read: frozenset[str | None], current: str) -> TokenState:
    """The state of tokens that were computed under these values of a field."""
    if read <= {current}:
        return TokenState.EXACT
    return TokenState.AFTER_EDIT if read <= {current, None} else TokenState.STALE
