"""Values that are a time or a date and nothing else changed: what two people's values have in common where they differ in no
more than the clock.
"""

from __future__ import annotations

import re

from programmable_kv.explain.volatile import MONTH, WEEKDAY

_GAP = r"[\s,.-]{0,3}"
_WORD = re.compile(
    rf"\d+(?:st|nd|rd|th)?{_GAP}(?:of )?{MONTH}|\b{MONTH}{_GAP}\d+(?:st|nd|rd|th)?\b"  # April alone may be somebody
    rf"|\b(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day\b|\b{WEEKDAY}(?={_GAP}(?:\d|{MONTH}))|(?<=\d){_GAP}\b{WEEKDAY}"
    r"|(?<=\d)(?: ?[AaPp]\.?[Mm]\b\.?|(?:st|nd|rd|th)\b)"
)
"""the words of a date or a time, each beside a number where it may mean something else"""
_ADDRESS = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.])")
_FRACTION = re.compile(r"(?<=:\d\d)[.,]\d+")
_NUMBER = re.compile(r"\d+")
_PLAIN = re.compile(rf"\d{{1,2}}:\d{{2}}(?!\d)|\d{{4}}-\d{{2}}-\d{{2}}|\b{MONTH}")
"""a time or a date as nobody writes anything else; three numbers with dots between them may be an address"""
_LONG_NUMBER = re.compile(r"\d{9,}")
"""seconds since 1970, or somebody's number"""


def differ_as_moments(before: str, after: str) -> bool:
    """Whether two values are equal but for numbers and the words of a date or a time. An address on a network is none."""
    return _skeleton(before) == _skeleton(after)


def is_plain(value: str) -> bool:
    """Whether a value holds a time or a date that can be taken for nothing else, and no number that may be somebody's."""
    return _PLAIN.search(value) is not None and _LONG_NUMBER.search(value) is None


def _skeleton(value: str) -> tuple[str, list[str]]:
    words = _WORD.sub("#", _FRACTION.sub("", value))
    return _NUMBER.sub("#", words), _ADDRESS.findall(value)
