"""Room for values: how many positions a field's place gets, so that a longer value does not move what follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from programmable_kv.prompt.context import Context
from programmable_kv.prompt.fields import FieldKind, FieldType
from programmable_kv.prompt.units import Kind, Unit

_STEP = 4
"""In positions: widths are multiples of this, so that a value with a few more tokens fits in most cases."""


def room_of(kind: FieldType, value: Unit, tokens: Callable[[str], int]) -> int:
    """The number of positions of a field's place.

    The field's `room`; for an enum or a boolean, enough for its longest value; else more than the value needs now.

    Free positions take up positions only: no token is computed for them or read there.

    Args:
        tokens: returns the number of tokens of a text.
    """
    if kind.room is not None:
        return max(len(value), kind.room)
    texts = {FieldKind.ENUM: kind.among, FieldKind.BOOLEAN: ("true", "false", "null")}.get(kind.kind, ())
    if texts:
        return max(len(value), *map(tokens, texts))
    spare = {FieldKind.BLOCK: max(16, len(value) // 2), FieldKind.TEXT: len(value) + 2}.get(kind.kind, 2)
    return _stepped(len(value) + spare)


def room_for(unit: Unit) -> Unit:
    """The unit; a value that has outgrown its place gets one and a half times its tokens, so that this is rare."""
    if unit.kind in (Kind.PREFILL, Kind.SKILL) and unit.places and 0 < unit.width < len(unit):
        return replace(unit, width=_stepped(len(unit) * 3 // 2))
    return unit


def without_trailing_room(context: Context) -> Context:
    """The context without free positions at its end, so that appended tokens directly follow the last token."""
    units = list(context.units)
    for index in reversed(range(len(units))):
        if units[index].width > len(units[index]):
            units[index] = replace(units[index], width=0)
        if len(units[index]):
            break
    return context.with_units(units) if units != list(context.units) else context


def _stepped(tokens: int) -> int:
    return -(-tokens // _STEP) * _STEP
