"""What the author writes: text with `{field}` placeholders, as raw text or as chat messages.

Where a field's value stands is never found by searching for it: values are wrapped in private-use characters that
survive the chat template, and those marks are read off and removed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from programmable_kv.cache.span import Span
from programmable_kv.errors import InvalidValueError, TemplateError, UnknownFieldError

_OPEN, _NAMED, _CLOSE = "\ue000", "\ue001", "\ue002"
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
    """Text as the model reads it, and where each field's value stands in it (character spans, ascending)."""

    text: str
    places: tuple[tuple[str, Span], ...] = field(default=())


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
