"""Messages: `/v1/messages`, Anthropic's protocol."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from programmable_kv.serve.checks import refuse
from programmable_kv.serve.local.answers import Answer, End, Piece
from programmable_kv.serve.local.asks import (
    Ask,
    calls_of,
    check_known,
    count,
    flag,
    limit_of,
    mappings,
    model_of,
    sampling_of,
    stops_of,
)
from programmable_kv.serve.local.forms import event, text_of

_READ = (
    "model", "messages", "system", "max_tokens", "stop_sequences", "stream", "temperature", "top_p", "top_k", "tools",
    "tool_choice",
)  # fmt: skip
_WITHOUT_EFFECT = ("metadata", "cache_control")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "thinking": ({"type": "disabled"},), "service_tier": ("auto", "standard_only"), "mcp_servers": ([],),
    "speed": ("standard",), "output_config": ({},),
}  # fmt: skip
_REASON = {End.MODEL: "end_turn", End.LENGTH: "max_tokens", End.STOP: "stop_sequence", End.CALLS: "tool_use"}
_MARKER = "cache_control"


class MessageForm:
    """One request to Messages and its answer."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        """
        Raises:
            RefusedError: a part of the body is missing, has the wrong type or is not supported.
            InvalidArgumentError: the token limit is below 1, or the stop strings are invalid.
        """
        check_known(body, _READ, _NEUTRAL, _WITHOUT_EFFECT)
        if body.get("max_tokens") is None:
            refuse("invalid_request", "max_tokens is required: give a whole number")
        sampling = sampling_of(
            {**body, "seed": None}, limit_of(body, "max_tokens", default=1), stops_of(body, "stop_sequences")
        )
        if body.get("top_k") is not None:
            sampling["top_k"] = count(body, "top_k", 1)
        messages: list[Mapping[str, Any]] = []
        if body.get("system") not in (None, "", []):
            messages.append({"role": "system", "content": _text(body["system"], "system")})
        given = list(mappings(body.get("messages"), "messages"))
        if not given:
            refuse("invalid_request", "messages must be a list of at least one message")
        for message in given:
            messages += _messages(message)
        tools, most_calls = _tools(body.get("tools")), _most_calls(body.get("tool_choice"))
        self.ask = Ask(model_of(body), messages, sampling, flag(body, "stream"), tools, most_calls)
        self._identity = f"msg_{secrets.token_hex(12)}"
        self._open = False
        """Whether the stream's text block has begun."""

    def whole(self, answer: Answer, pieces: Sequence[Piece]) -> Mapping[str, Any]:
        """See `Form`."""
        text = text_of(pieces)
        said = [{"type": "text", "text": text}] if text or not answer.calls else []
        return {
            **self._head(),
            "content": [*said, *_uses(answer)],
            "stop_reason": _REASON[answer.end],
            "stop_sequence": answer.stop,
            "usage": _usage(answer),
        }

    def begin(self, answer: Answer) -> Iterator[bytes]:
        """See `Form`."""
        usage = {**_usage(answer), "output_tokens": 0}
        message = {**self._head(), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        yield _event("message_start", message=message)

    def said(self, answer: Answer, piece: Piece) -> Iterator[bytes]:
        """See `Form`."""
        if not self._open:
            yield from self._opened()
        yield _event("content_block_delta", index=0, delta={"type": "text_delta", "text": piece.text})

    def finish(self, answer: Answer) -> Iterator[bytes]:
        """See `Form`."""
        if not self._open and not answer.calls:
            yield from self._opened()
        if self._open:
            yield _event("content_block_stop", index=0)
        for index, use in enumerate(_uses(answer), start=int(self._open)):
            yield _event("content_block_start", index=index, content_block={**use, "input": {}})
            delta = {"type": "input_json_delta", "partial_json": json.dumps(use["input"])}
            yield _event("content_block_delta", index=index, delta=delta)
            yield _event("content_block_stop", index=index)
        ended = {"stop_reason": _REASON[answer.end], "stop_sequence": answer.stop}
        yield _event("message_delta", delta=ended, usage=_usage(answer))
        yield _event("message_stop")

    def _opened(self) -> Iterator[bytes]:
        self._open = True
        yield _event("content_block_start", index=0, content_block={"type": "text", "text": ""})

    def _head(self) -> dict[str, Any]:
        return {"id": self._identity, "type": "message", "role": "assistant", "model": self.ask.model}


def _usage(answer: Answer) -> dict[str, Any]:
    """The `usage` member. In this protocol, `input_tokens` does not include tokens that were read from the cache."""
    return {
        "input_tokens": answer.prompt_tokens - answer.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": answer.cached_tokens,
        "output_tokens": answer.text_tokens,
    }


def _event(kind: str, **data: Any) -> bytes:
    return event({"type": kind, **data}, kind)


def _messages(message: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Convert a message to Chat Completions: tool results become messages, and calls a part of the model's message."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant"):
        refuse("invalid_request", "a message must be an object with content and the role user or assistant")
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    blocks = list(mappings(content, "a message's content"))
    calls: list[Mapping[str, Any]] = []
    said: list[Mapping[str, Any]] = []
    for block in blocks:
        kind = block.get("type")
        if kind == "tool_result" and role == "user":
            result = block.get("content")
            text = "" if result is None else _text(result, "the content of a tool_result")
            yield {"role": "tool", "content": text, "tool_call_id": str(block.get("tool_use_id") or "")}
        elif kind == "tool_use" and role == "assistant":
            calls.append(_call(block))
        elif kind == "text":
            said.append(block)
        else:
            refuse("unsupported_parameter", "this role does not take a block of this type")
    if said or calls or not blocks:
        text = _text(said, "a message's content")
        yield {"role": role, "content": text, **({"tool_calls": calls} if calls else {})}


def _call(block: Mapping[str, Any]) -> dict[str, Any]:
    name, given = block.get("name"), block.get("input")
    if not isinstance(name, str) or not isinstance(given, Mapping):
        refuse("invalid_request", "a tool_use must have a name, and an object as input")
    return {"id": str(block.get("id") or ""), "type": "function", "function": {"name": name, "arguments": given}}


def _text(value: Any, what: str) -> str:
    """The text of a string, or of a list of text blocks."""
    if isinstance(value, str):
        return value
    texts = [block.get("text") for block in mappings(value, what) if block.get("type") == "text"]
    if len(texts) != len(value) or not all(isinstance(text, str) for text in texts):
        refuse("unsupported_parameter", f"{what} must be text or a list of text blocks: nothing else is supported")
    return "\n".join(str(text) for text in texts)


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    found = []
    for tool in mappings(value, "tools") if value is not None else ():
        if tool.get("type", "custom") not in ("custom", None) or not isinstance(tool.get("name"), str):
            refuse(
                "unsupported_parameter", "a tool must have a name and an input_schema: server tools are not supported"
            )
        known = {"name", "description", "input_schema", "type", _MARKER}
        if any(value for name, value in tool.items() if name not in known):
            refuse("unsupported_parameter", f"a tool may have only {', '.join(sorted(known))}")
        told = {"description": tool["description"]} if tool.get("description") else {}
        function = {"name": tool["name"], **told, "parameters": tool.get("input_schema") or {}}
        found.append({"type": "function", "function": function})
    return tuple(found)


def _most_calls(choice: Any) -> int | None:
    if choice is None:
        return None
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if kind not in ("auto", "none"):
        refuse("unsupported_parameter", "tool_choice must be of type auto or none: this server cannot enforce a call")
    return calls_of(kind == "auto", not flag(choice, "disable_parallel_tool_use"))


def _uses(answer: Answer) -> list[dict[str, Any]]:
    return [
        {
            "type": "tool_use",
            "id": call.identity.replace("call_", "toolu_"),
            "name": call.name,
            "input": json.loads(call.arguments),
        }
        for call in answer.calls
    ]
