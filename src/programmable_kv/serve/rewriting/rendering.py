"""Small made-up conversations that an upstream is asked to render. They show where its chat template puts a line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from programmable_kv.serve.rewriting.conversation import Form
from programmable_kv.serve.rewriting.forms import FORMS, INTACT, LOST, about_reasoning, about_rendering
from programmable_kv.serve.rewriting.prompt import CHAT, MESSAGES, RESPONSES

_CALL = "renderone"
"""Identity of a tool call: nine letters and digits, as some templates require."""
_TOOL = "look_up"
_HEAD = "qzhead"
_LINE = "qzline"
_THOUGHT = "qzthought"


@dataclass(frozen=True, slots=True)
class MadeUp:
    """A conversation in one protocol. Each message has a word that occurs nowhere else."""

    body: Mapping[str, Any] = field(repr=False)
    words: tuple[str, ...]
    """The words, in the order in which a rendering must have them."""

    def is_whole(self, text: str) -> bool:
        """Whether a rendering has each word once, in any order."""
        read = text.casefold()
        return all(read.count(word) == 1 for word in self.words)

    def is_intact(self, text: str) -> bool:
        """Whether a rendering has each word once, in the order of `words`."""
        read = text.casefold()
        places = [read.find(word) for word in self.words]
        return self.is_whole(text) and places == sorted(places)


def thoughts_in(text: str | None) -> int:
    """How often a rendering contains the reasoning. Many templates leave it out."""
    return text.casefold().count(_THOUGHT) if text is not None else 0


@dataclass(frozen=True, slots=True)
class Probe:
    """The conversations to render for one route, model and role of the system prompt."""

    route: str
    model: str
    head_role: str

    def without_lines(self, *, tools: bool) -> MadeUp:
        """The conversation to compare the others with. An upstream that does not render this one says nothing."""
        return self._conversation("", tools)

    def with_lines(self, *, tools: bool) -> Iterator[tuple[str, MadeUp]]:
        """For each role that a line's own message may have: the name for storing its verdict, and a conversation."""
        for role in self._roles():
            yield about_rendering(role, tools=tools), self._conversation(role, tools)

    def thinking(self) -> MadeUp | None:
        """A conversation that ends with a tool result, with reasoning before the call. None if no line can follow."""
        return self._thinking("") if Form.USER in FORMS[self.route] else None

    def thinking_with_lines(self) -> Iterator[tuple[str, MadeUp]]:
        """The conversation of `thinking` with a line at its end, in the form of `with_lines`. Many templates show
        reasoning only behind what they take for the last question.
        """
        for role in self._roles():
            yield about_reasoning(role), self._thinking(role)

    def _roles(self) -> list[str]:
        roles = [self.head_role] if Form.SYSTEM in FORMS[self.route] else []
        return roles + (["user"] if Form.USER in FORMS[self.route] else [])

    def _thinking(self, role: str) -> MadeUp:
        made = _Written(self.route)
        made.say("user", "qzfirst")
        made.use("qzresult", thought=f"It is {_THOUGHT} now.")
        made.line(role)
        return MadeUp(made.body(self.model, self.head_role, True), (_HEAD, *made.words))

    def _conversation(self, role: str, tools: bool) -> MadeUp:
        """A conversation with a line behind the first user message, behind the tool result if there is one, and at the
        end: the end of one request is in the middle of the next one.
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


def verdict_of(conversation: MadeUp, text: str | None, *, thoughts: int = 0) -> str:
    """The verdict on a rendering: `INTACT` or `LOST`.

    Args:
        text: the rendering; None if it was refused.
        thoughts: how often the rendering without lines contains the reasoning.
    """
    whole = text is not None and conversation.is_intact(text) and thoughts_in(text) == thoughts
    return INTACT if whole else LOST


class _Written:
    """Builds a conversation, message by message."""

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

    def use(self, word: str, thought: str = "") -> None:
        """Add a tool call, perhaps after some reasoning, and its result."""
        self.words.append(word)
        result = f"It is {word} there."
        if self._route == CHAT:
            call = {"id": _CALL, "type": "function", "function": {"name": _TOOL, "arguments": "{}"}}
            self._messages += [
                {"role": "assistant", "content": "", **_reasoned(thought), "tool_calls": [call]},
                {"role": "tool", "tool_call_id": _CALL, "name": _TOOL, "content": result},
            ]
        elif self._route == MESSAGES:
            self._messages += [
                {"role": "assistant", "content": [{"type": "tool_use", "id": _CALL, "name": _TOOL, "input": {}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": _CALL, "content": result}]},
            ]
        else:
            content = [{"type": "reasoning_text", "text": thought}]
            item = {"type": "reasoning", "id": "rs_renderone", "summary": [], "content": content}
            self._messages += [
                *([item] if thought else []),
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


def _reasoned(thought: str) -> dict[str, str]:
    """The reasoning under both names that servers use for it."""
    return {"reasoning_content": thought, "reasoning": thought} if thought else {}


def _tool(route: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {}}
    what = {"name": _TOOL, "description": "Looks something up."}
    if route == CHAT:
        return {"type": "function", "function": {**what, "parameters": schema}}
    if route == MESSAGES:
        return {**what, "input_schema": schema}
    return {"type": "function", **what, "parameters": schema}
