"""Converts a conversation to the text that the state stores, and back."""

from __future__ import annotations

import json
from typing import Any

from programmable_kv.explain.difference import common_length
from programmable_kv.serve.rewriting.conversation import NO_DATES, Conversation, Note, Texts


def conversation_of(identity: str, key: str, version: int, document: str, notes: tuple[Note, ...]) -> Conversation:
    """Rebuild a conversation from its stored text and its lines."""
    given: dict[str, Any] = json.loads(document)
    return Conversation(
        identity,
        version,
        key,
        given["turns"],
        given["tools"],
        tuple(_texts(each) for each in given["head"]),
        given["token"],
        given["named"],
        given["spoke"],
        given["origin"],
        {int(at): _texts(each) for at, each in given["inside"].items()},
        notes,
        given.get("notebook", ""),
        given.get("values", {}),
        tuple(given.get("order", ())),
        _texts(given["dates"]) if "dates" in given else NO_DATES,
    )


def document_of(conversation: Conversation) -> str:
    """The text to store for a conversation, without its lines, which have rows of their own."""
    return json.dumps(
        {
            "turns": conversation.turns,
            "tools": conversation.tools,
            **({"order": conversation.order} if conversation.order else {}),
            **({"dates": _written(conversation.dates)} if conversation.dates.base else {}),
            "head": [_written(each) for each in conversation.head],
            "token": conversation.token,
            "named": conversation.named,
            "spoke": conversation.spoke,
            "origin": conversation.origin,
            "inside": {str(at): _written(each) for at, each in conversation.inside.items()},
            **(
                {"notebook": conversation.notebook, "values": dict(conversation.values)}
                if conversation.notebook
                else {}
            ),
        }
    )


def _written(texts: Texts) -> list[Any]:
    """A unit's texts, with the client's last ones as differences, so that a clock does not double a system prompt."""
    last = {
        place: text if place not in texts.base else _changed(texts.base[place], text)
        for place, text in texts.last.items()
    }
    same = dict(texts.last) == dict(texts.base)
    return [texts.frame, dict(texts.base), None if same else last]


def _texts(given: list[Any]) -> Texts:
    frame, base, last = given
    if last is None:
        return Texts(frame, base, base)
    whole = {place: text if isinstance(text, str) else _whole(base[place], *text) for place, text in last.items()}
    return Texts(frame, base, whole)


def _changed(before: str, after: str) -> list[Any]:
    """The numbers of equal characters at the beginning and at the end, and the later text between."""
    start = common_length(before, after)
    rest, rest_after = before[start:], after[start:]
    stop = common_length(rest[::-1], rest_after[::-1])
    return [start, stop, rest_after[: len(rest_after) - stop]]


def _whole(before: str, start: int, stop: int, between: str) -> str:
    return before[:start] + between + before[len(before) - stop :]
