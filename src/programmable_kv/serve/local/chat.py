"""Chat Completions: `/v1/chat/completions`."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from programmable_kv.serve.checks import checked_messages, refuse
from programmable_kv.serve.local.answers import Answer, End, Piece
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
    stops_of,
)
from programmable_kv.serve.local.forms import event, shares_of, text_of, tokens_of

_READ = (
    "model", "messages", "stream", "stream_options", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop",
    "seed", "tools", "tool_choice", "logprobs", "top_logprobs",
)  # fmt: skip
_WITHOUT_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "store": (False,), "logit_bias": ({},),
    "response_format": ({"type": "text"},), "parallel_tool_calls": (True, False), "modalities": (["text"],),
    "service_tier": ("auto", "default"),
}  # fmt: skip
FINISH = {End.MODEL: "stop", End.STOP: "stop", End.LENGTH: "length", End.CALLS: "tool_calls"}
_MOST_LIKELIEST = 20


class ChatForm:
    """One request to Chat Completions and its answer."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        """
        Raises:
            RefusedError: a part of the body is missing, has the wrong type or is not supported.
            InvalidArgumentError: the token limit is below 1, or the stop strings are invalid.
        """
        check_known(body, _READ, _NEUTRAL, _WITHOUT_EFFECT)
        messages = checked_messages(body.get("messages"))
        options = body.get("stream_options") or {}
        if not isinstance(options, Mapping):
            refuse("invalid_request", "stream_options must be an object")
        limit = limit_of(body, "max_completion_tokens", "max_tokens", default=DEFAULT_TOKENS)
        likeliest = at_most(count(body, "top_logprobs", 0), "top_logprobs", _MOST_LIKELIEST)
        tells = flag(body, "logprobs")
        if likeliest and not tells:
            refuse("invalid_request", "top_logprobs requires logprobs")
        self.ask = Ask(
            model_of(body),
            messages,
            sampling_of(body, limit, stops_of(body, "stop")),
            flag(body, "stream"),
            _tools(body.get("tools")),
            calls_of(may_call(body.get("tool_choice")), body.get("parallel_tool_calls") is not False),
            likeliest if tells else None,
        )
        self._usage = flag(options, "include_usage")
        self._identity = f"chatcmpl-{secrets.token_hex(12)}"

    def whole(self, answer: Answer, pieces: Sequence[Piece]) -> Mapping[str, Any]:
        """See `Form`."""
        calls = _calls(answer)
        text = text_of(pieces)
        message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = calls
        shares = None if self.ask.likeliest is None else {"content": shares_of(tokens_of(pieces)), "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": FINISH[answer.end], "logprobs": shares}
        return {**self._head("chat.completion", answer), "choices": [choice], "usage": usage_of(answer)}

    def begin(self, answer: Answer) -> Iterator[bytes]:
        """See `Form`."""
        yield self._chunk(answer, {"role": "assistant", "content": ""})

    def said(self, answer: Answer, piece: Piece) -> Iterator[bytes]:
        """See `Form`."""
        shares = None if self.ask.likeliest is None else {"content": shares_of(piece.tokens), "refusal": None}
        yield self._chunk(answer, {"content": piece.text}, shares=shares)

    def finish(self, answer: Answer) -> Iterator[bytes]:
        """See `Form`."""
        if answer.calls:
            calls = [{"index": number, **call} for number, call in enumerate(_calls(answer))]
            yield self._chunk(answer, {"tool_calls": calls})
        yield self._chunk(answer, {}, FINISH[answer.end])
        if self._usage:
            yield event({**self._head("chat.completion.chunk", answer), "choices": [], "usage": usage_of(answer)})
        yield b"data: [DONE]\n\n"

    def _chunk(
        self,
        answer: Answer,
        delta: Mapping[str, Any],
        finish: str | None = None,
        shares: Mapping[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": shares}
        return event({**self._head("chat.completion.chunk", answer), "choices": [choice]})

    def _head(self, kind: str, answer: Answer) -> dict[str, Any]:
        return {"id": self._identity, "object": kind, "created": answer.created, "model": self.ask.model}


def usage_of(answer: Answer) -> dict[str, Any]:
    """The `usage` member: tokens of the prompt, those of them that a notebook had cached, and tokens of the answer."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.text_tokens,
        "total_tokens": answer.prompt_tokens + answer.text_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }


def may_call(choice: Any) -> bool:
    """Whether the model may call a tool.

    Raises:
        RefusedError: the request demands a call, which this server cannot enforce.
    """
    if choice not in (None, "auto", "none"):
        refuse("unsupported_parameter", "tool_choice must be 'auto' or 'none': this server cannot enforce a call")
    return bool(choice != "none")


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    found = tuple(mappings(value, "tools")) if value is not None else ()
    for tool in found:
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
            refuse(
                "unsupported_parameter",
                "a tool must be {'type': 'function', 'function': {...}}: others are not supported",
            )
        refuse_strict(function)
    return found


def refuse_strict(function: Mapping[str, Any]) -> None:
    """
    Raises:
        RefusedError: the function is `strict`. This server cannot make arguments follow a schema.
    """
    if function.get("strict"):
        refuse("unsupported_parameter", "'strict' is not supported: this server cannot make a call follow its schema")


def _calls(answer: Answer) -> list[dict[str, Any]]:
    return [
        {"id": call.identity, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in answer.calls
    ]
