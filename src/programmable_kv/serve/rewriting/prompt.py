"""A request as units (system prompt, messages): each a frame that must stay, and texts in which values may change."""

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
"""routes whose requests can be rewritten"""
_HEAD_ROLES = ("system", "developer")
_SYSTEM = {MESSAGES: "system", RESPONSES: "instructions"}
"""the member that holds the system prompt beside the messages"""
_LIST = {CHAT: "messages", MESSAGES: "messages", RESPONSES: "input"}
"""the member that holds the messages"""
_STORED = ("previous_response_id", "conversation")
"""members that name a conversation that the server holds"""
_BOUND = ("redacted_thinking",)
"""types of blocks that a server takes back only behind what they were made behind"""
_SIGNED = ("signature", "encrypted_content", "encrypted_index", "encrypted_stdout")
"""members of blocks and items of which the same holds"""

_REASONING = ("reasoning_content", "reasoning")
"""members of a message that hold the model's reasoning"""
_THOUGHT_ENDS = "</think>"


@dataclass(frozen=True, slots=True)
class Unit:
    """A system prompt beside the messages, or one message (in Responses: one item)."""

    role: str
    index: int | None
    """its number among the messages; None for a system prompt beside them"""
    head: bool
    """whether it stands before the conversation"""
    frame: str
    """a digest of all but its texts and its `cache_control` markers"""
    texts: Mapping[str, str] = field(repr=False)
    """place in its content -> text"""
    paths: Mapping[str, str] = field(repr=False)
    """the same places as paths in the body"""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request."""

    route: str
    body: Body
    model: str
    tools: str
    """a digest of the tools"""
    order: tuple[str, ...]
    """a digest of each tool, in their order"""
    dates: Mapping[str, str]
    """variables of the chat template that are dates"""
    head: tuple[Unit, ...]
    """what stands before the conversation"""
    turns: tuple[Unit, ...]
    """the conversation"""
    units: tuple[Unit, ...]
    """both, in this order"""

    def spot(self, unit: Unit) -> Spot:
        """Where a unit stands in the body."""
        if unit.index is None:
            return self.body.spots[_SYSTEM[self.route]]
        return self.body.items[_LIST[self.route]][unit.index]

    def size(self, *units: Unit) -> int:
        """Bytes of some units as they came."""
        spots = [self.spot(unit) for unit in units]
        if self.body.text.isascii():  # known without a look at the text
            return sum(spot.stop - spot.start for spot in spots)
        return sum(len(self.body.text[spot.start : spot.stop].encode()) for spot in spots)

    def value(self, unit: Unit) -> Any:
        """A unit as it came."""
        if unit.index is None:
            return self.body.data[_SYSTEM[self.route]]
        return self.body.data[_LIST[self.route]][unit.index]


def prompt_of(route: str, body: Body) -> Prompt | None:
    """A request as units; None where it has not the form of its protocol."""
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
    """A unit's value with other texts at some places, and further texts at its end.

    Args:
        value: a message, or the system prompt of Messages.
        more: each is a block where the content is a list, and a paragraph where it is text.
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
    """Whether a tool was called in the conversation and its result is not there yet."""
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
    """Whether the conversation holds reasoning, or results of a server's own tools, that are bound to what stands before them:
    as the members of the model's own blocks say, never the words of a text."""
    for unit in prompt.turns:
        value = prompt.value(unit)
        if _is_bound(value):
            return True
        content = value.get("content")
        if unit.role == "assistant" and isinstance(content, list) and any(map(_holds_bound, content)):
            return True
    return False


def is_reasoned(prompt: Prompt) -> bool:
    """Whether the model wrote reasoning since the last user message: as members and items of the protocols, or as the tag that
    chat templates look for."""
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
    """Whether a block is bound, or one of its results or citations is."""
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
    """A digest of data. The order of keys counts: a template writes them in that order."""
    return blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def _role(message: Any) -> str:
    """Who says a message. Items of Responses that are none say it by their type; empty where nothing does."""
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
    if isinstance(content, str) and len(message) == 2 and len(message["role"]) <= _LONGEST_ROLE:  # most of them
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
"""the place of a content that is a text. In Messages it is short for one block"""
_EMPTY = {CHAT: "", MESSAGES: [{"type": "text", "text": ""}], RESPONSES: ""}
"""the shape of such a content"""
_LONGEST_ROLE = 32


@lru_cache(maxsize=256)
def _frame(route: str, role: str) -> str:
    """The frame of a message that is a role and a text."""
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
    """The body with some units in another form, and messages put in behind them.

    Args:
        changes: a unit's place in `prompt.units` -> its value, and the messages behind it. None leaves it as it came.
        order: that of the tools; empty leaves them as they came.
        dates: of the chat template; empty leaves them as they came.
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
