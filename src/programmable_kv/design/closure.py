"""The parts that an edit of a field recomputes under `visibility="design"`: its readers, direct and indirect."""

from __future__ import annotations

from collections.abc import Collection

from programmable_kv.design.declared import Declared
from programmable_kv.design.parts import DesignPart, PartKind, parts_of, reads_of
from programmable_kv.prompt.context import Context
from programmable_kv.prompt.readers import Reader, Turns, Why


def readers_by_design(
    context: Context, declared: Declared, name: str, turns: Turns, kept: Collection[int]
) -> tuple[Reader, ...]:
    """The parts that read a field, directly or through other parts, in slot order; without the field's own tokens.

    Args:
        turns: which turns are recomputed; it is the reason given for them.
        kept: indices of units (turns) that are not recomputed.
    """
    parts = parts_of(context, declared)
    reads = reads_of(parts, len(context)).reads.numpy()
    changed: list[int] = []
    found: list[Reader] = []
    for number, part in enumerate(parts):
        own = _holds(context, part, name) or _behind(context, part, name)
        if not own and (part.unit in kept or not reads[number, changed].any()):
            continue
        changed.append(number)
        if part.kind is not PartKind.VALUE:
            found.append(_reader(context, part, name, turns))
    return tuple(found)


def _holds(context: Context, part: DesignPart, name: str) -> bool:
    """Whether the part contains the start of a value of the field."""
    start = context.starts[part.unit]
    places = (place for place in context.units[part.unit].places if place.name == name)
    return any(part.span.start <= start + place.tokens.start < part.span.stop for place in places)


def _behind(context: Context, part: DesignPart, name: str) -> bool:
    """Whether the part is a reader of the field. This also finds readers while the value is empty and so not a part."""
    return part.kind is PartKind.READER and name in part.fields


def _reader(context: Context, part: DesignPart, name: str, turns: Turns) -> Reader:
    unit, start = context.units[part.unit], context.starts[part.unit]
    text = unit.text_of(part.span.shifted(-start))
    match part.kind:
        case PartKind.TURN:
            why = Why.OPEN if turns is Turns.OPEN else Why.TURNS
        case PartKind.TEXT if part.scope.is_skill:
            why = Why.HOLDS
        case _ if name in part.fields:
            why = Why.READS
        case _:
            why = Why.INDIRECT
    return Reader(part.span, text, why)
