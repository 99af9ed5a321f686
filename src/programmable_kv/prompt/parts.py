"""What the author writes: text with `{field}` placeholders, as raw text or as chat messages.

Where a field's value stands is never found by searching for it: values are wrapped in private-use characters that
survive the chat template, and those marks are read off and removed.
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
"""around characters that are plain text, though the tokenizer would read a special token there"""
_PLACEHOLDER = re.compile(r"(?<![{$])\{([A-Za-z_][A-Za-z0-9_]*)\}(?!\})")
"""`{name}`; not the `{{name}}` and `${name}` of other template languages"""
_MARKED = re.compile(f"{_OPEN}(.*?){_NAMED}(.*?){_CLOSE}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of raw text; `{name}` stands for a field if `name` is among `fields`, and for itself otherwise."""

    template: str
    fields: tuple[str, ...] = ()

    def filled(self, values: Mapping[str, str]) -> str:
        """With values in place."""
        return self._replaced(lambda name: values[name])

    def marked(self, values: Mapping[str, str]) -> str:
        """With values in place, each between marks that name its field."""
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
            UnknownFieldError: a declared field never appears in the text.
        """
        missing = [name for name in self.fields if "{" + name + "}" not in self.template]
        if missing:
            raise UnknownFieldError(
                f"the text has no placeholder {{{missing[0]}}}. Write it where the value belongs, or do not declare the field."
            )


@dataclass(frozen=True, slots=True)
class Message:
    """A chat message: who speaks, and the text."""

    role: str
    content: Text
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """what else a client's message has, as JSON: `tool_calls`, `tool_call_id`, `name`, `reasoning_content`"""

    def as_json(self, write: Callable[[Text], str]) -> dict[str, Any]:
        """As chat templates take it, the content written by `write`."""
        return {"role": self.role, "content": write(self.content), **self.extra}


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text as the model reads it, and where each field's value stands in it (character spans, ascending).

    `text` may still have the marks of `shielded`; `unshielded` reads them off.
    """

    text: str
    places: tuple[tuple[str, Span], ...] = field(default=())
    plain: tuple[Span, ...] = field(default=())
    """characters in which no special token is meant, ascending"""


def unmark(marked: str) -> Rendered:
    """Read the marks off a rendered text."""
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
        raise TemplateError("the rendered text has stray field marks: the chat template cut a field's value apart")
    return Rendered(text, tuple(places))


def shielded(text: str, spans: Sequence[Span], what: str) -> str:
    """The text with marks around some characters (ascending) in which no special token is meant.

    The marks survive a chat template, and are read off by `unshielded` before anything is tokenised.

    Raises:
        InvalidValueError: the text has these private-use characters itself.
    """
    if _PLAIN in text or _PLAIN_ENDS in text:
        raise InvalidValueError(f"{what} contains the private-use characters U+E00A or U+E00B; remove them")
    pieces, cursor = [], 0
    for span in spans:
        pieces += [text[cursor : span.start], _PLAIN, text[span.start : span.stop], _PLAIN_ENDS]
        cursor = span.stop
    return "".join([*pieces, text[cursor:]])


def unshielded(rendered: Rendered) -> Rendered:
    """Without the marks of `shielded`, and with the characters that stood between them.

    Raises:
        TemplateError: a chat template cut marked text apart.
    """
    if _PLAIN not in rendered.text and _PLAIN_ENDS not in rendered.text:
        return rendered
    marks = [at for at, character in enumerate(rendered.text) if character in (_PLAIN, _PLAIN_ENDS)]
    if [rendered.text[at] for at in marks] != [_PLAIN, _PLAIN_ENDS] * (len(marks) // 2) or len(marks) % 2:
        raise TemplateError(
            "the chat template cut a special token in a message apart: remove that token from the message"
        )
    places = tuple((name, _without(span, marks)) for name, span in rendered.places)
    opened, closed = marks[::2], marks[1::2]
    found = [_without(Span(start, stop), marks) for start, stop in zip(opened, closed, strict=True)]
    plain = sorted([*(_without(span, marks) for span in rendered.plain), *found])
    return Rendered(unmarked(rendered.text), places, tuple(plain))


def unmarked(text: str) -> str:
    """Without the marks of `shielded`, to show it."""
    return text.replace(_PLAIN, "").replace(_PLAIN_ENDS, "")


def _without(span: Span, marks: Sequence[int]) -> Span:
    """A span once the marked characters are gone."""
    return Span(span.start - bisect_left(marks, span.start), span.stop - bisect_left(marks, span.stop))
