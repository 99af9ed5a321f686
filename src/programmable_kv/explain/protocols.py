"""Splits Chat Completions, Responses, Messages and Completions bodies into pieces in the order a model reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

from programmable_kv.errors import InvalidRequestError
from programmable_kv.explain.pieces import Kind, Piece

CHAT, RESPONSES, MESSAGES, COMPLETIONS = "chat.completions", "responses", "messages", "completions"
_MARKER = "cache_control"
_SYSTEM_ROLES = ("system", "developer")
_BLOCKS_OF_MESSAGES = ("tool_use", "tool_result", "thinking", "redacted_thinking")
_TEXTS = ("text", "input_text", "output_text", "refusal", "summary_text", "reasoning_text")
_THINKING_KEYS = ("reasoning_content", "reasoning")
STORED = "previous_response_id"
OPTIONS = ("tool_choice", "thinking", "reasoning_effort", "reasoning", "chat_template_kwargs", "prompt_cache_key")
"""Settings in a body that change how the prompt is rendered or whether a cache finds it."""


def protocol_of(body: Mapping[str, Any], route: str = "") -> str | None:
    """The protocol of a body, by its keys and its route if that is known; None if the body is not a request."""
    if "input" in body or "previous_response_id" in body:
        return RESPONSES if "messages" not in body else CHAT
    if "messages" not in body:
        return COMPLETIONS if isinstance(body.get("prompt"), str) else None
    path = route.partition("?")[0].rstrip("/")
    if path.endswith("/messages"):
        return MESSAGES
    if path.endswith("/chat/completions"):
        return CHAT
    return MESSAGES if _looks_like_messages(body) else CHAT


def pieces_of(body: Mapping[str, Any], protocol: str) -> tuple[Piece, ...]:
    """A body's pieces: tools, system prompt, conversation.

    Raises:
        InvalidRequestError: a part of the body does not have the form that the protocol requires.
    """
    return (*_tools(body), *_PARSERS[protocol](body))


def as_json(value: Any) -> str:
    """The value as JSON with its keys in the given order, because a template writes them in that order."""
    return json.dumps(value, ensure_ascii=False)


def _looks_like_messages(body: Mapping[str, Any]) -> bool:
    if "system" in body or "anthropic_version" in body or "stop_sequences" in body:
        return True
    tools = body.get("tools")
    if isinstance(tools, list) and any(isinstance(tool, Mapping) and "input_schema" in tool for tool in tools):
        return True
    contents = [m.get("content") for m in body["messages"] if isinstance(m, Mapping)] if body["messages"] else []
    blocks = [block for content in contents if isinstance(content, list) for block in content]
    return any(isinstance(block, Mapping) and block.get("type") in _BLOCKS_OF_MESSAGES for block in blocks)


def _tools(body: Mapping[str, Any]) -> Iterator[Piece]:
    name = "tools" if body.get("tools") else "functions"
    for index, tool in enumerate(_list(body.get(name), name)):
        kept = {key: value for key, value in tool.items() if key != _MARKER} if isinstance(tool, Mapping) else tool
        yield Piece(Kind.TOOL, as_json(kept), f"{name}[{index}]", marked=kept != tool)


def _chat(body: Mapping[str, Any]) -> Iterator[Piece]:
    head = True
    number = 0
    for index, message in enumerate(_list(body.get("messages"), "messages")):
        path = f"messages[{index}]"
        role = _role(message, path)
        head = head and role in _SYSTEM_ROLES
        if head:
            yield from _content(message.get("content"), f"{path}.content", role, None, Kind.SYSTEM)
            continue
        number += 1
        for key in _THINKING_KEYS:
            if message.get(key):
                yield Piece(Kind.THINKING, _text(message[key]), f"{path}.{key}", role, number)
        kind = Kind.RESULT if role in ("tool", "function") else Kind.TEXT
        said = list(_content(message.get("content"), f"{path}.content", role, number, kind))
        if kind is Kind.RESULT and message.get("tool_call_id"):
            said = [_named(piece, str(message["tool_call_id"])) for piece in said]
        yield from said
        for at, call in enumerate(_list(message.get("tool_calls"), f"{path}.tool_calls")):
            function = call.get("function") or call.get("custom") or {}
            text = _call(call.get("id"), function.get("name"), function.get("arguments", function.get("input")))
            yield Piece(Kind.CALL, text, f"{path}.tool_calls[{at}]", role, number)


def _messages(body: Mapping[str, Any]) -> Iterator[Piece]:
    yield from _blocks(body.get("system"), "system", "system", None)
    for index, message in enumerate(_list(body.get("messages"), "messages")):
        path = f"messages[{index}]"
        yield from _blocks(message.get("content"), f"{path}.content", _role(message, path), index + 1)


def _blocks(content: Any, path: str, role: str, number: int | None) -> Iterator[Piece]:
    """The pieces of Anthropic's content. A string is short for one text block, so its form does not matter."""
    kind = Kind.SYSTEM if number is None else Kind.TEXT
    if content is None:
        return
    if isinstance(content, str):
        yield Piece(kind, content, path, role, number)
        return
    for index, block in enumerate(_list(content, path)):
        at = f"{path}[{index}]"
        marked = _MARKER in block
        what = block.get("type")
        if what == "text":
            yield Piece(kind, _text(block.get("text")), at, role, number, marked=marked)
        elif what == "thinking":
            yield Piece(Kind.THINKING, _text(block.get("thinking")), at, role, number)
            if block.get("signature"):
                yield Piece(Kind.OPAQUE, _text(block["signature"]), f"{at}.signature", role, number)
        elif what == "tool_use":
            text = _call(block.get("id"), block.get("name"), block.get("input"))
            yield Piece(Kind.CALL, text, at, role, number, marked=marked)
        elif what == "tool_result":
            content_path = f"{at}.content"
            for piece in _blocks(block.get("content"), content_path, role, number):
                result = piece if piece.secret else _of_kind(piece, Kind.RESULT)
                yield _named(result, str(block.get("tool_use_id", "")), marked=marked)
        else:
            yield _other(block, at, role, number, marked)


def _responses(body: Mapping[str, Any]) -> Iterator[Piece]:
    if body.get("instructions"):
        yield Piece(Kind.SYSTEM, _text(body["instructions"]), "instructions", "system")
    if body.get("previous_response_id"):  # not in the log: `logs.py` inserts the answers that it knows
        yield Piece(Kind.OPAQUE, str(body["previous_response_id"]), STORED, "server")
    given = body.get("input")
    if isinstance(given, str):
        yield Piece(Kind.TEXT, given, "input", "user", 1, "string")
    else:
        yield from _items(_list(given, "input"))


def _items(items: Sequence[Mapping[str, Any]]) -> Iterator[Piece]:
    head = True
    number = 0
    for index, item in enumerate(items):
        at = f"input[{index}]"
        what = item.get("type", "message")
        if what == "message" and head and item.get("role") in _SYSTEM_ROLES:
            yield from _content(item.get("content"), f"{at}.content", str(item["role"]), None, Kind.SYSTEM)
            continue
        head = False
        number += 1
        if what == "message":
            yield from _content(item.get("content"), f"{at}.content", _role(item, at), number, Kind.TEXT)
        elif what in ("function_call", "custom_tool_call"):
            text = _call(item.get("call_id"), item.get("name"), item.get("arguments", item.get("input")))
            yield Piece(Kind.CALL, text, at, "assistant", number)
        elif what in ("function_call_output", "custom_tool_call_output"):
            output = item.get("output")
            text = output if isinstance(output, str) else as_json(output)
            yield _named(Piece(Kind.RESULT, text, at, "tool", number), str(item.get("call_id", "")))
        elif what == "reasoning":
            for part in _list(item.get("summary"), f"{at}.summary"):
                yield Piece(Kind.THINKING, _text(part.get("text")), at, "assistant", number)
            if item.get("encrypted_content"):
                secret = _text(item["encrypted_content"])
                yield Piece(Kind.OPAQUE, secret, f"{at}.encrypted_content", "assistant", number)
        else:
            yield _other(item, at, str(item.get("role", "assistant")), number, False)


def _completions(body: Mapping[str, Any]) -> Iterator[Piece]:
    yield Piece(Kind.TEXT, str(body["prompt"]), "prompt", "user", 1)


def _content(content: Any, path: str, role: str, number: int | None, kind: Kind) -> Iterator[Piece]:
    """The pieces of OpenAI's content. Servers may render a string and a list of parts differently, so `form` is set."""
    if content is None:
        return
    if isinstance(content, str):
        if content or kind is Kind.RESULT:
            yield Piece(kind, content, path, role, number, "string")
        return
    for index, part in enumerate(_list(content, path)):
        at = f"{path}[{index}]"
        marked = _MARKER in part
        if part.get("type", "text") in _TEXTS:
            text = next((part[key] for key in ("text", "refusal") if isinstance(part.get(key), str)), "")
            yield Piece(kind, text, at, role, number, "list", marked)
        else:
            yield _other(part, at, role, number, marked)


def _other(block: Mapping[str, Any], path: str, role: str, number: int | None, marked: bool) -> Piece:
    """A piece for an image or a file, compared by its digest, or for a block of unknown type, compared as JSON."""
    kept = {key: value for key, value in block.items() if key != _MARKER}
    text = as_json(kept)
    what = str(block.get("type", "block"))
    if what == "redacted_thinking" or "encrypted" in text:
        return Piece(Kind.OPAQUE, text, path, role, number, marked=marked)
    if what in ("image", "image_url", "input_image", "document", "file", "input_file", "input_audio"):
        return Piece(Kind.MEDIA, f"{what} {sha256(text.encode()).hexdigest()}", path, role, number, marked=marked)
    return Piece(Kind.TEXT if number is not None else Kind.SYSTEM, text, path, role, number, marked=marked)


def _call(identity: Any, name: Any, arguments: Any) -> str:
    written = arguments if isinstance(arguments, str) else as_json(arguments)
    return f"{name}({written})" + (f" [{identity}]" if identity else "")


def _named(piece: Piece, identity: str, *, marked: bool = False) -> Piece:
    """A tool's result with the id of its call added to its text: the request contains both."""
    text = f"{piece.text} [{identity}]" if identity and not piece.secret else piece.text
    return Piece(piece.kind, text, piece.path, piece.role, piece.message, piece.form, piece.marked or marked)


def _of_kind(piece: Piece, kind: Kind) -> Piece:
    return Piece(kind, piece.text, piece.path, piece.role, piece.message, piece.form, piece.marked)


def _role(message: Any, path: str) -> str:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequestError(f"{path} is {_shown(message)}; expected an object with a role and content")
    return str(message["role"])


def _list(value: Any, path: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidRequestError(f"{path} is {_shown(value)}; expected a list")
    for index, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise InvalidRequestError(f"{path}[{index}] is {_shown(item)}; expected an object")
    return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else as_json(value)


def _shown(value: Any) -> str:
    return type(value).__name__ if value is not None else "missing"


_PARSERS: dict[str, Callable[[Mapping[str, Any]], Iterator[Piece]]] = {
    CHAT: _chat,
    RESPONSES: _responses,
    MESSAGES: _messages,
    COMPLETIONS: _completions,
}
