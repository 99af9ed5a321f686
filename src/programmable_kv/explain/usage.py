"""The upstream's own token counts, from any of the three protocols.

OpenAI's input tokens include the cached ones, Anthropic's do not. In `Usage` they are always included.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from programmable_kv.explain.pieces import Usage


def usage_of(given: Any) -> Usage | None:
    """A `usage` object as `Usage`; None if it has no count of the input."""
    if not isinstance(given, Mapping):
        return None
    if any(key.startswith("cache_") for key in given) and "input_tokens" in given:
        read, written = _count(given, "cache_read_input_tokens"), _count(given, "cache_creation_input_tokens")
        return Usage(_count(given, "input_tokens") + read + written, read, written)
    for total, details in (("prompt_tokens", "prompt_tokens_details"), ("input_tokens", "input_tokens_details")):
        if not isinstance(given.get(total), int):
            continue
        found = given.get(details)
        inside: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
        cached = next((m[key] for m, key in _cached_keys(inside, given) if isinstance(m.get(key), int)), None)
        tokens = _count(given, total)
        written = _count(inside, "cache_write_tokens") or _count(given, "cache_creation_input_tokens")
        return Usage(tokens, min(int(cached or 0), tokens), min(written, tokens), cached is not None)
    return None


def usage_of_stream(text: str) -> Usage | None:
    """The usage in a streamed answer that was logged as text, from the event that counts the most input."""
    found = []
    for line in text.splitlines():
        if not line.startswith("data:") or '"usage"' not in line:
            continue
        try:
            event = json.loads(line.removeprefix("data:"))
        except (ValueError, RecursionError):
            continue
        held = [event, event.get("message"), event.get("response")] if isinstance(event, dict) else []
        found += [usage_of(each.get("usage")) for each in held if isinstance(each, dict)]
    return max((usage for usage in found if usage is not None), key=lambda usage: usage.tokens, default=None)


def _cached_keys(inside: Mapping[str, Any], given: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    beside = ("cache_read_input_tokens", "prompt_cache_hit_tokens", "cached_tokens")  # LiteLLM, DeepSeek, others
    return [(inside, "cached_tokens"), *((given, key) for key in beside)]


def _count(given: Mapping[str, Any], key: str) -> int:
    value = given.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
