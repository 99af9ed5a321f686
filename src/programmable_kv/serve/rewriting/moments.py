"""Recognises times and dates in values, and whether two values differ in nothing else.

Two people's values that differ only in the clock have all the rest in common.
"""

from __future__ import annotations

import re

from programmable_kv.explain.volatile import DAY, HOURS, ISO, MONTH, SLASHED, WEEKDAY, YEAR

_GAP = r"[\s,.-]{0,3}"
_APART = r"[\s,.-]{1,3}"
_DAY = rf"{DAY}(?:st|nd|rd|th)?"
_HALF = r" ?[AaPp]\.?[Mm]\b\.?"
_ZONE = r" ?[+-](?:0\d|1[0-4]):?(?:00|15|30|45)"
_TIME = rf"{HOURS}(?:(?<=:\d\d:\d\d)[.,]\d{{1,9}})?(?:{_HALF}|Z)?(?:{_ZONE})?"
_WORDED = (
    rf"{_DAY}{_GAP}(?:of )?{MONTH}(?:{_GAP}{YEAR})?"
    rf"|{MONTH}{_GAP}(?:{_DAY}(?:{_APART}{_TIME})?(?:{_APART}{YEAR})?|{YEAR})"
)
"""A month's name next to a number: April alone may be a person."""
_WEEKDAY = rf"{WEEKDAY}{_APART}{_DAY}|(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day|{WEEKDAY}(?={_GAP}(?:\d|{MONTH}))"
"""A weekday. Its short name only next to a number or a month: Sun alone may be a person."""
_NUMBERS = rf"(?<!\d-)(?:{ISO}(?:T{_TIME})?|{SLASHED})(?!-\d)"
_MOMENT = re.compile(
    rf"(?<!\w)(?<!\d[.:/])(?:(?:{WEEKDAY}{_GAP})?(?:{_WORDED})|{_WEEKDAY}|{_NUMBERS}|{_TIME}|(?:1[0-2]|0?[1-9]){_HALF})"
    rf"(?!\w)(?![.:/]\d)|(?<=\d){_GAP}\b{WEEKDAY}"
)
"""A date, a time or a weekday in the usual forms. Each number is in range, and no part of a longer row of numbers."""
_PLAIN = re.compile(rf"(?<!\w){HOURS}(?!\w)|(?<!\w){ISO.replace('[-/.]', '-')}(?!\d)|\b{MONTH}")
"""A time or a date in a form that means nothing else. Three numbers with dots between them may be an address."""
_WORD = re.compile(r"\w")
_LONG_NUMBER = re.compile(r"\d{9,}")
"""A Unix timestamp, or somebody's number."""


def differ_as_moments(before: str, after: str) -> bool:
    """Whether two values are equal except for times and dates. A Unix timestamp is none: it may be someone's number."""
    return _MOMENT.sub("\0", before) == _MOMENT.sub("\0", after)


def is_moment(value: str) -> bool:
    """Whether a value is a time or a date, and nothing else."""
    left = _MOMENT.sub("\0", value)
    return "\0" in left and _WORD.search(left) is None


def is_plain(value: str) -> bool:
    """Whether a value contains a time or date that cannot be anything else, and no number that may be somebody's."""
    return _PLAIN.search(value) is not None and _LONG_NUMBER.search(value) is None
