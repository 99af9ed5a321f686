"""Counts requests in one model's tokens, rendered with its chat template as engines do. Loads only the tokenizer."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from programmable_kv.errors import TemplateError
from programmable_kv.explain.pieces import Request
from programmable_kv.explain.protocols import CHAT, COMPLETIONS, MESSAGES

_TEXT_TYPES = ("text", "input_text", "output_text")


@dataclass
class TokenCounter:
    """Counts and compares requests in tokens. Each request is rendered once."""

    name: str
    tokenizer: Any = field(repr=False)
    _ids: dict[tuple[int, bool], array[int]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, name: str | Path) -> TokenCounter:
        """The counter for a model, given as for `load_tokenizer`.

        Raises:
            ModelUnavailableError: the tokenizer cannot be loaded.
            TemplateError: the tokenizer has no chat template.
        """
        from programmable_kv.models.load import load_tokenizer

        tokenizer = load_tokenizer(name)
        if not getattr(tokenizer, "chat_template", None):
            raise TemplateError(
                f"the tokenizer of '{name}' has no chat template, so the prompt cannot be rendered. Name no model: the report "
                "then counts bytes, or the upstream's own tokens if the log has them."
            )
        return cls(str(name), tokenizer)

    def ids(self, request: Request, *, asks: bool = True) -> array[int]:
        """The token ids of a request as a model reads it; `asks` adds the opening of an answer.

        Raises:
            TemplateError: the chat template refuses the request.
        """
        known = (request.number, asks)
        if known not in self._ids:
            text = self._rendered(request, asks)
            found = self.tokenizer(text, add_special_tokens=request.protocol == COMPLETIONS)["input_ids"]
            self._ids[known] = array("I", found)
        return self._ids[known]

    def only_appended(self, earlier: Request, later: Request) -> bool:
        """Whether the later request begins with all tokens of the earlier one, without the opening of an answer."""
        closed = self.ids(earlier, asks=False)
        return self.ids(later)[: len(closed)] == closed

    def shared(self, one: Request, other: Request) -> int:
        """The number of equal tokens at the beginning of two requests."""
        a, b = self.ids(one), self.ids(other)
        low, high = 0, min(len(a), len(b))
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
        return low

    def count(self, text: str) -> int:
        """The number of tokens of a text on its own."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def writes_tools(self, request: Request) -> bool:
        """Whether the chat template writes the request's tools; True if the request has none."""
        tools = _tools(request.body)
        return tools is None or str(tools[0]["function"].get("name", "")) in self._rendered(request, asks=True)

    def _rendered(self, request: Request, asks: bool) -> str:
        from jinja2 import TemplateError as JinjaError

        if request.protocol == COMPLETIONS:
            return str(request.body["prompt"])
        messages = chat_messages(request)
        asks = asks and (not messages or messages[-1]["role"] != "assistant")
        options = request.options.get("chat_template_kwargs")
        arguments = dict(options) if isinstance(options, Mapping) else {}
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tools=_tools(request.body), tokenize=False, add_generation_prompt=asks, **arguments
                )
            )
        except (JinjaError, ValueError, TypeError) as error:
            raise TemplateError(
                f"{request.source}: the chat template of '{self.name}' refuses this request: {error}. Name no model: the "
                "report then counts bytes, or the upstream's own tokens if the log has them."
            ) from error


def chat_messages(request: Request) -> list[dict[str, Any]]:
    """The messages that an engine passes to a chat template for a request. Images and files are left out."""
    body = request.body
    if request.protocol == CHAT:
        return [_of_chat(message) for message in body.get("messages", [])]
    system = body.get("system" if request.protocol == MESSAGES else "instructions")
    found = [{"role": "system", "content": _text(system)}] if system else []
    if request.protocol == MESSAGES:
        for message in body.get("messages", []):
            found += _of_blocks(message)
    else:
        given = body.get("input")
        for item in [{"role": "user", "content": given}] if isinstance(given, str) else given or []:
            _add_item(found, item)
    return found


def _of_chat(message: Mapping[str, Any]) -> dict[str, Any]:
    role = "system" if message["role"] == "developer" else message["role"]
    kept = {key: message[key] for key in ("name", "tool_call_id", "reasoning_content") if message.get(key)}
    found = {"role": role, "content": _text(message.get("content")), **kept}
    if message.get("tool_calls"):
        calls = [(call.get("id"), call.get("function") or {}) for call in message["tool_calls"]]
        found["tool_calls"] = [_call(identity, f.get("name"), f.get("arguments")) for identity, f in calls]
    return found


def _of_blocks(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages for one Anthropic message: a message for each tool result, then one for the other blocks."""
    content = message.get("content")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    results = [
        {"role": "tool", "content": _text(block.get("content")), "tool_call_id": block.get("tool_use_id")}
        for block in blocks
        if block.get("type") == "tool_result"
    ]
    thoughts = "".join(str(block.get("thinking", "")) for block in blocks if block.get("type") == "thinking")
    calls = [
        _call(block.get("id"), block.get("name"), block.get("input"))
        for block in blocks
        if block.get("type") == "tool_use"
    ]
    text = _text(blocks)
    if results and not text:
        return results
    said: dict[str, Any] = {"role": message["role"], "content": text}
    if thoughts:
        said["reasoning_content"] = thoughts
    if calls:
        said["tool_calls"] = calls
    return [*results, said]


def _add_item(found: list[dict[str, Any]], item: Mapping[str, Any]) -> None:
    """Add a Responses item to the messages. The calls of one turn go into one message."""
    what = item.get("type", "message")
    if what == "message":
        role = "system" if item.get("role") == "developer" else str(item.get("role", "user"))
        found.append({"role": role, "content": _text(item.get("content"))})
    elif what in ("function_call", "custom_tool_call"):
        call = _call(item.get("call_id"), item.get("name"), item.get("arguments", item.get("input")))
        if not found or found[-1]["role"] != "assistant":
            found.append({"role": "assistant", "content": ""})
        found[-1].setdefault("tool_calls", []).append(call)
    elif what in ("function_call_output", "custom_tool_call_output"):
        found.append({"role": "tool", "content": _text(item.get("output")), "tool_call_id": item.get("call_id")})


def _call(identity: Any, name: Any, arguments: Any) -> dict[str, Any]:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = {"input": arguments}
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments or {}}}


def _tools(body: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The tools in the form of Chat Completions; None if there are none."""
    found = []
    for tool in body.get("tools") or []:
        if "function" in tool:
            found.append({"type": "function", "function": tool["function"]})
        elif "name" in tool:
            parameters = tool.get("input_schema") or tool.get("parameters") or {}
            about = {"name": tool["name"], "description": tool.get("description", ""), "parameters": parameters}
            found.append({"type": "function", "function": about})
    return found or None


def _text(content: Any) -> str:
    """The text of content. Parts of a list are joined by line breaks, as vLLM does for templates that take a string."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return json.dumps(content, ensure_ascii=False)
    texts = [part.get("text", "") for part in content if part.get("type", "text") in _TEXT_TYPES]
    return "\n".join(text for text in texts if isinstance(text, str))
