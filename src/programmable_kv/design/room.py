"""Room for values: how many positions a field's place is given, so that another value moves nothing that follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from programmable_kv.prompt.context import Context
from programmable_kv.prompt.fields import FieldKind, FieldType
from programmable_kv.prompt.units import Kind, Unit

_STEP = 4
"""positions: widths are multiples of it, so that a word of a few tokens more fits in most cases"""


def room_of(kind: FieldType, value: Unit, tokens: Callable[[str], int]) -> int:
    """The positions for a field's place: as many as were asked for; of an enum or a boolean its longest value; else more than
    the value has now.

    Free positions cost nothing but positions: no token is computed for them, and none is read.

    Args:
        tokens: how many tokens a text has.
    """
    if kind.room is not None:
        return max(len(value), kind.room)
    texts = {FieldKind.ENUM: kind.among, FieldKind.BOOLEAN: ("true", "false", "null")}.get(kind.kind, ())
    if texts:
        return max(len(value), *map(tokens, texts))
    spare = {FieldKind.BLOCK: max(16, len(value) // 2), FieldKind.TEXT: len(value) + 2}.get(kind.kind, 2)
    return _stepped(len(value) + spare)


def room_for(unit: Unit) -> Unit:
    """The unit; if it is a value that has outgrown its place, with one half as large again, so that this happens seldom."""
    if unit.kind in (Kind.PREFILL, Kind.SKILL) and unit.places and 0 < unit.width < len(unit):
        return replace(unit, width=_stepped(len(unit) * 3 // 2))
    return unit


def without_trailing_room(context: Context) -> Context:
    """Without free positions at the very end: what is appended stands right behind the last token."""
    units = list(context.units)
    for index in reversed(range(len(units))):
        if units[index].width > len(units[index]):
            units[index] = replace(units[index], width=0)
        if len(units[index]):
            break
    return context.with_units(units) if units != list(context.units) else context


def _stepped(tokens: int) -> int:
    return -(-tokens // _STEP) * _STEP
