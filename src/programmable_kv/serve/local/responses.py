"""Responses: `/v1/responses`. The server stores nothing: each request contains its whole conversation."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from programmable_kv.serve.checks import refuse
from programmable_kv.serve.local.answers import Answer, Drawn, End, Piece
from programmable_kv.serve.local.asks import (
    DEFAULT_TOKENS,
    Ask,
    at_most,
    calls_of,
    check_known,
    count,
    flag,
    limit_of,
    mappings,
    model_of,
    sampling_of,
)
from programmable_kv.serve.local.chat import may_call, refuse_strict
from programmable_kv.serve.local.forms import event, shares_of, text_of, tokens_of

_READ = (
    "model", "input", "instructions", "stream", "temperature", "top_p", "max_output_tokens", "tools", "tool_choice",
    "include", "top_logprobs",
)  # fmt: skip
_WITHOUT_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key", "stream_options")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "store": (False,), "background": (False,), "truncation": ("disabled",), "parallel_tool_calls": (True, False),
    "text": ({}, {"format": {"type": "text"}}), "reasoning": ({},), "service_tier": ("auto", "default"),
}  # fmt: skip
_SHARES = "message.output_text.logprobs"
_MOST_LIKELIEST = 20
_LENGTH = {"reason": "max_output_tokens"}


class ResponseForm:
    """One request to Responses and its answer."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        """
        Raises:
            RefusedError: a part of the body is missing, has the wrong type or is not supported.
            InvalidArgumentError: the token limit is below 1.
        """
        check_known(body, _READ, _NEUTRAL, _WITHOUT_EFFECT)
        instructions, include = body.get("instructions"), body.get("include") or []
        if instructions is not None and not isinstance(instructions, str):
            refuse("invalid_request", "instructions must be text")
        if include not in ([], [_SHARES]):
            refuse("unsupported_parameter", f"include may contain only {_SHARES}")
        likeliest = at_most(count(body, "top_logprobs", 0), "top_logprobs", _MOST_LIKELIEST)
        messages = [{"role": "system", "content": instructions}] if instructions else []
        messages += _messages(body.get("input"))
        sampling = sampling_of({**body, "seed": None}, limit_of(body, "max_output_tokens", default=DEFAULT_TOKENS))
        tools = _tools(body.get("tools"))
        most_calls = calls_of(may_call(body.get("tool_choice")), body.get("parallel_tool_calls") is not False)
        shares = likeliest if include or likeliest else None
        self.ask = Ask(model_of(body), messages, sampling, flag(body, "stream"), tools, most_calls, shares)
        self._body = body
        self._identity = f"resp_{secrets.token_hex(12)}"
        self._message = f"msg_{secrets.token_hex(12)}"
        self._number = 0
        self._pieces: list[Piece] = []
        """The pieces that a stream has sent."""

    def whole(self, answer: Answer, pieces: Sequence[Piece]) -> Mapping[str, Any]:
        """See `Form`."""
        status = "incomplete" if answer.end is End.LENGTH else "completed"
        output = [self._said(pieces, status)] if text_of(pieces) or not answer.calls else []
        output += _calls(answer)
        return self._response(answer, status, output)

    def begin(self, answer: Answer) -> Iterator[bytes]:
        """See `Form`."""
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response(answer, "in_progress", []))

    def said(self, answer: Answer, piece: Piece) -> Iterator[bytes]:
        """See `Form`."""
        if not self._pieces:
            yield from self._opened()
        self._pieces.append(piece)
        yield self._event(
            "response.output_text.delta", **self._place(), delta=piece.text, logprobs=_shares(piece.tokens)
        )

    def finish(self, answer: Answer) -> Iterator[bytes]:
        """See `Form`."""
        status = "incomplete" if answer.end is End.LENGTH else "completed"
        output: list[dict[str, Any]] = []
        if not self._pieces and not answer.calls:
            yield from self._opened()
        if self._pieces or not answer.calls:
            text = text_of(self._pieces)
            shares = _shares(tokens_of(self._pieces))
            yield self._event("response.output_text.done", **self._place(), text=text, logprobs=shares)
            item = self._said(self._pieces, status)
            yield self._event("response.content_part.done", **self._place(), part=item["content"][0])
            yield self._event("response.output_item.done", output_index=0, item=item)
            output.append(item)
        for call in _calls(answer):
            index, given = len(output), call["arguments"]
            place = {"output_index": index, "item_id": call["id"]}
            begun = {**call, "arguments": "", "status": "in_progress"}
            yield self._event("response.output_item.added", output_index=index, item=begun)
            yield self._event("response.function_call_arguments.delta", **place, delta=given)
            yield self._event("response.function_call_arguments.done", **place, arguments=given, name=call["name"])
            yield self._event("response.output_item.done", output_index=index, item=call)
            output.append(call)
        yield self._event(f"response.{status}", response=self._response(answer, status, output))

    def _opened(self) -> Iterator[bytes]:
        item = {"id": self._message, "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        yield self._event("response.output_item.added", output_index=0, item=item)
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield self._event("response.content_part.added", **self._place(), part=part)

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **data: Any) -> bytes:
        number = self._number
        self._number += 1
        return event({"type": kind, "sequence_number": number, **data}, kind)

    def _said(self, pieces: Sequence[Piece], status: str) -> dict[str, Any]:
        shares = shares_of(tokens_of(pieces))
        part = {"type": "output_text", "text": text_of(pieces), "annotations": [], "logprobs": shares}
        return {"id": self._message, "type": "message", "role": "assistant", "status": status, "content": [part]}

    def _response(self, answer: Answer, status: str, output: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        body, sampling = self._body, self.ask.sampling
        return {
            "id": self._identity,
            "object": "response",
            "created_at": answer.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": _LENGTH if status == "incomplete" else None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata") or {},
            "model": self.ask.model,
            "output": list(output),
            "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": sampling["temperature"],
            "text": {"format": {"type": "text"}},
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
            "top_logprobs": self.ask.likeliest or 0,
            "top_p": sampling.get("top_p", 1.0),
            "truncation": "disabled",
            "usage": None if status == "in_progress" else _usage(answer),
        }


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {"cached_tokens": answer.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": answer.text_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": answer.prompt_tokens + answer.text_tokens,
    }


def _shares(tokens: Sequence[Drawn]) -> list[dict[str, Any]]:
    """Log-probabilities in the form of stream events, which have no bytes."""
    return [
        {
            "token": token.text,
            "logprob": token.log_probability,
            "top_logprobs": [{"token": each.text, "logprob": each.log_probability} for each in token.likeliest],
        }
        for token in tokens
    ]


def _messages(value: Any) -> list[dict[str, Any]]:
    """Convert the input to messages. A function call becomes a part of the model's message right before it."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    found: list[dict[str, Any]] = []
    for item in mappings(value, "input"):
        kind = item.get("type", "message")
        if kind == "message":
            role, content = item.get("role"), item.get("content")
            if not isinstance(role, str) or not isinstance(content, str | list):
                refuse("invalid_request", "a message must have a role, and content as text or a list of parts")
            found.append({"role": role, "content": content})
        elif kind == "function_call":
            if not found or found[-1]["role"] != "assistant":
                found.append({"role": "assistant", "content": ""})
            found[-1].setdefault("tool_calls", []).append(_call(item))
        elif kind == "function_call_output":
            content = item.get("output")
            if not isinstance(content, str | list):
                refuse("invalid_request", "the output of a function_call_output must be text or a list of parts")
            found.append({"role": "tool", "content": content, "tool_call_id": str(item.get("call_id") or "")})
        else:
            refuse("unsupported_parameter", "input may contain only messages, function_call and function_call_output")
    if not found:
        refuse("invalid_request", "input must be text or a list of at least one item")
    return found


def _call(item: Mapping[str, Any]) -> dict[str, Any]:
    name, given = item.get("name"), item.get("arguments")
    if not isinstance(name, str) or not isinstance(given, str):
        refuse("invalid_request", "a function_call must have a name, and arguments as a JSON text")
    identity = str(item.get("call_id") or "")
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": given}}


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    found = []
    for tool in mappings(value, "tools") if value is not None else ():
        if tool.get("type") != "function" or not isinstance(tool.get("name"), str):
            refuse(
                "unsupported_parameter", "a tool must be {'type': 'function', 'name': ...}: others are not supported"
            )
        refuse_strict(tool)
        function = {key: tool[key] for key in ("name", "description", "parameters") if tool.get(key) is not None}
        found.append({"type": "function", "function": function})
    return tuple(found)


def _calls(answer: Answer) -> list[dict[str, Any]]:
    return [
        {
            "id": call.identity.replace("call_", "fc_"),
            "type": "function_call",
            "call_id": call.identity,
            "name": call.name,
            "arguments": call.arguments,
            "status": "completed",
        }
        for call in answer.calls
    ]
