"""Writes values as text, and tells whether a placeholder stands inside a JSON string."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from typing import Any

from programmable_kv.errors import InvalidValueError

NOTHING = "none"
"""How None is written."""

NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
"""Matches a number written as text."""
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
_IN_JSON = re.compile(r'[:,\[{]\s*"(?:[^"\\\n]|\\.)*\Z')
_STRING_ENDS = re.compile(r'(?:[^"\\\n]|\\.)*"\s*[,:}\]\n]|(?:[^"\\\n]|\\.)*"\s*\Z')
_NEAR = 2000
"""Number of characters examined on each side of a place."""
_QUOTED = re.compile(r'"([^"\\\n]*(?:\\.[^"\\\n]*)*)')
_ENDS = re.compile(r'"\s*(?:[,:}\]\n]|\Z)')
PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
"""Matches what may be a placeholder; it is one if the name in it is a field's."""
_OF_STRING = re.compile(rf"\\.|{PLACEHOLDER.pattern}")


def rendered(name: str, value: Any) -> str:
    """The value as text: numbers as Python writes them, `true` and `false`, `none`, dates in ISO 8601.

    Raises:
        InvalidValueError: the value's type is not one that a field can have.
    """
    if isinstance(value, str):
        return value.value if isinstance(value, Enum) else value
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime):
        precise = "minutes" if not value.second and not value.microsecond else "seconds"
        return value.isoformat(" ", precise)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, time):
        return value.isoformat("minutes" if not value.second and not value.microsecond else "seconds")
    if isinstance(value, int | float | Decimal):
        return str(value)
    raise InvalidValueError(
        f"the value of {name} must be a string, number, boolean, date, time or None, got {type(value).__name__}. Convert it "
        "first, or declare Field.json(value)."
    )


def escaped(text: str) -> str:
    """The text, escaped for use inside a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def unescaped(text: str) -> str:
    """The text with JSON escapes decoded; text without escapes is returned unchanged."""
    return _ESCAPE.sub(lambda match: _unescaped(match.group(1)), text)


def _unescaped(code: str) -> str:
    return chr(int(code[1:], 16)) if len(code) > 1 else _ESCAPES.get(code, code)


def in_json_string(before: str, after: str) -> bool:
    """Whether something between these two texts stands inside a JSON string, as between `{"status": "` and `"}`."""
    return _IN_JSON.search(before[-_NEAR:]) is not None and _STRING_ENDS.match(after[:_NEAR]) is not None


def places_in_json(content: str, names: Iterable[str]) -> dict[str, bool | None]:
    """For each field, whether its placeholders stand inside JSON strings; None if only some of them do.

    Fields without a placeholder in the content are left out. The content is scanned once, however many placeholders it
    has.
    """
    wanted = set(names)
    total = Counter(match[1] for match in PLACEHOLDER.finditer(content) if match[1] in wanted)
    quoted = Counter(name for name in _quoted(content) if name in wanted) if total else Counter[str]()
    return {name: None if 0 < quoted[name] < count else bool(quoted[name]) for name, count in total.items()}


def _quoted(content: str) -> Iterator[str]:
    """The name in each placeholder inside a JSON string whose two ends are within `_NEAR` characters.

    The scan skips escaped quotes only, and an escaped quote never begins a JSON string.
    """
    for string in _QUOTED.finditer(content):
        start, stop = string.span(1)
        ends = _ENDS.match(content, stop)
        before = _last_sign(content, start - 1)
        if ends is None or before < 0 or content[before] not in ":,[{":
            continue
        for match in _OF_STRING.finditer(content, start, stop):
            if match[1] is not None and match.start() - before <= _NEAR and ends.end() - match.end() <= _NEAR:
                yield match[1]


def _last_sign(content: str, stop: int) -> int:
    """The index of the last non-blank character before `stop`; -1 if there is none."""
    at = stop - 1
    while at >= 0 and content[at].isspace():
        at -= 1
    return at
