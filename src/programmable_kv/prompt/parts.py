"""The parts that an author writes: raw text or chat messages, with `{field}` placeholders.

This module never searches a text for a value. It wraps each value in private-use characters that survive the chat
template, then reads the value's place off these marks and removes them.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from programmable_kv.cache.span import Span
from programmable_kv.errors import InvalidValueError, TemplateError, UnknownFieldError

_OPEN, _NAMED, _CLOSE = "\ue000", "\ue001", "\ue002"
_PLAIN, _PLAIN_ENDS = "\ue00a", "\ue00b"
"""Marks around characters that are plain text although the tokenizer would read a special token there."""
_PLACEHOLDER = re.compile(r"(?<![{$])\{([A-Za-z_][A-Za-z0-9_]*)\}(?!\})")
"""`{name}`; not the `{{name}}` and `${name}` of other template languages"""
_MARKED = re.compile(f"{_OPEN}(.*?){_NAMED}(.*?){_CLOSE}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of raw text; `{name}` stands for a field if `name` is among `fields`, and for itself otherwise."""

    template: str
    fields: tuple[str, ...] = ()

    def filled(self, values: Mapping[str, str]) -> str:
        """The text with the values in place of the placeholders."""
        return self._replaced(lambda name: values[name])

    def marked(self, values: Mapping[str, str]) -> str:
        """As `filled`, with each value between marks that name its field."""
        if any(mark in self.template for mark in (_OPEN, _NAMED, _CLOSE)):
            raise InvalidValueError("the text contains the private-use characters U+E000 to U+E002; remove them")
        return self._replaced(lambda name: f"{_OPEN}{name}{_NAMED}{values[name]}{_CLOSE}")

    def _replaced(self, render: Callable[[str], str]) -> str:
        if not self.fields:
            return self.template
        return self._pattern.sub(lambda match: render(match.group()[1:-1]), self.template)

    @property
    def placeholders(self) -> list[str]:
        """The field of every placeholder, in order."""
        return [match.group()[1:-1] for match in self._pattern.finditer(self.template)] if self.fields else []

    @property
    def unfilled(self) -> list[str]:
        """The names that stand in braces as a placeholder does, and are no fields here."""
        return [name for name in _PLACEHOLDER.findall(self.template) if name not in self.fields]

    @property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape("{" + name + "}") for name in self.fields))

    def check(self) -> None:
        """
        Raises:
            UnknownFieldError: a declared field has no placeholder in the text.
        """
        missing = [name for name in self.fields if "{" + name + "}" not in self.template]
        if missing:
            raise UnknownFieldError(
                f"the text has no placeholder {{{missing[0]}}}. Write it where the value belongs, or do not declare the field."
            )


@dataclass(frozen=True, slots=True)
class Message:
    """A chat message: the speaker's role, and the text."""

    role: str
    content: Text
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """The other keys of a client's message, as JSON: `tool_calls`, `tool_call_id`, `name`, `reasoning_content`."""

    def as_json(self, write: Callable[[Text], str]) -> dict[str, Any]:
        """The message as chat templates take it; `write` turns the content into a string."""
        return {"role": self.role, "content": write(self.content), **self.extra}


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text as the model reads it, and the character span of each field's value in it (ascending).

    `text` may still have the marks of `shielded`; `unshielded` removes them.
    """

    text: str
    places: tuple[tuple[str, Span], ...] = field(default=())
    plain: tuple[Span, ...] = field(default=())
    """Characters that are plain text even where they spell a special token, ascending."""


def unmark(marked: str) -> Rendered:
    """Remove the field marks from a rendered text, and return the places that they named.

    Raises:
        TemplateError: the chat template cut a field's value apart.
    """
    pieces: list[str] = []
    places: list[tuple[str, Span]] = []
    length = cursor = 0
    for match in _MARKED.finditer(marked):
        before = marked[cursor : match.start()]
        value = match.group(2)
        start = length + len(before)
        places.append((match.group(1), Span(start, start + len(value))))
        pieces += [before, value]
        length, cursor = start + len(value), match.end()
    pieces.append(marked[cursor:])
    text = "".join(pieces)
    if any(mark in text for mark in (_OPEN, _NAMED, _CLOSE)):
        raise TemplateError("the rendered text has stray field marks: the chat template split a field's value")
    return Rendered(text, tuple(places))


def shielded(text: str, spans: Sequence[Span], what: str) -> str:
    """The text with marks around characters (`spans`, ascending) that are plain text though they spell a special token.

    The marks survive a chat template. `unshielded` removes them before anything is tokenised.

    Raises:
        InvalidValueError: the text itself contains these private-use characters.
    """
    if _PLAIN in text or _PLAIN_ENDS in text:
        raise InvalidValueError(f"{what} contains the private-use characters U+E00A or U+E00B; remove them")
    pieces, cursor = [], 0
    for span in spans:
        pieces += [text[cursor : span.start], _PLAIN, text[span.start : span.stop], _PLAIN_ENDS]
        cursor = span.stop
    return "".join([*pieces, text[cursor:]])


def unshielded(rendered: Rendered) -> Rendered:
    """The text without the marks of `shielded`; the spans between them are added to `plain`.

    Raises:
        TemplateError: the chat template cut marked text apart.
    """
    if _PLAIN not in rendered.text and _PLAIN_ENDS not in rendered.text:
        return rendered
    marks = [at for at, character in enumerate(rendered.text) if character in (_PLAIN, _PLAIN_ENDS)]
    if [rendered.text[at] for at in marks] != [_PLAIN, _PLAIN_ENDS] * (len(marks) // 2) or len(marks) % 2:
        raise TemplateError("the chat template split a special token in a message: remove that token from the message")
    places = tuple((name, _without(span, marks)) for name, span in rendered.places)
    opened, closed = marks[::2], marks[1::2]
    found = [_without(Span(start, stop), marks) for start, stop in zip(opened, closed, strict=True)]
    plain = sorted([*(_without(span, marks) for span in rendered.plain), *found])
    return Rendered(unmarked(rendered.text), places, tuple(plain))


def unmarked(text: str) -> str:
    """The text without the marks of `shielded`, for display."""
    return text.replace(_PLAIN, "").replace(_PLAIN_ENDS, "")


def _without(span: Span, marks: Sequence[int]) -> Span:
    """The span after the marks (their ascending indices) have been removed from the text."""
    return Span(span.start - bisect_left(marks, span.start), span.stop - bisect_left(marks, span.stop))
