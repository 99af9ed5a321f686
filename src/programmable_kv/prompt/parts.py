"""What the author writes: text with `{field}` placeholders, as raw text or as chat messages; and how it is rendered.

Where a field's value stands is never found by searching for it: values are wrapped in private-use characters that
survive the chat template, and those marks are read off and removed. A template that does not leave them where they
were put is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from programmable_kv.cache.span import Span
from programmable_kv.errors import InvalidValueError, TemplateError, UnknownFieldError

_OPEN, _NAMED, _CLOSE = "\ue000", "\ue001", "\ue002"
_EARLIER = "\ue008"
"""what earlier messages say, where only their presence matters"""
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

    def _replaced(self, render: Any) -> str:
        if not self.fields:
            return self.template
        pattern = re.compile("|".join(re.escape("{" + name + "}") for name in self.fields))
        return pattern.sub(lambda match: str(render(match.group()[1:-1])), self.template)

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


def render_chat(
    tokenizer: Any, messages: Sequence[Message], values: Mapping[str, str], *, prompt_for_answer: bool = False
) -> Rendered:
    """Messages through the tokenizer's own chat template.

    Raises:
        TemplateError: the template refuses these roles, or changes what the messages say.
    """
    marked = _apply(tokenizer, [(m.role, m.content.marked(values)) for m in messages], prompt_for_answer)
    plain = _apply(tokenizer, [(m.role, m.content.filled(values)) for m in messages], prompt_for_answer)
    rendered = unmark(marked)
    if rendered.text != plain or len(rendered.places) != _count(messages):
        raise TemplateError(
            "the chat template changes a message in a way that depends on its content, so field spans cannot be exact. "
            "Put no field at the very start or end of a message, or use raw text parts."
        )
    return rendered


def continuation(
    tokenizer: Any,
    messages: Sequence[Message],
    more: Sequence[Message],
    values: Mapping[str, str],
    *,
    prompt_for_answer: bool = False,
) -> Rendered:
    """What rendering `more` after `messages` adds.

    Raises:
        TemplateError: adding a message would change how the earlier ones are rendered, or the template refuses it.
    """
    before = render_chat(tokenizer, messages, values).text
    after = render_chat(tokenizer, [*messages, *more], values, prompt_for_answer=prompt_for_answer)
    if not after.text.startswith(before):
        raise TemplateError(
            "the chat template renders earlier messages differently once another follows, so a cached conversation cannot "
            "be continued as it stands. Use raw text parts, or a template that only appends."
        )
    places = tuple((name, span.shifted(-len(before))) for name, span in after.places if span.start >= len(before))
    return Rendered(after.text[len(before) :], places)


def message_alone(tokenizer: Any, message: Message, values: Mapping[str, str]) -> Rendered:
    """What a template adds for one message in mid-conversation: without what it puts at the start of every conversation.

    Raises:
        TemplateError: the template takes no message of that role after any of the beginnings tried, or gives the earlier
            ones another form because of it.
    """
    refused: TemplateError | None = None
    for roles in (("system",), ("system", "user"), ("user", "assistant"), ("system", "user", "assistant"), ("user",)):
        try:
            alone = continuation(tokenizer, [Message(role, Text(_EARLIER)) for role in roles], [message], values)
        except TemplateError as error:
            refused = error
            continue
        if alone.text and _EARLIER not in alone.text:
            return alone
    raise refused or TemplateError(
        f"the chat template does not render a {message.role} message apart from those before it, so it cannot be compiled "
        "alone. Compile the text without a role."
    )


def said(tokenizer: Any, messages: Sequence[tuple[str, str]], *, left_open: bool) -> str:
    """A conversation of (role, content); `left_open`: only up to where the content of its last message ends.

    Raises:
        InvalidValueError: the last message has a private-use character that marks its end here.
        TemplateError: the template refuses these roles, or does not say what the last message says just once.
    """
    if not left_open:
        return _apply(tokenizer, messages, False)
    *earlier, (role, content) = messages
    if _EARLIER in content:
        raise InvalidValueError(f"the text contains the private-use character U+{ord(_EARLIER):04X}; remove it")
    before, mark, after = _apply(tokenizer, [*earlier, (role, content + _EARLIER)], False).partition(_EARLIER)
    if not mark or _EARLIER in after:
        raise TemplateError(
            f"the chat template drops or repeats the {role} message, so no text has its place in it. Write the preface as "
            "raw text."
        )
    return before


def _count(messages: Sequence[Message]) -> int:
    return sum(len(re.findall("|".join(re.escape("{" + n + "}") for n in m.content.fields), m.content.template))
               if m.content.fields else 0 for m in messages)  # fmt: skip


def _apply(tokenizer: Any, messages: Sequence[tuple[str, str]], prompt_for_answer: bool) -> str:
    from jinja2 import TemplateError as JinjaError

    conversation = [{"role": role, "content": content} for role, content in messages]
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt_for_answer))
    except (JinjaError, ValueError) as error:
        roles = ", ".join(role for role, _ in messages[-4:])
        raise TemplateError(f"the chat template refuses this conversation (... {roles}): {error}") from error
