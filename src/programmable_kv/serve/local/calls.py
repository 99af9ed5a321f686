"""Chat Completions requests as what a notebook's `generate` takes. What is not supported is refused, never left out."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from programmable_kv.serve.refusal import Refusal, RefusedError

_DEFAULT_TOKENS = 512
_SEEDS = 2**31
_READ = (
    "model", "messages", "stream", "stream_options", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop",
    "seed",
)  # fmt: skip
_WITHOUT_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""what says nothing about the answer"""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "logprobs": (False,), "frequency_penalty": (0,), "presence_penalty": (0,), "store": (False,), "tools": ([],),
    "logit_bias": ({},), "response_format": ({"type": "text"},), "parallel_tool_calls": (True, False),
    "modalities": (["text"],), "service_tier": ("auto", "default"),
}  # fmt: skip
"""parameters that are taken only where they ask for nothing"""


@dataclass(frozen=True, slots=True)
class ChatCall:
    """One request for an answer."""

    model: str
    messages: Sequence[Mapping[str, Any]] = field(repr=False)
    sampling: Mapping[str, Any]
    """keyword arguments of `Notebook.generate`"""
    stream: bool = False
    include_usage: bool = False


def chat_call(body: Mapping[str, Any]) -> ChatCall:
    """Read a request.

    Raises:
        RefusedError: a part of it is missing, of the wrong type, or asks for what is not supported here.
    """
    for name, value in body.items():
        known = name in _READ or name in _WITHOUT_EFFECT or value is None or value in _NEUTRAL.get(name, ())
        if not known:
            raise _refused(
                "unsupported_parameter", f"{name!r:.60} is not supported by this server with that value: leave it out"
            )
    messages = checked_messages(body.get("messages"))
    model = body.get("model")
    if not isinstance(model, str):
        raise _refused("invalid_request", "model is the name of the model, or notebook:ID")
    stop = body.get("stop")
    options = body.get("stream_options") or {}
    if not isinstance(options, Mapping):
        raise _refused("invalid_request", "stream_options is an object")
    sampling: dict[str, Any] = {
        "temperature": _number(body, "temperature", 1.0),
        "max_new_tokens": _count(body, "max_completion_tokens", _count(body, "max_tokens", _DEFAULT_TOKENS)),
        "seed": _count(body, "seed", secrets.randbelow(_SEEDS)),
        "stop": [stop] if isinstance(stop, str) else stop or [],
    }
    if body.get("top_p") is not None:
        sampling["top_p"] = _number(body, "top_p", 1.0)
    return ChatCall(model, messages, sampling, _flag(body, "stream"), _flag(options, "include_usage"))


def checked_messages(value: Any) -> list[Mapping[str, Any]]:
    """A list of messages, of which each has a role. The rest is the library's to check.

    Raises:
        RefusedError: it is none.
    """
    if not isinstance(value, list) or not value:
        raise _refused("invalid_request", "messages is a list of at least one message")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise _refused("invalid_request", "a message is an object with a role and content")
        calls = message.get("tool_calls")
        listed = calls is None or (isinstance(calls, list) and all(_is_call(call) for call in calls))
        if not listed:
            raise _refused("invalid_request", "tool_calls is a list of objects with a function, which has a name")
    return value


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _number(body: Mapping[str, Any], name: str, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refused("invalid_request", f"{name} is a number")
    return float(value)


def _count(body: Mapping[str, Any], name: str, default: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise _refused("invalid_request", f"{name} is a whole number")
    return value


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False):
        raise _refused("invalid_request", f"{name} is true or false")
    return bool(value)


def _refused(code: str, message: str) -> RefusedError:
    return RefusedError(Refusal(400, code, message))
