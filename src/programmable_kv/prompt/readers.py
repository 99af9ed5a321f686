"""Finds a field's readers: the later lines that mention the field, and the open question. No tensors here.

In a causal cache every token after a field may have read it. The lines that mention the field say what follows from it,
so the notes that decide an answer are on these lines and on the open question. `mode="readers"` recomputes only these.
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
    """No turns: everything said so far stays history."""
    OPEN = "open"
    """The turns after the last answer: the question that is still open."""
    ALL = "all"
    """All turns."""


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
    """A piece of the context that reads a field: a line, or all turns from one turn on."""

    span: Span
    """Slots of the piece; slots before the end of the field's first place are left out."""
    text: str
    why: Why
    word: str = ""
    """The word that the piece mentions."""

    @property
    def reason(self) -> str:
        """Why the piece counts as a reader, in words."""
        return f"{self.why} {self.word!r}" if self.word else str(self.why)


def parse_turns(turns: str | Turns) -> Turns:
    """
    Raises:
        InvalidArgumentError: `turns` is not keep, open or all.
    """
    return choice_of(Turns, turns, "turns is")


def check_words(words: Sequence[str]) -> None:
    """
    Raises:
        InvalidArgumentError: a word is not a string with letters or digits.
    """
    for word in words:
        if not isinstance(word, str) or not any(character.isalnum() for character in word):
            raise InvalidArgumentError(f"a word that lines mention must have letters or digits; got {word!r}")


def declared_words(mentions: Mapping[str, Sequence[str]], name: str) -> tuple[str, ...]:
    """The words declared for a field, the words declared for those words, and so on: readers of readers."""
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

    They are the lines of prefilled text and of skills that hold the field, or that mention its name or one of `words`
    (as whole words; case is ignored, and spaces equal `_`), and the turns that `turns` selects. Turns added after
    prefill are not searched for lines: they are kept or recomputed as a whole.

    Args:
        words: other words by which a line refers to the field: another name, a value, the group in which the value is
            looked up, or words of one particular line.
        slots: where this context's turns begin.
    """
    if not context.spans(name):
        return ()
    begins = context.spans(name)[0].stop  # no earlier token has read the whole value
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
    """The lines with letters or digits that `readers_of` searches, with their text, clipped in the same way."""
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
    """The union of spans, as ascending spans that neither overlap nor touch."""
    found: list[Span] = []
    for span in sorted(span for span in spans if len(span)):
        if found and span.start <= found[-1].stop:
            found[-1] = Span(found[-1].start, max(found[-1].stop, span.stop))
        else:
            found.append(span)
    return found


def _lines(unit: Unit, start: int, name: str, words: Sequence[str], within: Span) -> Iterator[Reader]:
    """The lines of a unit that read a field, clipped to the slots `within`. Each line is yielded once."""
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
    """The slot before which lines are searched: the beginning of the turns that are recomputed as a whole."""
    return {Turns.KEEP: len(context), Turns.OPEN: slots.open, Turns.ALL: slots.first}[turns]


def _clipped(span: Span, within: Span) -> Span:
    return Span(min(max(span.start, within.start), within.stop), max(within.start, min(span.stop, within.stop)))


def _line_of(text: str, characters: Span) -> Span:
    """The line, or lines, with these characters, and the line break after them, which often carries notes.

    It is the whole line, including the text before the field's name: if the line names the action first ("cancel if
    status is pending"), half a line would leave the old decision.
    """
    start = text.rfind("\n", 0, characters.start) + 1
    stop = text.find("\n", characters.stop)
    return Span(start, len(text) if stop < 0 else stop + 1)


def mention_pattern(word: str) -> re.Pattern[str]:
    """A pattern for a phrase as whole words; in scripts without upper and lower case it also matches inside words."""
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
