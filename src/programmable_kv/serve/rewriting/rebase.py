"""Rebase: a prefix with the new values in their places and no lines, which is computed in the background, then used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from programmable_kv.serve.rewriting.body import Spot, read
from programmable_kv.serve.rewriting.conversation import Conversation
from programmable_kv.serve.rewriting.prompt import CHAT, MESSAGES, RESPONSES

LINES = 64
"""Default number of lines after which a conversation is rebased."""
_SHORTEST: Mapping[str, Mapping[str, str]] = {
    CHAT: {"max_tokens": "1", "stream": "false", "stream_options": "null"},
    MESSAGES: {"max_tokens": "1", "stream": "false"},
    RESPONSES: {"max_output_tokens": "16", "stream": "false", "stream_options": "null", "store": "false"},  # minimum
}
"""Members that make an answer as short as the protocol allows, in JSON."""


class Outcome(StrEnum):
    """The outcome of a rebase, as counted in the metrics."""

    WARMED = "warmed"
    """The upstream computed the new prefix."""
    FAILED = "failed"
    """The upstream did not compute it, and nothing changed."""
    SWITCHED = "switched"
    """The conversation continues the new prefix."""


@dataclass(frozen=True, slots=True)
class Warming:
    """A new prefix to compute in the background."""

    conversation: Conversation
    """The conversation that continues the prefix once it is computed."""
    body: bytes = field(repr=False)
    """The request that makes the upstream compute the prefix."""


def warming(route: str, conversation: Conversation, data: bytes) -> Warming | None:
    """The request that warms a prefix: the body, with the shortest possible answer. None if the model must think first.

    Args:
        data: the body with which the conversation starts over.
    """
    body = read(data)
    if body is None or (body.data.get("thinking") or {"type": "disabled"}) != {"type": "disabled"}:
        return None
    wanted = dict(_SHORTEST[route])
    if route == CHAT and "max_completion_tokens" in body.spots:
        wanted["max_completion_tokens"] = wanted.pop("max_tokens")
    changes = [(body.spots[name], text) for name, text in wanted.items() if name in body.spots]
    start = body.text.index("{") + 1
    [needed] = [name for name in wanted if name.startswith("max_")]
    if needed not in body.spots:
        changes.append((Spot(start, start), f'"{needed}":{wanted[needed]},'))
    return Warming(conversation, body.spliced(changes))
