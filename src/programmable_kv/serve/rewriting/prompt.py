"""Splits a request into units (system prompt, messages): a frame that must not change, and texts whose values may."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from programmable_kv.serve.rewriting.body import Body, Spot, written
from programmable_kv.serve.rewriting.template_dates import dates_of, with_dates
from programmable_kv.serve.rewriting.tools import MARKER, digests_of, in_order, plain

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
ROUTES = (CHAT, MESSAGES, RESPONSES)
"""Routes whose requests can be rewritten."""
_HEAD_ROLES = ("system", "developer")
_SYSTEM = {MESSAGES: "system", RESPONSES: "instructions"}
"""Member of the body with the system prompt, in protocols that keep it outside the messages."""
_LIST = {CHAT: "messages", MESSAGES: "messages", RESPONSES: "input"}
"""Member of the body with the messages."""
_STORED = ("previous_response_id", "conversation")
"""Members that name a conversation stored by the server."""
_BOUND = ("redacted_thinking",)
"""Types of blocks that a server accepts only behind the text after which they were generated."""
_SIGNED = ("signature", "encrypted_content", "encrypted_index", "encrypted_stdout")
"""Members that mark blocks and items with the same restriction."""

_REASONING = ("reasoning_content", "reasoning")
"""Members of a message that contain the model's reasoning."""
_THOUGHT_ENDS = "</think>"


@dataclass(frozen=True, slots=True)
class Unit:
    """A system prompt outside the messages, or one message (in Responses: one item)."""

    role: str
    index: int | None
    """Its index among the messages; None for a system prompt outside them."""
    head: bool
    """Whether it stands before the conversation."""
    frame: str
    """A digest of everything except its texts and its `cache_control` markers."""
    texts: Mapping[str, str] = field(repr=False)
    """Its texts, by their places in the content."""
    paths: Mapping[str, str] = field(repr=False)
    """The paths of these places in the body."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request, as units."""

    route: str
    body: Body
    model: str
    tools: str
    """A digest of all tools."""
    order: tuple[str, ...]
    """A digest of each tool, in the request's order."""
    dates: Mapping[str, str]
    """Variables of the chat template that are dates or times."""
    head: tuple[Unit, ...]
    """The units before the conversation."""
    turns: tuple[Unit, ...]
    """The units of the conversation."""
    units: tuple[Unit, ...]
    """`head`, then `turns`."""

    def spot(self, unit: Unit) -> Spot:
        """Where a unit stands in the body."""
        if unit.index is None:
            return self.body.spots[_SYSTEM[self.route]]
        return self.body.items[_LIST[self.route]][unit.index]

    def size(self, *units: Unit) -> int:
        """Bytes of some units in the client's body."""
        spots = [self.spot(unit) for unit in units]
        if self.body.text.isascii():  # then each character is one byte
            return sum(spot.stop - spot.start for spot in spots)
        return sum(len(self.body.text[spot.start : spot.stop].encode()) for spot in spots)

    def value(self, unit: Unit) -> Any:
        """A unit's value in the client's body."""
        if unit.index is None:
            return self.body.data[_SYSTEM[self.route]]
        return self.body.data[_LIST[self.route]][unit.index]


def prompt_of(route: str, body: Body) -> Prompt | None:
    """Split a request into units; None if it breaks its protocol, or continues a conversation that a server stores."""
    data = body.data
    messages = data.get(_LIST[route])
    model = data.get("model")
    if not isinstance(messages, list) or not messages or not isinstance(model, str):
        return None
    if any(data.get(name) for name in _STORED):
        return None
    units: list[Unit] = []
    if system := data.get(_SYSTEM[route]) if route in _SYSTEM else None:
        if not isinstance(system, str | list):
            return None
        units.append(_unit(route, {"role": "system", "content": system}, None, True, _SYSTEM[route]))
    head = route != MESSAGES
    for index, message in enumerate(messages):
        role = _role(message)
        if not role:
            return None
        head = head and role in _HEAD_ROLES
        path = f"{_LIST[route]}[{index}].content"
        units.append(_unit(route, {**message, "role": role}, index, head, path))
    before, turns = (tuple(unit for unit in units if unit.head is stands) for stands in (True, False))
    return Prompt(route, body, model, *digests_of(body), dates_of(body), before, turns, (*before, *turns))


def with_texts(value: Any, texts: Mapping[str, str], more: tuple[str, ...], *, route: str) -> Any:
    """A unit's value with some texts replaced, and further texts appended.

    Args:
        value: a message, or the system prompt of Messages.
        more: texts to append, each as a block if the content is a list, and as a paragraph if it is text.
    """
    whole = isinstance(value, Mapping)
    content = value.get("content") if whole else value
    if isinstance(content, str):
        content = "\n\n".join([texts.get(_ONLY[route], content), *more])
    elif isinstance(content, list):
        content = [_block_with(block, texts, str(at)) for at, block in enumerate(content)]
        kind = "input_text" if route == RESPONSES else "text"
        content += [{"type": kind, "text": text} for text in more]
    return {**value, "content": content} if whole else content


def open_calls(prompt: Prompt) -> bool:
    """Whether a tool call in the conversation has no result yet."""
    called: set[str] = set()
    for unit in prompt.turns:
        message = prompt.value(unit)
        content = message.get("content")
        if prompt.route == RESPONSES:
            kind, identity = str(message.get("type", "message")), str(message.get("call_id"))
            if kind.endswith("_call") and "call_id" in message:
                called.add(identity)
            elif kind.endswith("_output"):
                called.discard(identity)
            continue
        blocks = [block for block in content if isinstance(block, Mapping)] if isinstance(content, list) else []
        if unit.role == "assistant":
            calls = message.get("tool_calls")
            called = {str(call.get("id")) for call in calls or () if isinstance(call, Mapping)}
            called |= {str(block.get("id")) for block in blocks if block.get("type") == "tool_use"}
            continue
        called.discard(str(message.get("tool_call_id")))
        called -= {str(block.get("tool_use_id")) for block in blocks if block.get("type") == "tool_result"}
    return bool(called)


def holds_thinking(prompt: Prompt) -> bool:
    """Whether the conversation contains reasoning, or results of a server's own tools, bound to the text before them.

    The members of the model's own blocks decide this, never the words of a text."""
    for unit in prompt.turns:
        value = prompt.value(unit)
        if _is_bound(value):
            return True
        content = value.get("content")
        if unit.role == "assistant" and isinstance(content, list) and any(map(_holds_bound, content)):
            return True
    return False


def is_reasoned(prompt: Prompt) -> bool:
    """Whether the model wrote reasoning since the last user message: in members or items of the protocols, or with the
    tag that chat templates look for."""
    for unit in reversed(prompt.turns):
        if unit.role == "user":
            return False
        value = prompt.value(unit)
        content = value.get("content")
        if unit.role == "assistant" and (
            value.get("type") == "reasoning"
            or any(value.get(name) for name in _REASONING)
            or (isinstance(content, str) and _THOUGHT_ENDS in content)
        ):
            return True
    return False


def _holds_bound(block: Any) -> bool:
    """Whether a block, or one of its results or citations, is bound to the text before it."""
    if not isinstance(block, Mapping):
        return False
    inner = [each for name in ("content", "citations") for each in _items(block.get(name))]
    return _is_bound(block) or any(map(_is_bound, inner))


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_bound(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    return value.get("type") in _BOUND or any(name in value for name in _SIGNED)


def digest(value: Any) -> str:
    """A digest of data. It depends on the order of keys, because a template writes them in that order."""
    return blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _role(message: Any) -> str:
    """The role of a message, or the role that the type of another item of Responses implies. Empty if there is none."""
    if not isinstance(message, Mapping):
        return ""
    if isinstance(message.get("role"), str):
        return str(message["role"])
    kind = message.get("type")
    if not isinstance(kind, str) or kind == "message":
        return ""
    return "tool" if kind.endswith("_output") else "assistant"


def _unit(route: str, message: Mapping[str, Any], index: int | None, head: bool, path: str) -> Unit:
    content = message.get("content")
    if isinstance(content, str) and len(message) == 2 and len(message["role"]) <= _LONGEST_ROLE:  # most messages
        place = _ONLY[route]
        return Unit(message["role"], index, head, _frame(route, message["role"]), {place: content}, {place: path})
    found = {at: (text, where) for at, text, where in _texts(content, route, path)}

    def blank(value: Any, at: str) -> Any:
        return "" if at in found else value

    shape: Any = content
    if isinstance(content, str):
        shape = _EMPTY[route]
    elif isinstance(content, list):
        shape = [_framed(block, str(at), blank) for at, block in enumerate(content)]
    rest = {key: value for key, value in message.items() if key not in ("content", MARKER)}
    texts = {at: text for at, (text, _) in found.items()}
    paths = {at: where for at, (_, where) in found.items()}
    return Unit(str(message["role"]), index, head, digest([rest, shape]), texts, paths)


_ONLY = {CHAT: "", MESSAGES: "0", RESPONSES: ""}
"""Place of a content that is a string. In Messages a string is short for one text block."""
_EMPTY = {CHAT: "", MESSAGES: [{"type": "text", "text": ""}], RESPONSES: ""}
"""Shape of such a content, without its text."""
_LONGEST_ROLE = 32


@lru_cache(maxsize=256)
def _frame(route: str, role: str) -> str:
    """The frame of a message that has only a role and a text."""
    return digest([{"role": role}, _EMPTY[route]])


def _texts(content: Any, route: str, path: str) -> Iterator[tuple[str, str, str]]:
    if isinstance(content, str):
        yield _ONLY[route], content, path
        return
    for at, block in enumerate(content if isinstance(content, list) else ()):
        if not isinstance(block, Mapping):
            continue
        if isinstance(block.get("text"), str):
            yield str(at), block["text"], f"{path}[{at}].text"
        inner = block.get("content")
        if isinstance(inner, str):
            yield f"{at}.", inner, f"{path}[{at}].content"
        for below, part in enumerate(inner if isinstance(inner, list) else ()):
            if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                yield f"{at}.{below}", part["text"], f"{path}[{at}].content[{below}].text"


def _framed(block: Any, at: str, blank: Callable[[Any, str], Any]) -> Any:
    if not isinstance(block, Mapping):
        return block
    found = dict(plain(block))
    if "text" in found:
        found["text"] = blank(found["text"], at)
    inner = found.get("content")
    if isinstance(inner, str):
        found["content"] = blank(inner, f"{at}.")
    elif isinstance(inner, list):
        found["content"] = [
            {**plain(part), "text": blank(part["text"], f"{at}.{below}")}
            if isinstance(part, Mapping) and "text" in part
            else plain(part)
            for below, part in enumerate(inner)
        ]
    return found


def _block_with(block: Any, texts: Mapping[str, str], at: str) -> Any:
    if not isinstance(block, Mapping):
        return block
    found = dict(block)
    if at in texts:
        found["text"] = texts[at]
    if f"{at}." in texts:
        found["content"] = texts[f"{at}."]
    inner = found.get("content")
    if isinstance(inner, list):
        found["content"] = [
            {**part, "text": texts[f"{at}.{below}"]} if f"{at}.{below}" in texts else part
            for below, part in enumerate(inner)
        ]
    return found


def rewritten(
    prompt: Prompt,
    changes: Mapping[int, tuple[Any, tuple[Any, ...]]],
    order: tuple[str, ...] = (),
    dates: Mapping[str, str] | None = None,
) -> bytes:
    """The body with some units changed, and messages inserted behind them.

    Args:
        changes: a unit's place in `prompt.units` -> its new value (None: unchanged) and the messages to put behind it.
        order: the order of the tools, as digests; empty: unchanged.
        dates: the dates of the chat template, by variable; empty: unchanged.
    """
    splices: list[tuple[Spot, str]] = [in_order(prompt.body, prompt.order, order)] if order else []
    splices += [with_dates(prompt.body, dates)] if dates else []
    for place, (value, behind) in changes.items():
        spot = prompt.spot(prompt.units[place])
        if value is not None:
            splices.append((spot, written(value)))
        if behind:
            stop = Spot(spot.stop, spot.stop)
            splices.append((stop, "".join(f",{written(message)}" for message in behind)))
    return prompt.body.spliced(splices)
