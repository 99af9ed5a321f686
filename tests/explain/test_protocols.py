"""The three protocols give the same pieces, in the order in which a model reads them, each with its path."""

from __future__ import annotations

from typing import Any

import pytest

from programmable_kv.errors import InvalidRequestError
from programmable_kv.explain.pieces import Kind
from programmable_kv.explain.protocols import CHAT, COMPLETIONS, MESSAGES, RESPONSES, pieces_of, protocol_of
from programmable_kv.explain.usage import usage_of

SCHEMA = {"type": "object", "properties": {}}
CHAT_BODY: dict[str, Any] = {
    "model": "m",
    "tools": [{"type": "function", "function": {"name": "read", "parameters": SCHEMA}}],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Read it."}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "I must read.",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "read", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "text of the file"},
    ],
}
MESSAGES_BODY: dict[str, Any] = {
    "model": "m",
    "tools": [{"name": "read", "input_schema": SCHEMA, "cache_control": {"type": "ephemeral"}}],
    "system": "Be brief.",
    "messages": [
        {"role": "user", "content": "Read it."},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "I must read.", "signature": "c2VjcmV0"},
                {"type": "tool_use", "id": "c1", "name": "read", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "text of the file"}]}
            ],
        },
    ],
}
RESPONSES_BODY: dict[str, Any] = {
    "model": "m",
    "tools": [{"type": "function", "name": "read", "parameters": SCHEMA}],
    "instructions": "Be brief.",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "Read it."}]},
        {
            "type": "reasoning",
            "summary": [{"type": "summary_text", "text": "I must read."}],
            "encrypted_content": "c2VjcmV0",
        },
        {"type": "function_call", "call_id": "c1", "name": "read", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "text of the file"},
    ],
}


@pytest.mark.parametrize(
    ("body", "protocol", "opaque"), [(CHAT_BODY, CHAT, 0), (MESSAGES_BODY, MESSAGES, 1), (RESPONSES_BODY, RESPONSES, 1)]
)
def test_three_protocols_say_the_same(body: dict[str, Any], protocol: str, opaque: int) -> None:
    assert protocol_of(body) == protocol
    pieces = pieces_of(body, protocol)
    shown = [piece for piece in pieces if not piece.secret]
    assert len(pieces) - len(shown) == opaque
    assert [piece.kind for piece in shown] == [Kind.TOOL, Kind.SYSTEM, Kind.TEXT, Kind.THINKING, Kind.CALL, Kind.RESULT]
    assert [piece.text for piece in shown[1:]] == [
        "Be brief.", "Read it.", "I must read.", 'read({"a": 1}) [c1]', "text of the file [c1]",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "protocol"), [(CHAT_BODY, CHAT), (MESSAGES_BODY, MESSAGES), (RESPONSES_BODY, RESPONSES)]
)
def test_a_path_leads_back_into_the_request(body: dict[str, Any], protocol: str) -> None:
    for piece in pieces_of(body, protocol):
        value: Any = body
        for step in piece.path.replace("[", ".[").split("."):
            value = value[int(step[1:-1])] if step.startswith("[") else value[step]
        assert value, piece.path


@pytest.mark.parametrize(
    ("body", "route", "protocol"),
    [
        ({"messages": [{"role": "user", "content": "x"}]}, "", CHAT),
        ({"messages": [{"role": "user", "content": "x"}]}, "https://host/v1/messages?beta=true", MESSAGES),
        ({"messages": [], "system": "x"}, "", MESSAGES),
        ({"messages": [], "system": "x"}, "/v1/chat/completions", CHAT),
        ({"input": "x"}, "", RESPONSES),
        ({"prompt": "x"}, "", COMPLETIONS),
        ({"prompt": ["x"]}, "", None),
        ({"text": "x"}, "", None),
    ],
)
def test_the_protocol_is_found(body: dict[str, Any], route: str, protocol: str | None) -> None:
    assert protocol_of(body, route) == protocol


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ({"messages": "x"}, "messages is str; expected a list"),
        ({"messages": ["x"]}, r"messages\[0\] is str; expected an object"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] is dict; expected an object with a role"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\].content is int; expected a list"),
        ({"messages": [], "tools": [1]}, r"tools\[0\] is int"),
        ({"input": [3]}, r"input\[0\] is int"),
    ],
)
def test_what_is_no_request_is_told_with_its_path(body: dict[str, Any], match: str) -> None:
    protocol = protocol_of(body)
    assert protocol is not None
    with pytest.raises(InvalidRequestError, match=match):
        pieces_of(body, protocol)


def test_markers_and_images() -> None:
    with_marker = pieces_of(MESSAGES_BODY, MESSAGES)[0]
    assert with_marker.marked
    assert "cache_control" not in with_marker.text, "a marker is no content"
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 9000}}
    [piece] = pieces_of({"messages": [{"role": "user", "content": [image]}]}, CHAT)
    assert piece.secret
    assert len(piece.text) < 100, "an image is compared by its digest"


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 100, "prompt_tokens_details": {"cached_tokens": 64}}, (100, 64, 0, True)),
        ({"input_tokens": 100, "input_tokens_details": {"cached_tokens": 64}}, (100, 64, 0, True)),
        ({"input_tokens": 6, "cache_read_input_tokens": 64, "cache_creation_input_tokens": 30}, (100, 64, 30, True)),
        ({"input_tokens": 6, "cache_read_input_tokens": None, "cache_creation_input_tokens": 30}, (36, 0, 30, True)),
        (
            {"prompt_tokens": 100, "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 90}},
            (100, 4, 90, True),
        ),
        ({"prompt_tokens": 100, "cache_read_input_tokens": 9, "cache_creation_input_tokens": 5}, (100, 9, 5, True)),
        ({"prompt_tokens": 100, "prompt_cache_hit_tokens": 64}, (100, 64, 0, True)),
        ({"prompt_tokens": 100, "prompt_tokens_details": None}, (100, 0, 0, False)),
        ({"input_tokens": 100, "output_tokens": 3}, (100, 0, 0, False)),
        ({"output_tokens": 3}, None),
        ("none", None),
    ],
)
def test_usage_is_read_as_each_upstream_counts_it(usage: Any, expected: tuple[int, int, int, bool] | None) -> None:
    found = usage_of(usage)
    assert (found and (found.tokens, found.cached, found.written, found.cached_known)) == expected
