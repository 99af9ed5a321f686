"""The context as its author wrote it: units of text in order, the fields in them, and every field's value.

A context is immutable: each operation returns a new one that shares the units. It has no tensors and no tokenizer
state; the ledger records what the cache holds of it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from programmable_kv.cache.span import Span
from programmable_kv.errors import UnknownPartError
from programmable_kv.prompt.fields import TEXT, FieldType
from programmable_kv.prompt.parts import Rendered
from programmable_kv.prompt.units import Kind, Replacement, Unit, replace_values


@dataclass(frozen=True, slots=True)
class FieldValue:
    """A field's value and type. `current` is valid now, `written` is in the text. Errata state the difference."""

    current: str
    written: str
    type: FieldType = TEXT


@dataclass(frozen=True)
class Context:
    """The units in slot order, and the value of every field."""

    units: tuple[Unit, ...] = ()
    fields: Mapping[str, FieldValue] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.starts[-1]

    @cached_property
    def derived(self) -> dict[str, Any]:
        """A cache, by name, for results derived from this context."""
        return {}

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first slot of every unit, then the number of slots."""
        return (0, *accumulate(len(unit) for unit in self.units))

    @cached_property
    def begins(self) -> tuple[int, ...]:
        """The first position of every unit, then the position after the last unit."""
        return tuple(accumulate((unit.positions for unit in self.units), initial=0))

    @cached_property
    def groups(self) -> tuple[Span, ...]:
        """Spans of unit indices, in order: the units of one skill form one span, every other unit a span of its own."""
        found: list[Span] = []
        for index, unit in enumerate(self.units):
            before = self.units[index - 1] if index else None
            follows = before is not None and before.name == unit.name and before.piece == unit.piece - 1
            if unit.piece > 1 and follows:
                found[-1] = Span(found[-1].start, index + 1)
            else:
                found.append(Span(index, index + 1))
        return tuple(found)

    def slots_of(self, units: Span) -> Span:
        """The slots of some consecutive units."""
        return Span(self.starts[units.start], self.starts[units.stop])

    def text_of(self, units: Span) -> str:
        """The text of some consecutive units."""
        return "".join(unit.text for unit in self.units[units.start : units.stop])

    @property
    def has_gaps(self) -> bool:
        """Whether some positions are kept free, so that slots and positions are numbered differently."""
        return self.begins[-1] != len(self)

    def positions_in(self, span: Span) -> Sequence[int]:
        """The position of every slot in a span."""
        if not self.has_gaps:
            return span.range
        found: list[int] = []
        for index in range(self.unit_at(span.start), len(self.units)):
            start, begins = self.starts[index], self.begins[index]
            if start >= span.stop:
                break
            first, last = max(span.start, start), min(span.stop, self.starts[index + 1])
            found += range(begins + first - start, begins + last - start)
        return found

    def position_of(self, slot: int) -> int:
        """The position of a slot; for the context's end, the position after the last unit."""
        return self.begins[-1] if slot >= len(self) else self.positions_in(Span(slot, slot + 1))[0]

    @property
    def ids(self) -> list[int]:
        return [token for unit in self.units for token in unit.ids]

    @property
    def text(self) -> str:
        return "".join(unit.text for unit in self.units)

    @property
    def rendered(self) -> Rendered:
        """The text, the characters of every field, and the characters that spell a special token but are plain text."""
        starts = accumulate((len(unit.text) for unit in self.units), initial=0)
        places: list[tuple[str, Span]] = []
        plain: list[Span] = []
        for start, unit in zip(starts, self.units, strict=False):
            places += [(place.name, place.characters.shifted(start)) for place in unit.places]
            plain += [span.shifted(start) for span in unit.plain]
        return Rendered(self.text, tuple(places), tuple(plain))

    def ends_with(self) -> str:
        """The text of the last unit that has text."""
        return next((unit.text for unit in reversed(self.units) if unit.text), "")

    # -- slots -------------------------------------------------------------------------------------------------------

    def unit_at(self, slot: int) -> int:
        """The index of the unit that holds a slot; for the context's end, the number of units."""
        return len(self.units) if slot >= len(self) else bisect_right(self.starts, slot) - 1

    def ids_in(self, span: Span) -> list[int]:
        """The token ids of a span of slots."""
        found: list[int] = []
        for index in range(self.unit_at(span.start), len(self.units)):
            begins = self.starts[index]
            if begins >= span.stop:
                break
            found += self.units[index].ids[max(0, span.start - begins) : span.stop - begins]
        return found

    def packed(self, span: Span) -> bytes:
        """The token ids of a span of slots, four bytes each."""
        return array("I", self.ids_in(span)).tobytes()

    @cached_property
    def places(self) -> Mapping[str, tuple[Span, ...]]:
        """For each field, the slots of every place of it, ascending."""
        found: dict[str, list[Span]] = {}
        for begins, unit in zip(self.starts, self.units, strict=False):
            for place in unit.places:
                found.setdefault(place.name, []).append(place.tokens.shifted(begins))
        return {name: tuple(spans) for name, spans in found.items()}

    def spans(self, name: str) -> tuple[Span, ...]:
        """The slots of every place of a field."""
        return self.places.get(name, ())

    def first_place(self, name: str) -> int:
        """The first slot whose token can have read a field; the context's end if the field has no place."""
        spans = self.spans(name)
        return spans[0].start if spans else len(self)

    @cached_property
    def _statements(self) -> tuple[tuple[int, str, str], ...]:
        """(slot, field, value) for every place and every erratum, ascending by slot."""
        found = []
        for begins, unit in zip(self.starts, self.units, strict=False):
            found += [(begins, name, value) for name, value in unit.corrects]
            found += [
                (begins + place.tokens.start, place.name, self.fields[place.name].written) for place in unit.places
            ]
        return tuple(sorted(found, key=lambda statement: statement[0]))

    def statements_in(self, span: Span) -> list[tuple[int, str, str]]:
        """(offset in the span, field, value) for every place and every erratum that begins in a span of slots."""
        low, high = (
            bisect_left(self._statements, bound, key=lambda item: item[0]) for bound in (span.start, span.stop)
        )
        return [(slot - span.start, name, value) for slot, name, value in self._statements[low:high]]

    @property
    def values(self) -> dict[str, str]:
        """Every field's current value, as it stands in the text."""
        return {name: value.current for name, value in self.fields.items()}

    @property
    def types(self) -> dict[str, FieldType]:
        """Every field's type."""
        return {name: value.type for name, value in self.fields.items()}

    @property
    def shown(self) -> dict[str, str]:
        """Every field's current value without the escapes that the surrounding text needs."""
        return {name: value.type.shown(value.current) for name, value in self.fields.items()}

    @property
    def first_places(self) -> list[tuple[int, str]]:
        """(first slot, field) for every field that has a place, ascending."""
        return sorted((spans[0].start, name) for name, spans in self.places.items() if name in self.fields)

    # -- errata ------------------------------------------------------------------------------------------------------

    def corrections(self, name: str) -> list[int]:
        """Indices of the units that are errata about a field."""
        return [index for index in self.errata if any(about == name for about, _ in self.units[index].corrects)]

    @cached_property
    def errata(self) -> tuple[int, ...]:
        """Indices of the units that are errata."""
        return tuple(index for index, unit in enumerate(self.units) if unit.kind is Kind.ERRATUM)

    def superseded(self, index: int) -> bool:
        """Whether a unit is an erratum that states a value other than the field's current one."""
        unit = self.units[index]
        return unit.kind is Kind.ERRATUM and any(
            name in self.fields and self.fields[name].current != value for name, value in unit.corrects
        )

    # -- other contexts ------------------------------------------------------------------------------------------------

    def with_units(self, units: Sequence[Unit]) -> Context:
        return Context(tuple(units), self.fields)

    def with_values(self, current: Mapping[str, str], *, written: bool = False) -> Context:
        """The context with other current values; `written`: the text has these values too."""
        changed = {}
        for name, value in current.items():
            was = self.fields[name]
            changed[name] = FieldValue(value, value if written else was.written, was.type)
        return Context(self.units, {**self.fields, **changed})

    def appended(self, *units: Unit) -> Context:
        return Context((*self.units, *(unit for unit in units if unit.positions)), self.fields)

    def split_at(self, slot: int, *, ends: bool = False) -> tuple[Context, int]:
        """A context in which a unit begins at `slot`, and that unit's index.

        `ends`: the boundary is the end of something, so units without tokens at that slot come after it; otherwise
        before it.

        Raises:
            UnknownPartError: the slot is outside the context.
            InvalidEditError: the text cannot be split there.
        """
        if not 0 <= slot <= len(self):
            raise UnknownPartError(f"there is no slot {slot} in a context of {len(self)} tokens")
        index = self.unit_at(slot)
        if self.starts[index] == slot:
            return self, self._outside_of_groups(bisect_left(self.starts, slot) if ends else index, ends=ends)
        halves = self.units[index].split(slot - self.starts[index])
        return self.with_units((*self.units[:index], *halves, *self.units[index + 1 :])), index + 1

    def _outside_of_groups(self, index: int, *, ends: bool) -> int:
        """The boundary, moved where needed so that no empty piece of a skill is cut off from the skill's tokens."""
        group = next((each for each in self.groups if each.start < index < each.stop), None)
        if group is None:
            return index
        before = self.starts[index] > self.starts[group.start]
        after = self.starts[group.stop] > self.starts[index]
        if not after and (before or ends):
            return group.stop
        return index if before else group.start

    def without_lost_fields(self) -> Context:
        """The context without the fields that no longer have a place."""
        held = {place.name for unit in self.units for place in unit.places}
        return replace(self, fields={name: value for name, value in self.fields.items() if name in held})

    def write(self, tokenizer: Any, changes: Mapping[str, str]) -> tuple[Context, list[Replacement]]:
        """Write new values in every place of the changed fields; they become both the current and the written values.

        Returns the new context and the replaced tokens in slot order, with their slots before and after the whole edit.
        """
        found: list[Replacement] = []
        units = list(self.units)
        grown = 0
        for index in self._holding(changes):
            begins = self.starts[index]
            units[index], replaced = replace_values(tokenizer, self.units[index], changes)
            found += [one.shifted(begins, begins + grown) for one in replaced]
            grown += len(units[index]) - len(self.units[index])
        return self.with_units(units).with_values(changes, written=True), found

    def _holding(self, names: Mapping[str, str]) -> Iterator[int]:
        """Indices of the units that have a place for any of these fields."""
        return (i for i, unit in enumerate(self.units) if any(place.name in names for place in unit.places))
