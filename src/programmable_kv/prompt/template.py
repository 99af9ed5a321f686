"""A tokenizer's chat template with its other arguments: tools, options, and whether to fold system messages.

A template is a program, so its own text is found by rendering: `skeleton` replaces every string that the messages say
by a mark, and the text between the marks is the template's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from programmable_kv.errors import TemplateError
from programmable_kv.prompt.parts import Message, Text, unmarked

HEAD_ROLES = ("system", "developer")
"""Roles that speak before the first turn."""
_MARK = "\ue009{}\ue00c"
"""Stands for the n-th string that messages say; no template trims or interprets it. `parts.py` has other marks."""

_CLOCK = "{% macro strftime_now(format) %}{{ date_of_today }}{% endmacro %}\n"
"""Prepended to a template that asks the clock: a given date answers in any format. The line break is not rendered."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and its arguments.

    `{name}` in a string of `tools` or `options` is a field for every name in `fields`.
    """

    tokenizer: Any = field(repr=False)
    tools: tuple[Mapping[str, Any], ...] = ()
    """Tools in the form of OpenAI's API."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Other template variables, as JSON: `enable_thinking`, `date_string`. A string for `strftime_now` is the date."""
    fields: tuple[str, ...] = ()
    fold_system: bool = False
    """Whether a system message goes into the first user turn if the template has no place for one."""
    enders: dict[tuple[str, ...], str] = field(default_factory=dict, compare=False, repr=False)
    """Cache of `chat.ender`: the roles of the last messages -> the text that is written only if nothing follows."""

    @cached_property
    def folds(self) -> bool:
        """Whether leading system messages are put into the first user turn."""
        return self.fold_system and not self.takes_system

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template itself renders a system message before the first user turn."""
        messages = [neutral("system"), neutral("user")]
        try:
            replace(self, fold_system=False, enders={}).skeleton(messages, dict.fromkeys(self.fields, ""))
        except TemplateError:
            return False
        return True

    @cached_property
    def without_tools(self) -> ChatTemplate:
        """The same template without tools."""
        return replace(self, tools=(), enders={}) if self.tools else self

    @property
    def placeholders(self) -> set[str]:
        """The fields whose placeholders stand in tools or options."""
        texts = json.dumps([*self.tools, dict(self.options)], ensure_ascii=False)
        return {name for name in self.fields if "{" + name + "}" in texts}

    # -- rendering -----------------------------------------------------------------------------------------------------

    def filled(self, messages: Sequence[Message], values: Mapping[str, str], *, asks: bool = False) -> str:
        """The text of messages with values in place; `asks` adds the opening of an answer.

        Raises:
            TemplateError: the template refuses these messages.
        """
        return self._rendered(messages, lambda text: text.filled(values), asks)

    def marked(self, messages: Sequence[Message], values: Mapping[str, str], *, asks: bool = False) -> str:
        """As `filled`, with every value between marks that name its field (`parts.unmark` reads them)."""
        return self._rendered(messages, lambda text: text.marked(values), asks)

    def skeleton(
        self, messages: Sequence[Message], values: Mapping[str, str], *, since: int = 0, asks: bool = False
    ) -> tuple[str, ...]:
        """The template's own text around each string that the messages from index `since` on say.

        It does not depend on those strings. The first piece includes the earlier messages, filled with values.

        Raises:
            TemplateError: the template refuses these messages, or drops, repeats or moves what one of them says.
        """
        marks = marking()
        given = [m.as_json(lambda text: text.filled(values)) for m in messages[:since]]
        said = [_marked_message(m, values, marks) for m in messages[since:]]
        text = self._applied([*given, *said], lambda text: text.filled(values), asks)
        pieces: list[str] = []
        number = 0
        for message in messages[since:]:
            for saying in sayings(message, values):
                mark = _MARK.format(number)
                before, found, text = text.partition(mark)
                if not found or mark in text:
                    does = "repeats" if found else "drops or rewrites" if mark not in "".join(pieces) else "moves"
                    shown = unmarked(saying).strip()[:60]
                    raise TemplateError(
                        f"the chat template {does} the {message.role} message at this point: {shown!r} must appear "
                        "once and in its place in the rendered text. Use another role, or raw text parts."
                    )
                pieces.append(before)
                number += 1
        return (*pieces, text)

    def _rendered(self, messages: Sequence[Message], write: Callable[[Text], str], asks: bool) -> str:
        return self._applied([message.as_json(write) for message in messages], write, asks)

    def _applied(self, messages: list[dict[str, Any]], write: Callable[[Text], str], asks: bool) -> str:
        tools = [_written(tool, self.fields, write) for tool in self.tools] or None
        options = _written(dict(self.options), self.fields, write)
        if self.folds:
            messages = _folded(messages)
        try:
            return self._called(messages, tools, options, asks)
        except TypeError as error:  # the template concatenates a tool call's arguments as a string
            if not any(message.get("tool_calls") for message in messages):
                raise TemplateError(f"the chat template cannot render this conversation: {error}") from error
            try:
                return self._called([_with_arguments_as_text(m) for m in messages], tools, options, asks)
            except TypeError:
                raise TemplateError(f"the chat template cannot render these tool calls: {error}") from error

    def _called(self, messages: list[dict[str, Any]], tools: Any, options: Mapping[str, Any], asks: bool) -> str:
        from jinja2 import TemplateError as JinjaError

        if isinstance(options.get("strftime_now"), str):
            options = {**options, "chat_template": _CLOCK + self.tokenizer.get_chat_template(tools=tools)}
            options["date_of_today"] = options.pop("strftime_now")
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=asks, **options
                )
            )
        except (JinjaError, ValueError) as error:
            roles = ", ".join(message["role"] for message in messages[-4:])
            raise TemplateError(f"the chat template refuses this conversation (... {roles}): {error}") from error


def neutral(role: str) -> Message:
    """A message whose content does not matter, only its presence."""
    return Message(role, Text("OK"))


def sayings(message: Message, values: Mapping[str, str]) -> list[str]:
    """The strings that a message says and the rendered text must contain: content, tool-call names and arguments."""
    found: list[str] = []

    def note(text: str) -> str:
        found.append(text)
        return text

    _replaced(message, values, note)
    return found


def says(rendered: str, pieces: Sequence[str], said: Sequence[str]) -> bool:
    """Whether a text is a skeleton's pieces with the strings `said` between them.

    The strings may be unchanged, trimmed, JSON-escaped or in another case. Text marked as plain (`parts.shielded`) must
    be marked in both.
    """
    if not rendered.startswith(pieces[0]):
        return False
    cursor = len(pieces[0])
    for saying, piece in zip(said, pieces[1:], strict=True):
        for form in _forms(saying):
            if rendered.startswith(form + piece, cursor):
                cursor += len(form) + len(piece)
                break
        else:
            return False
    return cursor == len(rendered)


def marking() -> Iterator[str]:
    """The marks of a skeleton, in order."""
    number = 0
    while True:
        yield _MARK.format(number)
        number += 1


def mark(number: int) -> str:
    """The mark of the n-th string said."""
    return _MARK.format(number)


def marked_json(messages: Sequence[Message], values: Mapping[str, str]) -> tuple[Message, ...]:
    """The messages with a mark instead of every string that they say."""
    marks = marking()
    found = []
    for message in messages:
        said = _marked_message(message, values, marks)
        role, content = said.pop("role"), said.pop("content")
        found.append(Message(role, Text(content), said))
    return tuple(found)


def _forms(saying: str) -> list[str]:
    forms = [saying, saying.strip(), saying.lstrip(), saying.rstrip()]
    forms += [json.dumps(saying, ensure_ascii=False)[1:-1], json.dumps(saying)[1:-1]]
    return [*forms, *(form.upper() for form in forms), *(form.lower() for form in forms)]


def _marked_message(message: Message, values: Mapping[str, str], marks: Iterator[str]) -> dict[str, Any]:
    return _replaced(message, values, lambda _: next(marks))


def _replaced(message: Message, values: Mapping[str, str], write: Callable[[str], str]) -> dict[str, Any]:
    """The message as JSON, with `write` applied to every string that it says."""
    found = message.as_json(lambda text: text.filled(values))
    if found["content"].strip():
        found["content"] = write(found["content"])
    if found.get("tool_calls"):
        found["tool_calls"] = [
            {
                **call,
                "function": {
                    **call["function"],
                    "name": write(call["function"]["name"]),
                    "arguments": leaves(call["function"].get("arguments", {}), write),
                },
            }
            for call in found["tool_calls"]
        ]
    return found


def leaves(value: Any, write: Callable[[str], str]) -> Any:
    """The JSON value with `write` applied to every string that is neither a key nor blank."""
    if isinstance(value, str):
        return write(value) if value.strip() else value
    if isinstance(value, Mapping):
        return {key: leaves(item, write) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [leaves(item, write) for item in value]
    return value


def _written(value: Any, fields: tuple[str, ...], write: Callable[[Text], str]) -> Any:
    if not fields:
        return value
    return leaves(value, lambda text: write(Text(text, tuple(name for name in fields if "{" + name + "}" in text))))


def _with_arguments_as_text(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"].get("arguments", {}), ensure_ascii=False),
            },
        }
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _folded(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with leading system messages moved to the beginning of the user message that follows them."""
    count = 0
    while count < len(messages) and messages[count]["role"] in HEAD_ROLES:
        count += 1
    if not 0 < count < len(messages) or messages[count]["role"] != "user":
        return messages
    content = "\n\n".join(message["content"] for message in messages[: count + 1])
    return [{**messages[count], "content": content}, *messages[count + 1 :]]
