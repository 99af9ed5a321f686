"""What requests have in common that should reach the same upstream: the name of a session, or how the conversation begins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from programmable_kv.explain.logs import session_name
from programmable_kv.serve.headers import Headers, readable, value_of
from programmable_kv.serve.rewriting.rewriter import Rewriting

_BEGINNING = 1024
"""characters of a prompt that tell conversations apart: the client's first words, not a system prompt that many share"""


def key_of_request(tenant: str, headers: Headers, body: bytes, *, prompt: bool) -> bytes:
    """The key of a request: of its session where the client names one, else of its conversation's beginning, else of who asks.

    The beginning is the first message of a user: a system prompt may hold a clock, and is often the same for all.

    Args:
        prompt: whether its route takes a prompt.
    """
    name = session_name({"headers": readable(headers)}, {})
    if name:
        return _key("session", tenant, name)
    credentials = value_of(headers, b"authorization") or value_of(headers, b"x-api-key") or b""
    whose = f"{tenant}\n{credentials.decode('latin-1')}"
    found = _read(headers, body) if prompt else None
    if found is None:
        return _key("client", whose, "")
    name = session_name({}, found)
    return _key("session", tenant, name) if name else _key("beginning", whose, beginning(found))


def key_of_rewriting(work: Rewriting) -> bytes | None:
    """The same from what a mode that rewrites read: values that may change are no part of it. None where it read nothing."""
    if work.session:
        return _key("session", work.tenant, work.session)
    return _key("conversation", work.tenant, work.beginning) if work.beginning else None


def beginning(body: Mapping[str, Any]) -> str:
    """How a conversation begins: its first message by a user, or its prompt; cut off."""
    for name in ("messages", "input"):
        items = body.get(name)
        if isinstance(items, list):
            first = next((each for each in items if isinstance(each, dict) and each.get("role") == "user"), None)
            return _text(items[:1] if first is None else first.get("content"))
    return _text(body.get("input", body.get("prompt")))


def _text(value: Any) -> str:
    """A text as it is; the first text of a list of parts; anything else as JSON."""
    if isinstance(value, list):
        texts = (part["text"] for part in value if isinstance(part, dict) and isinstance(part.get("text"), str))
        value = next(texts, value)
    return (value if isinstance(value, str) else json.dumps(value))[:_BEGINNING]


def _key(kind: str, whose: str, value: str) -> bytes:
    """Equal values of different kinds, or of different clients, are different keys."""
    return blake2b(repr((kind, whose, value)).encode("utf-8", "backslashreplace"), digest_size=16).digest()


def _read(headers: Headers, body: bytes) -> dict[str, Any] | None:
    if value_of(headers, b"content-encoding") not in (None, b"identity"):
        return None
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
