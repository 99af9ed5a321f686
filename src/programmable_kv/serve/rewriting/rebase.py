"""Rebase: the new values in their places and no lines, computed in the background and switched to when that is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from programmable_kv.serve.rewriting.body import Spot, read
from programmable_kv.serve.rewriting.conversation import Conversation
from programmable_kv.serve.rewriting.prompt import CHAT, MESSAGES, RESPONSES

LINES = 64
"""after which a conversation is rebased, where nothing else is said"""
_SHORTEST: Mapping[str, Mapping[str, str]] = {
    CHAT: {"max_tokens": "1", "stream": "false", "stream_options": "null"},
    MESSAGES: {"max_tokens": "1", "stream": "false"},
    RESPONSES: {"max_output_tokens": "16", "stream": "false", "stream_options": "null", "store": "false"},  # its least
}
"""what makes an answer as short as the protocol allows"""


class Outcome(StrEnum):
    """What became of a rebase. Counted."""

    WARMED = "warmed"
    """the upstream computed the new prefix"""
    FAILED = "failed"
    """it did not: nothing changed"""
    SWITCHED = "switched"
    """the conversation goes on with the new prefix"""


@dataclass(frozen=True, slots=True)
class Warming:
    """A new prefix that is to be computed."""

    conversation: Conversation
    """what goes on, once it is"""
    body: bytes = field(repr=False)
    """the request that makes the upstream compute it"""


def warming(route: str, conversation: Conversation, data: bytes) -> Warming | None:
    """The request that warms a prefix: the body with an answer of one token. None where the model must think first.

    Args:
        data: the body that begins the conversation anew.
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
