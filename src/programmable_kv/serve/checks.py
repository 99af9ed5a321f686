"""Checks of requests that all servers share. What is not understood is refused, never ignored."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from starlette.requests import Request

from programmable_kv.serve.refusal import Refusal, RefusedError


def checked_messages(value: Any) -> list[Mapping[str, Any]]:
    """Check that a value is a list of messages that each have a role. The library checks the rest.

    Raises:
        RefusedError: the value is not such a list.
    """
    if not isinstance(value, list) or not value:
        refuse("invalid_request", "messages must be a list of at least one message")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            refuse("invalid_request", "a message must be an object with a role and content")
        calls = message.get("tool_calls")
        listed = calls is None or (isinstance(calls, list) and all(_is_call(call) for call in calls))
        if not listed:
            refuse("invalid_request", "tool_calls must be a list of objects, each with a function that has a name")
    return value


def check_query(request: Request, known: Collection[str]) -> None:
    """Check the names of a request's query parameters.

    Raises:
        RefusedError: a parameter is not among the known ones.
    """
    for name in request.query_params:
        if name not in known:
            takes = ", ".join(known) or "none"
            refuse("unknown_query_parameter", f"unknown query parameter {name!r:.60}; this route takes {takes}")


def refuse(code: str, message: str) -> NoReturn:
    """
    Raises:
        RefusedError: always.
    """
    raise RefusedError(Refusal(400, code, message))


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)
