"""The OpenAPI description of the local server. Tests check the server's answers against it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from programmable_kv.serve.openapi import (
    ANTHROPIC_ERROR,
    ANY,
    COUNT,
    HEALTHY,
    LIST,
    MAYBE_TEXT,
    MESSAGE,
    METRICS,
    NOTEBOOK,
    NOTEBOOK_ID,
    OPENAI_ERROR,
    SOURCE,
    TEXT,
    TEXTS,
    Schema,
    content,
    document,
    listed,
    notebook_paths,
    operation,
    parameter,
    record,
)

_TURN: Schema = record({"role": {"enum": ["user", "assistant"]}, "content": TEXTS}, open_ended=True)
_SHARE = {"type": "number", "minimum": 0, "maximum": 1}
_SAMPLING: dict[str, Schema] = {
    "stream": {"type": "boolean"},
    "temperature": {"type": "number", "minimum": 0},
    "top_p": _SHARE,
}
_LIMIT = {"type": "integer", "minimum": 1}
_STOP = {"type": ["string", "array"], "items": TEXT, "minLength": 1}
_SEED = {"type": "integer", "minimum": 0, "maximum": 2**31}


def _asked(needed: Mapping[str, Schema], **optional: Schema) -> Schema:
    return record({"model": TEXT, **needed, **_SAMPLING, **optional}, *_SAMPLING, *optional, open_ended=True)


_CHAT = _asked(
    {"messages": listed(MESSAGE)}, max_tokens=_LIMIT, stop=_STOP, seed=_SEED, logprobs={"type": "boolean"},
    top_logprobs={"type": "integer", "minimum": 0, "maximum": 20}, tools=listed(ANY), tool_choice=TEXT,
)  # fmt: skip
_COMPLETION = _asked({"prompt": {**TEXT, "minLength": 1}}, max_tokens=_LIMIT, stop=_STOP, seed=_SEED, logprobs=COUNT)
_RESPONSE = _asked(
    {"input": {"type": ["string", "array"], "items": MESSAGE}}, instructions=TEXT, max_output_tokens=_LIMIT,
    tools=listed(ANY), tool_choice=TEXT,
)  # fmt: skip
_CLAUDE = _asked(
    {"messages": listed(_TURN), "max_tokens": _LIMIT}, system=TEXTS, stop_sequences=listed(TEXT), top_k=_LIMIT,
    tools=listed(ANY),
)  # fmt: skip

_USAGE = record(
    {"prompt_tokens": COUNT, "completion_tokens": COUNT, "total_tokens": COUNT, "prompt_tokens_details": ANY}
)
_HEAD: dict[str, Schema] = {"id": TEXT, "object": TEXT, "created": COUNT, "model": TEXT}
_FINISH = {"enum": ["stop", "length", "tool_calls"]}
_SAID = record(
    {"role": {"const": "assistant"}, "content": MAYBE_TEXT, "refusal": {"type": "null"}, "tool_calls": {}}, "tool_calls"
)
_CHAT_ANSWER = record(
    {
        **_HEAD,
        "usage": _USAGE,
        "choices": listed(record({"index": COUNT, "message": _SAID, "finish_reason": _FINISH, "logprobs": {}})),
    }
)
_COMPLETION_ANSWER = record(
    {
        **_HEAD,
        "usage": _USAGE,
        "choices": listed(record({"index": COUNT, "text": TEXT, "finish_reason": _FINISH, "logprobs": {}})),
    }
)
_RESPONSE_ANSWER = record(
    {
        "id": TEXT, "object": {"const": "response"}, "status": {"enum": ["completed", "incomplete"]}, "output": listed(ANY),
        "usage": record(
            {"input_tokens": COUNT, "output_tokens": COUNT, "total_tokens": COUNT, "input_tokens_details": ANY,
             "output_tokens_details": ANY}
        ),
    },
    open_ended=True,
)  # fmt: skip
_CLAUDE_ANSWER = record(
    {
        "id": TEXT, "type": {"const": "message"}, "role": {"const": "assistant"}, "model": TEXT, "content": listed(ANY),
        "stop_reason": {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]}, "stop_sequence": MAYBE_TEXT,
        "usage": record(
            {"input_tokens": COUNT, "output_tokens": COUNT, "cache_read_input_tokens": COUNT,
             "cache_creation_input_tokens": COUNT}
        ),
    }
)  # fmt: skip

_MODEL = record({"id": TEXT, "object": {"const": "model"}}, open_ended=True)


def local_document() -> dict[str, Any]:
    """Return the OpenAPI document with all routes of the local server."""
    answers = {
        "/v1/chat/completions": ("Chat Completions", _CHAT, _CHAT_ANSWER, OPENAI_ERROR),
        "/v1/completions": ("Completions", _COMPLETION, _COMPLETION_ANSWER, OPENAI_ERROR),
        "/v1/responses": ("Responses", _RESPONSE, _RESPONSE_ANSWER, OPENAI_ERROR),
        "/v1/messages": ("Messages", _CLAUDE, _CLAUDE_ANSWER, ANTHROPIC_ERROR),
    }
    paths: dict[str, Any] = {
        path: {"post": operation(name, {200: _answer(given)}, body=asked, error=error)}
        for path, (name, asked, given, error) in answers.items()
    }
    paths |= {
        "/v1/models": {"get": operation("the model", {200: content(LIST)})},
        "/v1/models/{name}": {
            "get": operation("the model", {200: content(_MODEL)}, parameters=(parameter("name", "path"),))
        },
        **notebook_paths(SOURCE, NOTEBOOK),
        "/v1/notebooks/{id}/tokens": {
            "get": operation(
                "read a notebook's text and the state of its tokens",
                {200: content(record({"runs": listed(ANY), "states": ANY}))},
                parameters=(NOTEBOOK_ID,),
            )
        },
        "/metrics": {"get": METRICS},
        "/healthz": {"get": HEALTHY},
    }
    return document("programmable-kv local server", paths)


def _answer(schema: Schema) -> dict[str, Any]:
    """The description of an answer, in one piece or as a stream of events."""
    event = record({"data": TEXT, "event": TEXT}, "event")
    return {"content": {"application/json": {"schema": schema}, "text/event-stream": {"schema": event}}}
