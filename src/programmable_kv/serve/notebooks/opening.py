"""Writes a notebook's own part of a request, which comes before the client's messages, in each protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

from programmable_kv.serve.notebooks.book import HEAD_ROLES, Book, filled
from programmable_kv.serve.notebooks.source import invalid, tools_differ
from programmable_kv.serve.rewriting.body import Body, Spot, read, written
from programmable_kv.serve.rewriting.prompt import CHAT, MESSAGES, RESPONSES, Unit, prompt_of

_LIST = {CHAT: "messages", MESSAGES: "messages", RESPONSES: "input"}
_SYSTEM = {MESSAGES: "system", RESPONSES: "instructions"}
_HEADLESS = "These messages hold values that may change."
"""The system prompt of a notebook that has fields and no system message. The announcement of later lines follows it."""
_MARK = "\ue000"
"""A character that no value contains."""
Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Own:
    """The units of a notebook, and of the client's own system prompt, with one set of values."""

    head: tuple[Unit, ...]
    turns: tuple[Unit, ...]
    """The notebook's messages after its system prompt."""


def request_of(route: str, body: Body, book: Book, texts: Mapping[str, str]) -> Body:
    """Return the request as a client without notebooks would send it. The client's own text stays byte for byte.

    Raises:
        RefusedError: the request does not have the form of its protocol, or gives other tools than the notebook's.
    """
    system, own = _own(route, body, book, texts)
    name = _LIST[route]
    said = body.data.get(name)
    changes = [(body.spots["model"], written(book.upstream_model))]
    if isinstance(said, str) and route == RESPONSES:
        changes.append((body.spots[name], written([*own, {"role": "user", "content": said}])))
    elif not body.items.get(name):
        raise invalid(f"{name} must be a list of at least one message")
    elif own:
        first = body.items[name][0].start
        changes.append((Spot(first, first), "".join(f"{written(each)}," for each in own)))
    members: dict[str, Any] = {} if system is None else {_SYSTEM[route]: system}
    tools = tools_of(route, book)
    if body.data.get("tools") not in (None, [], tools):
        raise tools_differ()
    if tools:
        members["tools"] = tools
    if book.source.get("template_kwargs") and "chat_template_kwargs" not in body.spots:
        members["chat_template_kwargs"] = book.source["template_kwargs"]
    start = body.text.index("{") + 1
    changes += [(body.spots[key], written(value)) for key, value in members.items() if key in body.spots]
    new = "".join(f"{written(key)}:{written(value)}," for key, value in members.items() if key not in body.spots)
    found = read(body.spliced([*changes, (Spot(start, start), new)]))
    assert found is not None, "a body that was read can be read again"
    return found


def own_of(route: str, body: Body, book: Book, texts: Mapping[str, str]) -> Own:
    """Return the notebook's units with a set of values, as in the request that `request_of` returns.

    Args:
        body: the client's body. The client's own system prompt belongs to the head.
    """
    system, own = _own(route, body, book, texts)
    said = body.data.get(_LIST[route])
    leading: Messages = []
    for message in said if isinstance(said, list) and route != MESSAGES else ():
        if not isinstance(message, Mapping) or message.get("role") not in HEAD_ROLES:
            break
        leading.append(dict(message))
    asked = {"model": "", _LIST[route]: [*own, *leading, {"role": "user", "content": ""}]}
    small = read(json.dumps(asked if system is None else {**asked, _SYSTEM[route]: system}).encode())
    prompt = prompt_of(route, small) if small is not None else None
    if prompt is None:
        raise invalid("the request's system prompt is not valid in its protocol")
    among_turns = [each for each in own if route == MESSAGES or each.get("role") not in HEAD_ROLES]
    first = own.index(among_turns[0]) if among_turns else len(own)
    return Own(prompt.head, prompt.turns[: len(own) - first])


def marked(book: Book) -> dict[str, str]:
    """Return a value for each field that differs from every possible value, to find the field's places."""
    return {name: f"{_MARK}{name}" for name in book.texts}


def places_of(one: Sequence[Unit], other: Sequence[Unit]) -> list[tuple[Unit, str]]:
    """Return the places at which the texts of two renderings differ, as (unit, path of the text)."""
    return [
        (unit, unit.paths[at])
        for unit, another in zip(one, other, strict=True)
        for at, text in unit.texts.items()
        if another.texts[at] != text
    ]


def tools_of(route: str, book: Book) -> list[Any]:
    """Return the notebook's tools in the form of a protocol."""
    return [_tool(route, tool) for tool in book.source.get("tools") or ()]


def check_tools(tools: Sequence[Any] | None) -> None:
    """
    Raises:
        RefusedError: a tool cannot be written in every protocol.
    """
    for tool in tools or ():
        function = tool.get("function") if isinstance(tool, Mapping) else None
        named = isinstance(function, Mapping) and isinstance(function.get("name"), str)
        if not named or tool.get("type", "function") != "function":
            raise invalid("a tool must be {'type': 'function', 'function': {'name': ...}}: others are not supported")


def _own(route: str, body: Body, book: Book, texts: Mapping[str, str]) -> tuple[Any, Messages]:
    """Return the member for the system prompt (None: keep the client's), and the messages before the client's."""
    messages = filled(book.messages, {**texts, **book.skills})
    count = next((at for at, each in enumerate(messages) if each["role"] not in HEAD_ROLES), len(messages))
    head, rest = messages[:count], messages[count:]
    if book.texts and not head:
        head = [{"role": "system", "content": _HEADLESS}]
    if route == CHAT:
        return None, [*head, *rest]
    client = body.data.get(_SYSTEM[route])
    if not isinstance(client, str | NoneType) and not (route == MESSAGES and isinstance(client, list)):
        of = "text or a list of text blocks" if route == MESSAGES else "text"
        raise invalid(f"{_SYSTEM[route]} must be {of}: it is appended to the notebook's own")
    if route == MESSAGES:
        blocks = [block for each in head for block in _blocks(each["content"])]
        given = client if isinstance(client, list) else _blocks(client)
        return ([*blocks, *given] if head else None), _as_claude(rest)
    parts = ["".join(block["text"] for block in _blocks(each["content"])) for each in head]
    given = [client] if isinstance(client, str) and client else []
    return ("\n\n".join([*parts, *given]) if head else None), [item for each in rest for item in _as_items(each)]


def _blocks(content: Any) -> list[Any]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return [_block(part) for part in content] if isinstance(content, list) else []


def _block(part: Any) -> Any:
    """A part of a notebook's content, with its type. A text part may leave its type out."""
    return {"type": "text", **part} if isinstance(part, Mapping) and "type" not in part else part


def _as_claude(messages: Messages) -> Messages:
    found: Messages = []
    for message in messages:
        role, blocks = message["role"], _blocks(message["content"])
        if role == "tool":
            result = {"type": "tool_result", "tool_use_id": message["tool_call_id"], "content": blocks}
            if found and found[-1]["role"] == "user" and _is_result(found[-1]["content"][-1:]):
                found[-1]["content"].append(result)  # the protocol wants all results of one turn in one message
                continue
            role, blocks = "user", [result]
        for call in message.get("tool_calls") or ():
            given = json.loads(call["function"]["arguments"])
            blocks.append({"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": given})
        found.append({"role": role, "content": blocks})
    return found


def _is_result(blocks: Messages) -> bool:
    return any(block["type"] == "tool_result" for block in blocks)


def _as_items(message: Mapping[str, Any]) -> Messages:
    text = "".join(block["text"] for block in _blocks(message["content"]))
    if message["role"] == "tool":
        return [{"type": "function_call_output", "call_id": message["tool_call_id"], "output": text}]
    calls = [
        {
            "type": "function_call", "call_id": call["id"], "name": call["function"]["name"],
            "arguments": call["function"]["arguments"],
        }
        for call in message.get("tool_calls") or ()
    ]  # fmt: skip
    return [*([{"role": message["role"], "content": text}] if text or not calls else []), *calls]


def _tool(route: str, tool: Mapping[str, Any]) -> Any:
    function = tool["function"]
    if route == CHAT:
        return tool
    rest = {key: value for key, value in tool.items() if key not in ("type", "function")}
    if route == RESPONSES:
        return {"type": "function", **function, **rest}
    rest = {key: value for key, value in function.items() if key != "parameters"} | rest
    return {**rest, "input_schema": function.get("parameters") or {"type": "object", "properties": {}}}
