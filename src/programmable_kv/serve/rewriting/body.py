"""Parses a request's body with the places of its parts, so that a part can be replaced and all other bytes stay."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

LISTS = ("messages", "input", "tools")
"""Members whose elements have known places."""
_BLANK = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class Spot:
    """Half-open range of characters in a body. An empty range is a place where text can be inserted."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Body:
    """One JSON object, parsed once."""

    text: str = field(repr=False)
    data: Mapping[str, Any] = field(repr=False)
    spots: Mapping[str, Spot] = field(repr=False)
    """The place of each member's value."""
    items: Mapping[str, tuple[Spot, ...]] = field(repr=False)
    """The places of the elements of each member in `LISTS`."""

    def spliced(self, changes: Iterable[tuple[Spot, str]]) -> bytes:
        """The body with other text at some places. Every other byte is unchanged."""
        parts: list[str] = []
        at = 0
        for spot, text in sorted(changes, key=lambda change: (change[0].start, change[0].stop)):
            parts += [self.text[at : spot.start], text]
            at = spot.stop
        return "".join([*parts, self.text[at:]]).encode()


def read(data: bytes) -> Body | None:
    """Parse a body and the places of its parts; None if it is not a JSON object with members.

    An object that names a member twice is refused too: servers differ in which of the two they take.
    """
    try:
        text = data.decode("utf-8")
        return _scanned(text)
    except (ValueError, RecursionError, IndexError):
        return None


def written(value: Any) -> str:
    """JSON without needless spaces or escapes. If UTF-8 cannot encode it (lone surrogates), non-ASCII is escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"))
    return text


def _scanned(text: str) -> Body | None:
    found: dict[str, Any] = {}
    spots: dict[str, Spot] = {}
    items: dict[str, tuple[Spot, ...]] = {}
    at = _behind(text, 0, "{")
    if text[at] == "}":
        return None
    while True:
        key, at = _DECODER.raw_decode(text, at)
        at = _behind(text, at, ":")
        if not isinstance(key, str) or key in found:
            return None
        if key in LISTS and text[at] == "[":
            inside: list[Spot] = []
            value, stop = _items(text, at, inside)
            items[key] = tuple(inside)
        else:
            value, stop = _DECODER.raw_decode(text, at)
        found[key], spots[key] = value, Spot(at, stop)
        at = _BLANK.match(text, stop).end()  # type: ignore[union-attr]  # it matches everywhere
        if text[at] == "}":
            return Body(text, found, spots, items) if not text[at + 1 :].strip() else None
        at = _behind(text, at, ",")


def _items(text: str, at: int, spots: list[Spot]) -> tuple[list[Any], int]:
    values: list[Any] = []
    at = _behind(text, at, "[")
    if text[at] == "]":
        return values, at + 1
    while True:
        value, stop = _DECODER.raw_decode(text, at)
        values.append(value)
        spots.append(Spot(at, stop))
        at = _BLANK.match(text, stop).end()  # type: ignore[union-attr]
        if text[at] == "]":
            return values, at + 1
        at = _behind(text, at, ",")


def _behind(text: str, at: int, sign: str) -> int:
    """The place behind a character and the whitespace around it."""
    at = _BLANK.match(text, at).end()  # type: ignore[union-attr]
    if text[at] != sign:
        raise ValueError(f"expected {sign!r}")
    return _BLANK.match(text, at + 1).end()  # type: ignore[union-attr]
