"""Readers: the later text that has drawn something from a field, found by what it mentions. No tensors here.

In a causal cache every token after a field may have read it. The lines that mention it are the ones that say what follows from
it; on them, and on the question that is still open, stand the notes that decide. `mode="readers"` computes just these again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from programmable_kv.arguments import choice_of
from programmable_kv.cache.span import Span
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.prompt.context import Context
from programmable_kv.prompt.turns import TurnSlots
from programmable_kv.prompt.units import Kind, Unit

_SEPARATORS = re.compile(r"[\s_]+")


class Turns(StrEnum):
    """Which turns of a conversation count as readers of a field."""

    KEEP = "keep"
    """none: all that was said stays history"""
    OPEN = "open"
    """those since the last answer: the question that is still to be answered"""
    ALL = "all"
    """every one"""


class Why(StrEnum):
    """Why a piece of text counts as a reader of a field."""

    HOLDS = "holds the field"
    MENTIONS = "mentions"
    READS = "holds or mentions the field"
    INDIRECT = "reads one of its readers"
    OPEN = "the open question"
    TURNS = "the turns"


@dataclass(frozen=True, slots=True)
class Reader:
    """A piece of the context that reads a field: a line, or the turns from one on."""

    span: Span
    """its slots, without those up to the end of the field's first place"""
    text: str
    why: Why
    word: str = ""
    """what it mentions"""

    @property
    def reason(self) -> str:
        """Why it counts as a reader, for people."""
        return f"{self.why} {self.word!r}" if self.word else str(self.why)


def parse_turns(turns: str | Turns) -> Turns:
    """
    Raises:
        InvalidArgumentError: there is no such choice; the message lists them.
    """
    return choice_of(Turns, turns, "turns is")


def check_words(words: Sequence[str]) -> None:
    """
    Raises:
        InvalidArgumentError: one of them is not a text that could stand in a line.
    """
    for word in words:
        if not isinstance(word, str) or not any(character.isalnum() for character in word):
            raise InvalidArgumentError(f"what a line mentions is a text with letters or digits; got {word!r}")


def declared_words(mentions: Mapping[str, Sequence[str]], name: str) -> tuple[str, ...]:
    """What was declared for a field, and for each of those words, and so on: readers of readers."""
    found: dict[str, None] = {}
    waiting = list(mentions.get(name, ()))
    while waiting:
        word = waiting.pop(0)
        if word not in found and word != name:
            found[word] = None
            waiting += mentions.get(word, ())
    return tuple(found)


def readers_of(context: Context, name: str, words: Sequence[str], turns: Turns, slots: TurnSlots) -> tuple[Reader, ...]:
    """The readers of a field, in slot order.

    They are: the lines of prefilled text and of skills that hold the field, or that mention its name or one of `words`
    (whole words; upper and lower case, and spaces and `_`, are the same), and the turns that are asked for. Turns that were
    added later are not searched: they are history, kept or computed again as a whole.

    Args:
        words: what else a line says when it speaks of the field: another name, a value, the group that the value is looked
            up in, or words of one particular line.
        slots: where this context's turns begin.
    """
    if not context.spans(name):
        return ()
    begins = context.spans(name)[0].stop  # no token before it, and none of the place itself, has read the whole value
    ends = _ends(context, turns, slots)
    found: list[Reader] = []
    for start, unit in zip(context.starts, context.units, strict=False):
        if unit.kind in (Kind.PREFILL, Kind.SKILL):
            found += _lines(unit, start, name, words, Span(min(begins, ends), ends))
    rest = Span(max(begins, min(ends, len(context))), len(context))
    if len(rest):
        found.append(Reader(rest, _text_in(context, rest), Why.OPEN if turns is Turns.OPEN else Why.TURNS))
    return tuple(found)


def later_lines(context: Context, name: str, turns: Turns, slots: TurnSlots) -> Iterator[tuple[Span, str]]:
    """The lines that `readers_of` searches and words could mark, with their text; clipped as it clips them."""
    if not context.spans(name):
        return
    begins, ends = context.spans(name)[0].stop, _ends(context, turns, slots)
    for start, unit in zip(context.starts, context.units, strict=False):
        if unit.kind not in (Kind.PREFILL, Kind.SKILL):
            continue
        first = 0
        for line in re.findall(r"[^\n]*\n|[^\n]+", unit.text):
            characters = Span(first, first + len(line))
            first += len(line)
            tokens = _clipped(unit.covering(characters).shifted(start), Span(min(begins, ends), ends))
            text = unit.text_of(tokens.shifted(-start)) if len(tokens) else ""
            if any(character.isalnum() for character in text):
                yield tokens, text


def joined(spans: Sequence[Span]) -> list[Span]:
    """The slots that some spans hold together, as ascending spans that do not touch."""
    found: list[Span] = []
    for span in sorted(span for span in spans if len(span)):
        if found and span.start <= found[-1].stop:
            found[-1] = Span(found[-1].start, max(found[-1].stop, span.stop))
        else:
            found.append(span)
    return found


def _lines(unit: Unit, start: int, name: str, words: Sequence[str], within: Span) -> Iterator[Reader]:
    """The lines of a unit that read a field, clipped to some slots. A line that does so twice is given once."""
    reasons: dict[Span, tuple[Why, str]] = {}
    for place in unit.places:
        if place.name == name:
            reasons.setdefault(_line_of(unit.text, place.characters), (Why.HOLDS, ""))
    for word in (name, *words):
        for match in mention_pattern(word).finditer(unit.text):
            reasons.setdefault(_line_of(unit.text, Span(*match.span())), (Why.MENTIONS, word))
    for characters, (why, word) in sorted(reasons.items()):
        clipped = _clipped(unit.covering(characters).shifted(start), within)
        if len(clipped):
            yield Reader(clipped, unit.text_of(clipped.shifted(-start)), why, word)


def _ends(context: Context, turns: Turns, slots: TurnSlots) -> int:
    """The slot before which lines are searched: where the turns begin that are taken whole."""
    return {Turns.KEEP: len(context), Turns.OPEN: slots.open, Turns.ALL: slots.first}[turns]


def _clipped(span: Span, within: Span) -> Span:
    return Span(min(max(span.start, within.start), within.stop), max(within.start, min(span.stop, within.stop)))


def _line_of(text: str, characters: Span) -> Span:
    """The line, or lines, with these characters, and the line break after them: notes are often left there.

    The whole line, also what stands before the field's name: where the action is named first ("cancel if status is
    pending"), half a line leaves the old decision.
    """
    start = text.rfind("\n", 0, characters.start) + 1
    stop = text.find("\n", characters.stop)
    return Span(start, len(text) if stop < 0 else stop + 1)


def mention_pattern(word: str) -> re.Pattern[str]:
    """Finds a phrase as whole words; where it begins or ends in a script without upper and lower case, inside words too."""
    pieces = [piece for piece in _SEPARATORS.split(word) if piece]
    body = r"[\s_]+".join(map(re.escape, pieces))
    before = r"(?<!\w)" if _bounded(pieces[0][0]) else ""
    after = r"(?!\w)" if _bounded(pieces[-1][-1]) else ""
    return re.compile(f"{before}{body}{after}", re.IGNORECASE)


def _bounded(character: str) -> bool:
    return character.isdigit() or character.lower() != character.upper()


def _text_in(context: Context, span: Span) -> str:
    pieces = []
    for start, unit in zip(context.starts, context.units, strict=False):
        own = Span(min(max(span.start - start, 0), len(unit)), min(max(span.stop - start, 0), len(unit)))
        pieces.append(unit.text_of(own))
    return "".join(pieces)
