"""Small made-up conversations that an upstream is asked to render: they show where its chat template leaves a line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from programmable_kv.serve.rewriting.conversation import Form
from programmable_kv.serve.rewriting.forms import FORMS, INTACT, LOST, about_rendering
from programmable_kv.serve.rewriting.prompt import CHAT, MESSAGES, RESPONSES

_CALL = "renderone"
"""of nine letters and digits, as some templates ask"""
_TOOL = "look_up"
_HEAD = "qzhead"
_LINE = "qzline"


@dataclass(frozen=True, slots=True)
class MadeUp:
    """A conversation in one protocol, each message with a word that is nowhere else."""

    body: Mapping[str, Any] = field(repr=False)
    words: tuple[str, ...]
    """in the order in which a reader has to find them"""

    def is_whole(self, text: str) -> bool:
        """Whether a rendering has each word once, wherever it stands."""
        read = text.casefold()
        return all(read.count(word) == 1 for word in self.words)

    def is_intact(self, text: str) -> bool:
        """Whether a rendering has each word once, and in this order."""
        read = text.casefold()
        places = [read.find(word) for word in self.words]
        return self.is_whole(text) and places == sorted(places)


@dataclass(frozen=True, slots=True)
class Probe:
    """What is asked of one upstream, model and role of the system prompt."""

    route: str
    model: str
    head_role: str

    def without_lines(self, *, tools: bool) -> MadeUp:
        """The conversation that the others are compared with: an upstream that does not render this one says nothing."""
        return self._conversation("", tools)

    def with_lines(self, *, tools: bool) -> Iterator[tuple[str, MadeUp]]:
        """For each role in which lines may be messages: under what name its verdict is remembered, and a conversation."""
        roles = [self.head_role] if Form.SYSTEM in FORMS[self.route] else []
        roles += ["user"] if Form.USER in FORMS[self.route] else []
        for role in roles:
            yield about_rendering(role, tools=tools), self._conversation(role, tools)

    def _conversation(self, role: str, tools: bool) -> MadeUp:
        """With a line behind the first user message, behind a tool's result where there is one, and at the end: what stands at
        the end of one request stands in the middle of the next one.
        """
        made = _Written(self.route)
        made.say("user", "qzfirst")
        made.line(role)
        if tools:
            made.use("qzresult")
            made.line(role)
        made.say("assistant", "qzanswer")
        made.say("user", "qzsecond")
        made.line(role)
        return MadeUp(made.body(self.model, self.head_role, tools), (_HEAD, *made.words))


def verdict_of(conversation: MadeUp, text: str | None) -> str:
    """What a rendering showed.

    Args:
        text: the rendering; None where it was refused.
    """
    return INTACT if text is not None and conversation.is_intact(text) else LOST


class _Written:
    """A conversation while it is written, message by message."""

    def __init__(self, route: str) -> None:
        self._route = route
        self._messages: list[dict[str, Any]] = []
        self._lines = 0
        self.words: list[str] = []

    def say(self, role: str, word: str) -> None:
        self.words.append(word)
        self._messages.append({"role": role, "content": f"It is {word} here."})

    def line(self, role: str) -> None:
        if role:
            self._lines += 1
            self.say(role, f"{_LINE}{'abc'[self._lines - 1]}")

    def use(self, word: str) -> None:
        """A tool is called, and answers."""
        self.words.append(word)
        result = f"It is {word} there."
        if self._route == CHAT:
            call = {"id": _CALL, "type": "function", "function": {"name": _TOOL, "arguments": "{}"}}
            self._messages += [
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": _CALL, "name": _TOOL, "content": result},
            ]
        elif self._route == MESSAGES:
            self._messages += [
                {"role": "assistant", "content": [{"type": "tool_use", "id": _CALL, "name": _TOOL, "input": {}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": _CALL, "content": result}]},
            ]
        else:
            self._messages += [
                {"type": "function_call", "call_id": _CALL, "name": _TOOL, "arguments": "{}"},
                {"type": "function_call_output", "call_id": _CALL, "output": result},
            ]

    def body(self, model: str, head_role: str, tools: bool) -> dict[str, Any]:
        head, listed = f"It is {_HEAD} above.", "input" if self._route == RESPONSES else "messages"
        found: dict[str, Any] = {"model": model, listed: self._messages}
        if self._route == MESSAGES:
            found |= {"max_tokens": 1, "system": head}
        elif self._route == RESPONSES and head_role == "system":
            found["instructions"] = head
        else:
            found[listed] = [{"role": head_role, "content": head}, *self._messages]
        return found | ({"tools": [_tool(self._route)]} if tools else {})


def _tool(route: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {}}
    what = {"name": _TOOL, "description": "Looks something up."}
    if route == CHAT:
        return {"type": "function", "function": {**what, "parameters": schema}}
    if route == MESSAGES:
        return {**what, "input_schema": schema}
    return {"type": "function", **what, "parameters": schema}
