"""The bookkeeping of a cached context: its units in order, its fields, and what was computed under which of their values.

No tensors here: a context is copied, planned on, compared and thrown away for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from programmable_kv.cache.span import Span
from programmable_kv.errors import InvalidEditError
from programmable_kv.prompt.units import (
    Kind,
    Readings,
    Replacement,
    TokenState,
    Unit,
    replace_value,
    weakest,
)


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
