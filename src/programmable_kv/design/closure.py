"""What a field's edit builds again under `visibility="design"`: everything that read the field, or read something that did."""

from __future__ import annotations

from collections.abc import Collection

from programmable_kv.design.parts import DesignPart, PartKind, Words, parts_of, reads_of
from programmable_kv.prompt.context import Context
from programmable_kv.prompt.readers import Reader, Turns, Why


def readers_by_design(
    context: Context, words: Words, name: str, turns: Turns, kept: Collection[int]
) -> tuple[Reader, ...]:
    """The parts that read a field, directly or through others, in slot order; without the field's own tokens.

    Args:
        turns: which turns are computed again, for the reason that is given.
        kept: units of the context, turns, that stay as they are.
    """
    parts = parts_of(context, words)
    reads = reads_of(parts, len(context)).reads
    changed: list[int] = []
    found: list[Reader] = []
    for number, part in enumerate(parts):
        own = any(place.name == name for place in context.units[part.unit].places) and part.kind is not PartKind.READER
        if not own and not any(bool(reads[number, other]) for other in changed):
            continue
        if part.unit in kept:
            continue
        changed.append(number)
        if part.kind is not PartKind.VALUE:
            found.append(_reader(context, part, name, turns))
    return tuple(found)


def _reader(context: Context, part: DesignPart, name: str, turns: Turns) -> Reader:
    unit, start = context.units[part.unit], context.starts[part.unit]
    text = unit.text_of(part.span.shifted(-start))
    match part.kind:
        case PartKind.TURN:
            why = Why.OPEN if turns is Turns.OPEN else Why.TURNS
        case PartKind.SKILL:
            why = Why.HOLDS
        case _ if name in part.fields:
            why = Why.READS
        case _:
            why = Why.INDIRECT
    return Reader(part.span, text, why)
