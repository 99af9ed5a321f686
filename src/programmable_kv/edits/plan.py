"""The edit strategies, as plans: which slots stay, which move, which are computed. No tensors and no model here.

A plan is made on a copy of the context's bookkeeping, so that it can be printed, compared, tested or thrown away.
`editing.py` carries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from programmable_kv.ledger.context import Context
from programmable_kv.prompt.units import Kind, Unit


class Mode(StrEnum):
    """How an edit is carried out. The table in `docs/which-edit.md` says when to use which."""

    STALE = "stale"
    """change nothing in the cache: the control"""
    IN_PLACE = "in_place"
    """recompute the field's own tokens; what later tokens concluded from it stays"""
    ERRATUM = "erratum"
    """append a line that states the new value"""
    FIELD_ERRATUM = "field_erratum"
    """both: the default"""
    SELECTIVE = "selective"
    """the field's tokens and the k later ones that matter most"""
    SUFFIX = "suffix"
    """everything from the field on"""
    FULL = "full"
    """everything"""


DEFAULT_MODE = Mode.FIELD_ERRATUM
REFRESHES_FIELD = frozenset({Mode.IN_PLACE, Mode.FIELD_ERRATUM, Mode.SELECTIVE, Mode.SUFFIX, Mode.FULL})
_STATES_VALUE = frozenset({Mode.ERRATUM, Mode.FIELD_ERRATUM})
_RECOMPUTES_AFTER = frozenset({Mode.SUFFIX, Mode.FULL})


@dataclass(frozen=True, slots=True)
class Move:
    """The buffer's tail, from slot `start` on, goes to slot `to`; its positions shift by as much."""

    start: int
    to: int


@dataclass(frozen=True, slots=True)
class EditPlan:
    """What to do to the buffer: truncate to `keep`, then the moves in order, then compute `compute` (ascending slots).

    Slots in `compute` are those of the context after the edit. `note` says what was done beyond the asked.
    """

    mode: Mode
    keep: int
    moves: tuple[Move, ...]
    compute: tuple[int, ...]
    note: str = ""

    @property
    def relocates(self) -> bool:
        return bool(self.moves)


ErratumWriter = Callable[[Context, str, str], Unit]
"""(context, field name, value) -> the unit that states it at the context's end"""


def plan_edit(
    context: Context, changes: Mapping[str, str], mode: Mode, *, tokenizer: Any, write_erratum: ErratumWriter
) -> tuple[EditPlan, Context]:
    """The plan of an edit, and the context as it will be. `context` is not changed.

    Names and values are expected to have been checked.
    """
    after = context.copy()
    for name, value in changes.items():
        after.fields[name].current = value
    if mode is Mode.STALE:
        return EditPlan(mode, len(context), (), ()), after
    after.refreshed = frozenset()
    if mode in _RECOMPUTES_AFTER:
        return _plan_recompute(after, changes, mode, tokenizer)

    notes: list[str] = []
    while after.units and _superseded(after.units[-1], changes):
        after.units.pop()
        notes = ["an earlier erratum at the end was taken back"]
    keep = len(after)
    moves: list[Move] = []
    compute: list[int] = []
    if mode in REFRESHES_FIELD:
        rewritten = {name: value for name, value in changes.items() if after.fields[name].written != value}
        before = len(after)
        replacements = after.write(tokenizer, rewritten)
        for name in rewritten:
            after.fields[name].written = changes[name]
        growing = [r for r in replacements if r.growth]
        moves = [Move(r.old.stop, r.old.start + len(r.new)) for r in reversed(growing) if r.old.stop < before]
        if moves:
            tail = before - min(move.start for move in moves)
            notes.append(f"the value's token length changed: {tail} later tokens were relocated")
        keep = min([before, *(r.old.start for r in growing if r.old.stop == before)])
        compute = [slot for r in replacements for slot in r.new.range]
        after.note_computed(compute)
    for name, value in changes.items():
        in_the_way = bool(after.corrections(name))
        # Where the rest of the context was computed under this very value, an erratum would only cost tokens.
        needed = not after.known(name, value) or in_the_way
        if (mode in _STATES_VALUE and needed) or in_the_way:
            start = len(after)
            unit = write_erratum(after, name, value)
            after.append(unit)
            compute += range(start, start + len(unit))
            if mode not in _STATES_VALUE:
                notes.append(f"an earlier erratum about {name} lies inside the context, so a new one was needed")
        elif mode in _STATES_VALUE:
            notes.append(f"no erratum: everything that follows was computed with {name} = {value}")
    return EditPlan(mode, keep, tuple(moves), tuple(compute), "; ".join(notes)), after


def _plan_recompute(after: Context, changes: Mapping[str, str], mode: Mode, tokenizer: Any) -> tuple[EditPlan, Context]:
    """Suffix and full: write the values, drop the errata about them, and compute from the first change on."""
    if mode is Mode.FULL:
        changes = {name: state.current for name, state in after.fields.items()}
    rewritten = {name: value for name, value in changes.items() if after.fields[name].written != value}
    replacements = after.write(tokenizer, rewritten)
    touched = [replacement.new.start for replacement in replacements]
    for name, value in changes.items():
        after.fields[name].written = value
        # Also when the text already says so: later tokens may have read another value.
        if not after.known(name, value):
            touched += [span.start for span in after.spans(name)]
    kept: list[Unit] = []
    slot = 0
    for unit in after.units:
        if any(name in changes for name, _ in unit.corrects):
            touched.append(slot)
            continue
        kept.append(unit)
        slot += len(unit)
    after.units = kept
    start = 0 if mode is Mode.FULL else min([*touched, len(after)])
    after.note_computed_from(start)
    return EditPlan(mode, start, (), tuple(range(start, len(after)))), after


def _superseded(unit: Unit, changes: Mapping[str, str]) -> bool:
    return unit.kind is Kind.ERRATUM and all(name in changes for name, _ in unit.corrects)
