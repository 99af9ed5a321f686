"""Messages and tools in the format of OpenAI's chat API: checked and converted to what a notebook takes."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from programmable_kv.errors import InvalidValueError, UnknownFieldError
from programmable_kv.prompt.fields import Value
from programmable_kv.prompt.parts import Message, Text
from programmable_kv.prompt.template import leaves
from programmable_kv.prompt.tokens import as_text
from programmable_kv.prompt.values import check_no_markers, check_role
from programmable_kv.skills.skill import Skill

_PASSED = ("name", "tool_call_id", "reasoning_content")
"""keys that a message may have besides role, content and tool_calls; the chat template gets them"""


def message_of(given: Mapping[str, Any], tokenizer: Any) -> Message:
    """Convert a client's message.

    `content` is text, None or a list of text parts. The arguments in `tool_calls` are a JSON object or its text.
    Special tokens in these arguments and in `reasoning_content` are marked as plain text (`as_text`). The content is
    passed on unmarked: the caller marks it when it adds it to a prompt or a conversation.

    Raises:
        InvalidValueError: the message is malformed, its content is not text, a name, an id or a key has a special
            token, or a special token elsewhere cannot be written as plain text with this tokenizer.
    """
    if not isinstance(given, Mapping) or not isinstance(given.get("role"), str):
        raise InvalidValueError(f"a message is a mapping with 'role' and 'content', got {given!r:.200}")
    role = given["role"]
    check_role(role)
    unknown = [key for key, value in given.items() if key not in ("role", "content", "tool_calls", *_PASSED) and value]
    if unknown:
        raise InvalidValueError(
            f"the {role} message has {unknown[0]!r}, which is not passed to chat templates. Leave it out: a message has role, "
            f"content, tool_calls, {', '.join(_PASSED)}."
        )
    extra: dict[str, Any] = {key: given[key] for key in _PASSED if given.get(key)}
    if calls := given.get("tool_calls"):
        _require_list(calls, f"the tool calls of the {role} message")
        extra["tool_calls"] = [_call(call, role) for call in calls]
    return Message(role, Text(content_of(given.get("content"), role)), _as_text(extra, tokenizer, role))


def _require_list(value: object, what: str) -> None:
    if not isinstance(value, list | tuple):
        raise InvalidValueError(f"{what} are a list of mappings; got {type(value).__name__}: {value!r:.60}")


def declared(
    messages: Sequence[Message], elsewhere: Collection[str], fields: Mapping[str, Value | Skill]
) -> list[dict[str, Value | Skill]]:
    """For each message, the fields whose first placeholder it has, without those in `elsewhere` (tools, variables).

    Raises:
        UnknownFieldError: a field has no placeholder anywhere.
    """
    left = {name: value for name, value in fields.items() if name not in elsewhere}
    found = []
    for message in messages:
        content = message.content.template
        found.append({name: left.pop(name) for name in list(left) if "{" + name + "}" in content})
    if left:
        raise UnknownFieldError(
            f"no message, tool or template variable has the placeholder {{{next(iter(left))}}}. Write it where the value "
            "belongs, or do not declare the field."
        )
    return found


def content_of(content: Any, role: str) -> str:
    """The text of a message's content.

    Raises:
        InvalidValueError: the content is neither text, None, nor a list of text parts.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list | tuple):
        raise InvalidValueError(
            f"the content of the {role} message is text, None or a list of parts; got {type(content).__name__}"
        )
    texts: list[str] = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if not isinstance(text, str) or kind not in ("text", "input_text", "output_text"):
            raise InvalidValueError(
                f"the {role} message has a part of type {kind!r}: only text is cached. Leave it out, or describe it in text."
            )
        texts.append(text)
    return "\n".join(texts)


def checked_tools(tools: Sequence[Mapping[str, Any]] | None, tokenizer: Any) -> tuple[Mapping[str, Any], ...]:
    """Check tools in the format of OpenAI's API.

    Raises:
        InvalidValueError: `tools` is not a list, or a tool has no name or contains a special token.
    """
    if tools is not None:
        _require_list(tools, "tools")
    found = tuple(tools or ())
    for tool in found:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise InvalidValueError(
                "a tool is {'type': 'function', 'function': {'name': ..., 'description': ..., 'parameters': ...}}; got "
                f"{tool!r:.200}"
            )
        for text in _strings(tool):
            check_no_markers(text, tokenizer, f"the tool {function['name']}")
    return found


def checked_options(options: Mapping[str, Any] | None, tokenizer: Any) -> dict[str, Any]:
    """Check other variables of the chat template. They must be JSON, because they are saved with a notebook.

    Raises:
        InvalidValueError: the variables are not JSON, contain a special token, or are arguments of the rendering
            itself.
    """
    found = dict(options or {})
    reserved = {"messages", "tools", "tokenize", "add_generation_prompt", "continue_final_message", "chat_template"}
    if taken := reserved & found.keys():
        raise InvalidValueError(f"template_kwargs are variables of the chat template; {min(taken)} is not one")
    try:
        json.dumps(found)
    except (TypeError, ValueError) as error:
        raise InvalidValueError(f"template_kwargs are plain JSON values: {error}") from error
    for text in _strings(found):
        check_no_markers(text, tokenizer, "an option of the chat template")
    return found


def _call(call: Any, role: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise InvalidValueError(
            f"a tool call of the {role} message is {{'id': ..., 'function': {{'name': ..., 'arguments': ...}}}}; got "
            f"{call!r:.200}"
        )
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise InvalidValueError(
                f"the arguments of the call of {function['name']} are not JSON ({error}): {arguments[:80]!r}"
            ) from error
    if not isinstance(arguments, Mapping):
        raise InvalidValueError(
            f"the arguments of the call of {function['name']} are a JSON object; got {arguments!r:.80}"
        )
    kept = {key: call[key] for key in ("id",) if call.get(key)}
    return {**kept, "type": "function", "function": {"name": function["name"], "arguments": dict(arguments)}}


def _as_text(extra: Mapping[str, Any], tokenizer: Any, role: str) -> dict[str, Any]:
    """A message's other entries, with special tokens marked as plain text where a model may well generate them."""
    found = dict(extra)
    calls = found.pop("tool_calls", [])
    reasoning = found.pop("reasoning_content", "")
    arguments = [call["function"]["arguments"] for call in calls]
    names = [{**call, "function": call["function"]["name"]} for call in calls]
    keys = [key for each in arguments for key in _keys(each)]
    for text in _strings([found, names, keys]):
        check_no_markers(text, tokenizer, f"a name, an id or a key in the {role} message")
    if reasoning:
        found["reasoning_content"] = as_text(reasoning, tokenizer, f"the reasoning of the {role} message")
    if calls:
        what = f"a tool call of the {role} message"
        marked = [leaves(each, lambda text: as_text(text, tokenizer, what)) for each in arguments]
        found["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": each}}
            for call, each in zip(calls, marked, strict=True)
        ]
    return found


def _keys(value: Any) -> Iterator[str]:
    """Every key in JSON."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _keys(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _keys(item)


def _strings(value: Any) -> Iterator[str]:
    """Every string in JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
