"""Finds text that changes by itself: clocks, ids and counters. It looks only where two texts differ, so it never takes
unchanged text for one of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?|September|Oct(?:ober)?|"
    r"Nov(?:ember)?|Dec(?:ember)?)\b\.?"
)
"""Whole words only: Martin and Julia are people."""
WEEKDAY = r"(?:(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day|Mon|Tues?|Wed|Thu(?:rs?)?|Fri|Sat|Sun)\b\.?"
YEAR = r"(?:19[7-9]\d|20\d{2})"
"""Plausible years only: 1234-56-78 is a number."""
DAY = r"(?:0?[1-9]|[12]\d|3[01])"
_MONTH_NUMBER = r"(?:0?[1-9]|1[0-2])"
ISO = rf"{YEAR}[-/.]{_MONTH_NUMBER}[-/.]{DAY}"
SLASHED = rf"(?:{DAY}[/.]{_MONTH_NUMBER}|{_MONTH_NUMBER}[/.]{DAY})[/.](?:{YEAR}|\d{{2}})"
HOURS = r"(?:2[0-3]|[01]?\d):[0-5]\d(?::[0-5]\d)?"
_TIME = rf"{HOURS}(?:[.,]\d+)?"
_STRONG = rf"(?:{WEEKDAY}|{MONTH}|{ISO}|{SLASHED}|{_TIME})"
_WEAK = r"(?:[AaPp]\.?[Mm]\.?|[A-Z]{3,4}|Z|[+-]\d{2}:?\d{2}|(?:19|20)\d{2}|\d{1,2}(?:st|nd|rd|th)?|at|of)"
_ATOM = rf"(?:{_STRONG}|{_WEAK})(?![A-Za-z0-9])"
_ISO_TIME = rf"{ISO}T{_TIME}(?:Z|[+-]\d{{2}}:?\d{{2}})?"
_CLOCK = re.compile(rf"(?<![A-Za-z0-9])(?:{_ISO_TIME}|(?!at|of){_ATOM})(?:[\s,]{{0,3}}{_ATOM})*")
_HAS_STRONG = re.compile(rf"(?<![A-Za-z0-9]){_STRONG}(?![A-Za-z0-9])|{_ISO_TIME}")
_EPOCH = re.compile(r"(?<![\w.])1\d{9}(?:\d{3})?(?:\.\d+)?(?!\w)")
_WORD = re.compile(r"[A-Za-z0-9]+(?:[_-][A-Za-z0-9]+)*")
_NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:[.,_']\d+)*(?!\w)")
_HEX = re.compile(r"[0-9a-f]{5,}|[0-9A-F]{5,}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_MIXED = re.compile(r"(?=.*[A-Za-z])(?=.*\d)[A-Za-z0-9_-]{8,}")
_TAG = re.compile(r"<(/?)([A-Za-z][\w.-]{0,60})(?:\s[^<>]{0,200})?>")
_HEADING = re.compile(r"^(?:#{1,6} +(.{1,80})|(\w[\w ]{1,40}):[ \t]*)$", re.MULTILINE)
_AROUND = 200
"""Characters of a line that are searched on each side of a difference."""

CLOCK_CUES = re.compile(
    r"(?i)\b(?:today|now|current|currently|date|time|clock|timestamp|timezone)\b|current_|<(?:date|time)"
)
COUNTER_CUES = re.compile(r"(?i)tokens?|left|remaining|turn|step|count|budget|usage|used|total|%|messages?")


@dataclass(frozen=True, slots=True)
class Value:
    """A value that changes by itself: characters `[start, stop_before)` and `[start, stop_after)` of the two texts."""

    name: str
    start: int
    stop_before: int
    stop_after: int


def volatile_at(before: str, after: str, offset: int) -> Value | None:
    """The clock, id or counter in which two texts first differ: of one kind and with one beginning in both.

    Args:
        offset: equal characters at the beginning of both texts.
    """
    start, stop, stop_after = line_bounds(before, after, offset)
    start, stop, stop_after = (
        max(start, offset - _AROUND),
        min(stop, offset + _AROUND),
        min(stop_after, offset + _AROUND),
    )
    one, other, at = before[start:stop], after[start:stop_after], offset - start
    for name, find in _FINDERS:
        found, found_after = find(one, at), find(other, at)
        if found is None or found_after is None or found[0] != found_after[0]:
            continue
        if one[slice(*found)] == other[slice(*found_after)]:
            continue  # the texts differ behind it
        if name == "id" and not _are_ids(one[slice(*found)], other[slice(*found_after)]):
            continue
        return Value(name, start + found[0], start + found[1], start + found_after[1])
    return None


def line_bounds(before: str, after: str, offset: int) -> tuple[int, int, int]:
    """The line of the first difference: its beginning, the same in both texts, and its end in each text."""
    start = before.rfind("\n", 0, offset) + 1
    return start, _line_end(before, offset), _line_end(after, offset)


def labels_before(text: str, offset: int) -> tuple[str, ...]:
    """The tags that are open at an offset, outermost first; if none is open, the heading above it."""
    head = text[:offset]
    tags = list(_TAG.finditer(head))
    closed: Counter[str] = Counter()
    opened: list[str] = []
    for match in reversed(tags):
        if match[1]:
            closed[match[2]] += 1
        elif closed[match[2]]:
            closed[match[2]] -= 1
        else:
            opened.append(match[2])
    if opened:
        return tuple(opened[::-1])
    headings = _HEADING.findall(head)
    return ((headings[-1][0] or headings[-1][1]).strip(),) if headings else ()


def _line_end(text: str, offset: int) -> int:
    end = text.find("\n", offset)
    return len(text) if end < 0 else end


def _covering(pattern: re.Pattern[str], text: str, at: int) -> tuple[int, int] | None:
    for match in pattern.finditer(text):
        if match.start() <= at <= match.end() and match.end() > match.start():
            return match.span()
        if match.start() > at:
            return None
    return None


def _clock(text: str, at: int) -> tuple[int, int] | None:
    found = _covering(_CLOCK, text, at)
    if found is not None and _HAS_STRONG.search(text[slice(*found)]):
        return found
    return _covering(_EPOCH, text, at)


def _are_ids(one: str, other: str) -> bool:
    """Whether two words are ids: both hexadecimal of one length, or both of letters and digits; not both numbers."""
    if one.isdigit() and other.isdigit():
        return False
    if len(one) == len(other) and _HEX.fullmatch(one) and _HEX.fullmatch(other):
        return any(char.isdigit() for char in one + other)
    return bool(_MIXED.fullmatch(one) and _MIXED.fullmatch(other)) and abs(len(one) - len(other)) <= 4


_FINDERS: tuple[tuple[str, Callable[[str, int], tuple[int, int] | None]], ...] = (
    ("clock", _clock),
    ("id", lambda text, at: _covering(_WORD, text, at)),
    ("counter", lambda text, at: _covering(_NUMBER, text, at)),
)
