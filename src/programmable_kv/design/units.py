"""Cuts a prompt into units for `visibility="design"`: each value, with room to grow, and each turn is a unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from programmable_kv.cache.span import Span
from programmable_kv.design.room import room_of
from programmable_kv.prompt.context import Context
from programmable_kv.prompt.fields import TEXT, FieldType
from programmable_kv.prompt.parts import Rendered, unshielded
from programmable_kv.prompt.prompt import SKILL_MARK
from programmable_kv.prompt.tokens import encode
from programmable_kv.prompt.turns import last_line, turn_characters
from programmable_kv.prompt.units import Kind, Unit, tokenised

if TYPE_CHECKING:
    from programmable_kv.prompt.prompt import Prompt


def designed_pieces(prompt: Prompt, tokenizer: Any) -> list[tuple[Unit, ...] | str]:
    """The units of a prompt between its skills, and the skills' names, in order.

    Raises:
        TemplateError, InvalidEditError: as in `Prompt.pieces`.
    """
    pieces = prompt.pieces()
    conversation = prompt.conversation()
    raw = conversation is None
    text = "".join(SKILL_MARK if isinstance(piece, str) else piece.text for piece in pieces)
    line = _last_line(pieces)
    cuts = (line, line) if conversation is None else turn_characters(conversation, text, line)
    found: list[tuple[Unit, ...] | str] = []
    begins = 0
    for number, piece in enumerate(pieces):
        if isinstance(piece, str):
            found.append(piece)
            begins += len(SKILL_MARK)
            continue
        within = _outside_of_tokens(piece, [min(max(cut - begins, 0), len(piece.text)) for cut in cuts], tokenizer)
        special = raw and number == 0
        found.append(tuple(_units(piece, within[0], within[1], tokenizer, prompt.types, special=special)))
        begins += len(piece.text)
    return found


def _last_line(pieces: Sequence[Rendered | str]) -> int:
    """The character at which a prompt's last non-blank line begins, whatever the values in the prompt are."""
    shown: list[tuple[str, int]] = []
    """pieces of text with their places in the prompt; one character stands for each value, even an empty one"""
    at = 0
    for piece in pieces:
        if isinstance(piece, str):
            shown.append((SKILL_MARK, at))
            at += len(SKILL_MARK)
            continue
        start = 0
        for _, span in [*piece.places, ("", Span(len(piece.text), len(piece.text)))]:
            shown += [(piece.text[start : span.start], at + start), (SKILL_MARK, at + span.start)]
            start = span.stop
        shown.pop()  # the end of the piece is not a value
        at += len(piece.text)
    begins = last_line("".join(run for run, _ in shown))
    for run, stands in shown:
        if begins < len(run):
            return stands + begins
        begins -= len(run)
    return at


def _outside_of_tokens(piece: Rendered, cuts: Sequence[int], tokenizer: Any) -> list[int]:
    """The cuts, moved out of special tokens to their start: two special tokens may begin with the same characters."""
    ids, offsets = encode(tokenizer, piece.text, [*piece.plain, *(span for _, span in piece.places)])
    special = set(tokenizer.all_special_ids)
    spans = [Span(start, stop) for token, (start, stop) in zip(ids, offsets.tolist(), strict=True) if token in special]
    return [next((span.start for span in spans if span.start < cut < span.stop), cut) for cut in cuts]


def skill_units(piece: Rendered, types: Mapping[str, FieldType], tokenizer: Any) -> tuple[Unit, ...]:
    """The units of a skill's text: each value is a separate unit with room to grow, as in a prompt."""
    piece = unshielded(piece)
    units = [*_apart(piece, piece.places, tokenizer, types, special=False)]
    ends = max((span.stop for _, span in piece.places), default=0)
    if ends < len(piece.text):
        units.append(tokenised(tokenizer, _cut(piece, ends, len(piece.text), with_values=False), Kind.PREFILL))
    return tuple(replace(unit, kind=Kind.SKILL, piece=number) for number, unit in enumerate(units, 1))


def _units(
    piece: Rendered, first: int, opens: int, tokenizer: Any, types: Mapping[str, FieldType], *, special: bool
) -> Iterator[Unit]:
    """The units of a text whose turns begin at character `first` and whose open question begins at `opens`."""
    before = [place for place in piece.places if place[1].start < first]
    yield from _apart(piece, before, tokenizer, types, special=special)
    start = before[-1][1].stop if before else 0
    begins = max(first, start)
    special = special and not before
    for stop, kind in ((begins, Kind.PREFILL), (max(begins, opens), Kind.TURN), (len(piece.text), Kind.TURN)):
        if stop > start or (special and not start and stop == len(piece.text)):
            text = _cut(piece, start, stop, with_values=kind is Kind.TURN)
            yield tokenised(tokenizer, text, kind, special=special and not start)
        start = max(start, stop)


def _apart(
    piece: Rendered,
    places: Sequence[tuple[str, Span]],
    tokenizer: Any,
    types: Mapping[str, FieldType],
    *,
    special: bool,
) -> Iterator[Unit]:
    """The units of a text up to the last of some values in it; each value is a unit with room to grow."""
    start = 0
    for name, span in places:
        if span.start > start or special:
            text = _cut(piece, start, span.start, with_values=False)
            yield tokenised(tokenizer, text, Kind.PREFILL, special=special)
            special = False
        value = tokenised(
            tokenizer, Rendered(piece.text[span.start : span.stop], ((name, Span(0, len(span))),)), Kind.PREFILL
        )
        yield _roomy(value, types.get(name, TEXT), tokenizer)
        start = span.stop


def with_first_room(context: Context, tokenizer: Any) -> Context:
    """The context with the room for each of its own values that a notebook of this text gets when it is prefilled."""
    units = [
        _roomy(unit, context.fields[unit.places[0].name].type, tokenizer)
        if unit.kind is Kind.PREFILL and unit.places
        else unit
        for unit in context.units
    ]
    return context.with_units(units)


def _roomy(value: Unit, kind: FieldType, tokenizer: Any) -> Unit:
    width = room_of(kind, value, lambda text: len(encode(tokenizer, text, [Span(0, len(text))])[0]))
    return replace(value, width=width)


def _cut(piece: Rendered, start: int, stop: int, *, with_values: bool) -> Rendered:
    """The characters [start, stop) of a text; without `with_values` the result has no places of values."""
    places = tuple(
        (name, span.shifted(-start))
        for name, span in piece.places
        if with_values and start <= span.start and span.stop <= stop
    )
    plain = tuple(span.shifted(-start) for span in _clipped(piece.plain, start, stop))
    return Rendered(piece.text[start:stop], places, plain)


def _clipped(spans: Sequence[Span], start: int, stop: int) -> Iterator[Span]:
    for span in spans:
        clipped = Span(max(span.start, start), max(span.start, start, min(span.stop, stop)))
        if len(clipped):
            yield clipped
