"""The types of fields: what a value may be, how it is written in the text, and how an erratum states it.

A plain value declares the type that it has: `str` is one line of text, `int` and `float` are numbers; `bool`, `date`,
`datetime` and `time` are types of their own. An application states more with `Field`: `Field(todo, kind="block")`,
`Field.enum("a", among=("a", "b"))`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time
from decimal import Decimal
from enum import StrEnum
from typing import Any

from programmable_kv.arguments import require_count
from programmable_kv.errors import InvalidArgumentError, InvalidValueError
from programmable_kv.prompt.characters import without_byte_order_mark
from programmable_kv.prompt.written import NOTHING, NUMBER, escaped, rendered, unescaped

Value = Any
"""str, int, float, Decimal, bool, None, date, datetime or time; for kind 'json', any JSON value; or a `Field`"""


class FieldKind(StrEnum):
    """The kinds of values that a field may have."""

    TEXT = "text"
    """one line"""
    BLOCK = "block"
    """several lines, or none: a list, a memory, an address, a table"""
    NUMBER = "number"
    DATE = "date"
    DATETIME = "datetime"
    TIME = "time"
    ENUM = "enum"
    """one of the declared values"""
    BOOLEAN = "boolean"
    JSON = "json"
    """any value, written as JSON; inside a JSON string its characters are escaped"""


_FREE = (FieldKind.TEXT, FieldKind.BLOCK, FieldKind.JSON)
"""kinds whose values the guard checks; a value of another kind can only be what its type allows"""


_KNOWN = (FieldKind.ENUM, FieldKind.BOOLEAN)
"""kinds whose values are all known"""


@dataclass(frozen=True, slots=True)
class FieldType:
    """What a field's values may be, and how they are written. Other modules handle a value as its written text."""

    kind: FieldKind = FieldKind.TEXT
    among: tuple[str, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    charset: str = ""
    max_length: int | None = None
    trusted: bool = False
    room: int | None = None
    """positions kept for a value under `visibility="design"`; when None, the kind and the first value decide"""
    in_json: bool = False
    """whether the field stands inside JSON strings, so that quotes in a value are escaped"""
    mixed: bool = False
    """whether the field stands both inside and outside JSON strings; a value that needs escaping is then refused"""

    def __post_init__(self) -> None:
        if self.kind is FieldKind.ENUM and not self.among:
            raise InvalidArgumentError('an enum needs its allowed values: Field("a", kind="enum", among=("a", "b"))')
        if self.among and self.kind is not FieldKind.ENUM:
            raise InvalidArgumentError(f"allowed values need kind='enum', but this field's kind is {self.kind}")
        if (self.at_least is not None or self.at_most is not None) and self.kind is not FieldKind.NUMBER:
            raise InvalidArgumentError(f"at_least and at_most need kind='number', but this field's kind is {self.kind}")
        if (self.charset or self.max_length is not None) and self.kind not in _FREE:
            raise InvalidArgumentError(f"charset and max_length are for texts, but this field's kind is {self.kind}")
        if self.room is not None:
            require_count(self.room, "room, in tokens,")
            if self.kind in _KNOWN:
                raise InvalidArgumentError(
                    f"all values of kind {self.kind} are known, and the longest one sets the room: leave room out"
                )
        if self.charset:
            try:
                re.compile(f"[{self.charset}]")
            except re.error as error:
                raise InvalidArgumentError(
                    "charset must be the inside of a regular expression's brackets, such as 'A-Z0-9-'; got "
                    f"{self.charset!r}: {error}"
                ) from error

    @property
    def guarded(self) -> bool:
        """Whether the guard checks its values."""
        return self.kind in _FREE and not self.trusted

    def text(self, name: str, value: Value) -> str:
        """A value as it is written in the text.

        Raises:
            InvalidValueError: the value is not of this type.
        """
        if self.kind is FieldKind.JSON:
            return self._limited(name, self._as_json(name, value))
        empty = value is None and self.kind is FieldKind.BLOCK
        said = "" if empty else without_byte_order_mark(rendered(name, value))
        if isinstance(value, str) or value is None or self.kind is FieldKind.ENUM:
            self._check_text(name, said, value)
        elif self.kind not in (FieldKind.TEXT, FieldKind.BLOCK, *_kinds_of(value)):
            raise self._unfit(name, value)
        if self.kind is FieldKind.NUMBER and said != NOTHING:
            self._check_number(name, float(said))
        said = self._limited(name, said)
        if self.mixed:
            _check_needs_no_escape(name, said)
        return escaped(said) if self.in_json else said

    def standing(self, name: str, text: str, in_json: bool | None) -> FieldType:
        """The type of a field that gets further places: inside JSON strings (True), outside (False), or both (None).

        `text` is the field's value as written.

        Raises:
            InvalidValueError: the value cannot be written in all places of the field.
        """
        if self.mixed or in_json is self.in_json:
            return self
        _check_needs_no_escape(name, self.shown(text))
        return replace(self, in_json=False, mixed=True)

    def joined(self, name: str, text: str, other: FieldType) -> FieldType:
        """This type, for a field that also stands in the places that `other` describes. `text` is its value as written.

        Raises:
            InvalidValueError: the value cannot be written in all places of the field.
        """
        return self.standing(name, text, None if other.mixed else other.in_json)

    def told(self, text: str) -> str:
        """A value as an erratum states it. `text` is the value as written."""
        if self.kind is FieldKind.JSON:
            return f'"{text}"' if self.in_json else text
        return self.shown(text)

    def shown(self, text: str) -> str:
        """A value as the application gave it, unescaped. `text` is the value as written."""
        return str(json.loads(f'"{text}"', strict=False)) if self.in_json else text

    def readable(self, text: str) -> str:
        """A value as a JSON parser would read it. `text` is the value as written."""
        if not self.in_json and self.kind is not FieldKind.JSON:
            return text
        for _ in range(2 if self.in_json and self.kind is FieldKind.JSON else 1):  # twice for JSON inside a string
            text = unescaped(text)
        return text

    def _check_text(self, name: str, said: str, value: Value) -> None:
        match self.kind:
            case FieldKind.TEXT | FieldKind.BLOCK | FieldKind.JSON:
                return
            case FieldKind.ENUM:
                if said not in self.among:
                    raise InvalidValueError(
                        f"the value of {name} must be one of {', '.join(map(repr, self.among))}; got {value!r}"
                    )
            case FieldKind.BOOLEAN:
                fits = said in ("true", "false", NOTHING)
            case FieldKind.NUMBER:
                fits = said == NOTHING or NUMBER.fullmatch(said) is not None
            case FieldKind.DATE | FieldKind.DATETIME | FieldKind.TIME:
                fits = said == NOTHING or _is_time(self.kind, said)
        if self.kind is not FieldKind.ENUM and not fits:
            raise self._unfit(name, value)

    def _check_number(self, name: str, number: float) -> None:
        if not math.isfinite(number):
            raise InvalidValueError(f"the value of {name} must be a finite number; got {number}")
        if self.at_least is not None and number < self.at_least:
            raise InvalidValueError(f"the value of {name} must be at least {self.at_least}; got {number:g}")
        if self.at_most is not None and number > self.at_most:
            raise InvalidValueError(f"the value of {name} must be at most {self.at_most}; got {number:g}")

    def _limited(self, name: str, said: str) -> str:
        if self.max_length is not None and len(said) > self.max_length:
            raise InvalidValueError(
                f"the value of {name} has {len(said)} characters, but its type allows at most {self.max_length}"
            )
        if self.charset and (found := re.search(f"[^{self.charset}]", said)):
            raise InvalidValueError(
                f"the value of {name} has the character {found.group()!r}, but its type allows only [{self.charset}]"
            )
        return said

    def _as_json(self, name: str, value: Value) -> str:
        try:
            document = json.dumps(value, ensure_ascii=False, allow_nan=False, default=lambda part: rendered(name, part))
        except (TypeError, ValueError) as error:
            raise InvalidValueError(f"the value of {name} cannot be written as JSON: {error}") from error
        if self.mixed:
            _check_needs_no_escape(name, document)
        if not self.in_json:
            return document
        return document[1:-1] if isinstance(value, str) else escaped(document)

    def _unfit(self, name: str, value: Value) -> InvalidValueError:
        expected = {
            FieldKind.NUMBER: "a number",
            FieldKind.BOOLEAN: "a boolean (True or False)",
            FieldKind.DATE: "a date (a datetime.date, or '2026-11-24')",
            FieldKind.DATETIME: "a date and time (a datetime.datetime, or '2026-11-24 10:30')",
            FieldKind.TIME: "a time of day (a datetime.time, or '10:30')",
        }.get(self.kind, f"of kind {self.kind}")
        return InvalidValueError(f"the value of {name} must be {expected}, got {value!r} ({type(value).__name__})")


TEXT = FieldType()


@dataclass(frozen=True, slots=True)
class Field:
    """A field's value with its type and limits. Pass it instead of a plain value.

    Args:
        kind: one of 'text', 'block', 'number', 'date', 'datetime', 'time', 'enum', 'boolean', 'json'. When None, the
            value decides.
        among: for an enum, all values that the field may have.
        at_least, at_most: for a number, its bounds.
        charset: for a text, a block or JSON, the allowed characters, as in the brackets of a regular expression:
            'A-Z0-9-'.
        max_length: for a text, a block or JSON, the most characters that a value may have.
        trusted: whether values skip the guard: anything that the tokenizer can write as plain text is accepted. The
            account of an operation that takes such a value says so.
        room: under `visibility="design"`, how many tokens the longest expected value has. Values up to this length
            stand at the same positions, and none of them moves the text that follows.

    Raises:
        InvalidArgumentError: the options do not fit the kind.
    """

    value: Value
    kind: FieldKind | str | None = None
    among: Sequence[str] = ()
    at_least: float | None = None
    at_most: float | None = None
    charset: str = ""
    max_length: int | None = None
    trusted: bool = False
    room: int | None = None

    def __post_init__(self) -> None:
        _ = self.type

    @property
    def type(self) -> FieldType:
        kind = _kinds_of(self.value)[0] if self.kind is None else self.kind
        if kind not in list(FieldKind):
            raise InvalidArgumentError(f"unknown kind of field {kind!r}; choose from {', '.join(FieldKind)}")
        return FieldType(
            FieldKind(kind), tuple(map(str, self.among)), self.at_least, self.at_most, self.charset, self.max_length,
            self.trusted, self.room,
        )  # fmt: skip

    @classmethod
    def text(
        cls, value: Value, *, charset: str = "", max_length: int | None = None, trusted: bool = False,
        room: int | None = None,
    ) -> Field:  # fmt: skip
        """A field whose value is one line of text."""
        return cls(value, FieldKind.TEXT, charset=charset, max_length=max_length, trusted=trusted, room=room)

    @classmethod
    def block(
        cls, value: Value, *, max_length: int | None = None, trusted: bool = False, room: int | None = None
    ) -> Field:
        """A field whose value is several lines, or empty."""
        return cls(value, FieldKind.BLOCK, max_length=max_length, trusted=trusted, room=room)

    @classmethod
    def number(cls, value: Value, *, at_least: float | None = None, at_most: float | None = None) -> Field:
        """A field whose value is a number within bounds."""
        return cls(value, FieldKind.NUMBER, at_least=at_least, at_most=at_most)

    @classmethod
    def enum(cls, value: Value, *, among: Sequence[str]) -> Field:
        """A field whose value is one of the values `among`."""
        return cls(value, FieldKind.ENUM, among=among)

    @classmethod
    def json(cls, value: Value, *, trusted: bool = False) -> Field:
        """A field whose value is any JSON value, written as JSON."""
        return cls(value, FieldKind.JSON, trusted=trusted)


def type_of(value: Value) -> FieldType:
    """The type that a value declares."""
    return value.type if isinstance(value, Field) else FieldType(_kinds_of(value)[0])


def declare(
    values: Mapping[str, Value], places: Mapping[str, bool | None], types: Mapping[str, FieldType] | None = None
) -> tuple[dict[str, str], dict[str, FieldType]]:
    """The texts and types of values that are being declared.

    Args:
        places: for each field, whether it stands inside JSON strings (True), outside of them (False) or both (None).
        types: the types of fields that were declared before.

    Raises:
        InvalidValueError: a value is not of its type.
    """
    known = dict(types or {})
    found = {}
    for name, value in values.items():
        kind = known[name] if name in known and not isinstance(value, Field) else type_of(value)
        where = places.get(name, False)
        mixed = kind.mixed or where is None or (name in known and known[name].in_json is not where)
        found[name] = replace(kind, in_json=bool(where) and not mixed, mixed=mixed)
    return {name: found[name].text(name, bare(value)) for name, value in values.items()}, found


def edited(values: Mapping[str, Value], types: Mapping[str, FieldType]) -> tuple[dict[str, str], dict[str, FieldType]]:
    """The texts of new values for declared fields, and the types to check them by.

    A `Field` may state more about this one value (`trusted=True`). Its kind must be the declared one.

    Raises:
        InvalidValueError: a value is not of the field's type.
    """
    texts, by = {}, {}
    for name, value in values.items():
        by[name] = types.get(name, TEXT)
        if isinstance(value, Field):
            if value.type.kind is not by[name].kind:
                raise InvalidValueError(
                    f"{name} was declared as {by[name].kind}, but this value is {value.type.kind}. The kind cannot change."
                )
            by[name].text(name, value.value)
            by[name] = replace(value.type, in_json=by[name].in_json)
        texts[name] = by[name].text(name, bare(value))
    return texts, by


def trusted_by(types: Mapping[str, FieldType]) -> str:
    """What an account says about fields whose values the guard does not check; empty if it checks all."""
    names = sorted(name for name, kind in types.items() if kind.trusted)
    return f"trusted, not checked by the guard: {', '.join(names)}" if names else ""


def bare(value: Value) -> Value:
    """The plain value; of a `Field`, the value in it."""
    return value.value if isinstance(value, Field) else value


def _check_needs_no_escape(name: str, text: str) -> None:
    if escaped(text) != text:
        raise InvalidValueError(
            f"{name} is used both inside and outside of JSON strings (or in a tool, which a template may write as JSON), but "
            f"{text!r} must be escaped in JSON only. Use two fields, or a value without quotes, backslashes and line breaks."
        )


def _kinds_of(value: Value) -> tuple[FieldKind, ...]:
    """The kinds that a value fits. The first one is the kind that it declares."""
    if isinstance(value, str) or value is None:
        return (FieldKind.TEXT, FieldKind.BLOCK)
    if isinstance(value, bool):
        return (FieldKind.BOOLEAN,)
    if isinstance(value, int | float | Decimal):
        return (FieldKind.NUMBER,)
    if isinstance(value, datetime):
        return (FieldKind.DATETIME,)
    if isinstance(value, date):
        return (FieldKind.DATE,)
    if isinstance(value, time):
        return (FieldKind.TIME,)
    return (FieldKind.TEXT,)


def _is_time(kind: FieldKind, text: str) -> bool:
    parse: Any = {FieldKind.DATE: date, FieldKind.DATETIME: datetime, FieldKind.TIME: time}[kind]
    try:
        parse.fromisoformat(text)
    except ValueError:
        return False
    return text.isascii()
