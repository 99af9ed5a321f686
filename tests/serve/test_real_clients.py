"""The official clients send and read the same through a gateway as without one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.settings import GatewaySettings
from serve.http_peers import EVENTS_HEAD, LAST, Received, answer, chunk, raw_upstream, running
from serve.rewriting_peers import CLOCK, at

TOKEN = {"token": "Yes", "logprob": -0.25, "bytes": [89, 101, 115], "top_logprobs": []}
CALL = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"order": 7}'}}
USAGE = {
    "prompt_tokens": 40, "completion_tokens": 5, "total_tokens": 45, "prompt_tokens_details": {"cached_tokens": 32},
    "completion_tokens_details": {"reasoning_tokens": 3}, "their_own": 1.5,
}  # fmt: skip
CHAT_ANSWER = {
    "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "system_fingerprint": "fp",
    "their_own": {"a": 1},
    "choices": [
        {
            "index": 0, "finish_reason": "tool_calls", "logprobs": {"content": [TOKEN], "refusal": None},
            "message": {
                "role": "assistant", "content": "Yes", "refusal": None, "tool_calls": [CALL], "reasoning_content": "hm",
            },
        }
    ],
    "usage": USAGE,
}  # fmt: skip
COMPLETION_ANSWER = {
    "id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", "usage": USAGE,
    "choices": [
        {
            "index": 0, "text": " Yes", "finish_reason": "length",
            "logprobs": {"tokens": [" Yes"], "token_logprobs": [-0.25], "top_logprobs": [{" Yes": -0.25}], "text_offset": [3]},
        }
    ],
}  # fmt: skip
RESPONSE_ANSWER = {
    "id": "resp_1", "object": "response", "created_at": 1, "model": "m", "status": "completed", "parallel_tool_calls": True,
    "tool_choice": "auto", "tools": [],
    "output": [
        {"id": "rs_1", "type": "reasoning", "summary": [], "encrypted_content": "gAAAAA=="},
        {"id": "fc_1", "type": "function_call", "call_id": "call_1", "name": "look_up", "arguments": "{}"},
    ],
    "usage": {"input_tokens": 40, "input_tokens_details": {"cached_tokens": 32}, "output_tokens": 5,
              "output_tokens_details": {"reasoning_tokens": 3}, "total_tokens": 45},
}  # fmt: skip
MESSAGE_ANSWER = {
    "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "stop_reason": "tool_use", "stop_sequence": None,
    "content": [
        {"type": "thinking", "thinking": "hm", "signature": "c2lnbmVk"},
        {"type": "redacted_thinking", "data": "b3BhcXVl"},
        {"type": "tool_use", "id": "toolu_1", "name": "look_up", "input": {"order": 7}},
    ],
    "usage": {"input_tokens": 8, "output_tokens": 5, "cache_read_input_tokens": 32, "cache_creation_input_tokens": 0},
}  # fmt: skip
ANSWERS = {
    b"/v1/chat/completions": CHAT_ANSWER,
    b"/v1/completions": COMPLETION_ANSWER,
    b"/v1/responses": RESPONSE_ANSWER,
    b"/v1/messages": MESSAGE_ANSWER,
}


async def script(request: Received) -> AsyncIterator[bytes]:
    found = ANSWERS[request.target.partition(b"?")[0]]
    if not request.json.get("stream"):
        yield answer(json.dumps(found).encode(), more="x-request-id: req_1\r\n")
        return
    yield EVENTS_HEAD
    for event in events(found):
        yield chunk(event)
    yield LAST


def events(found: Any) -> list[bytes]:
    """An answer as events of Chat Completions or Completions, with the usage at the end."""
    [choice] = found["choices"]
    said = (
        {"text": choice["text"]}
        if "text" in choice
        else {"delta": {**choice["message"], "tool_calls": [{**CALL, "index": 0}]}}
    )
    kind = found["object"] + (".chunk" if "delta" in said else "")
    head = {key: value for key, value in found.items() if key not in ("choices", "usage")} | {"object": kind}
    first = {**head, "choices": [{**{key: choice[key] for key in ("index", "finish_reason", "logprobs")}, **said}]}
    parts = [first, {**head, "choices": [], "usage": found["usage"]}]
    return [f"data: {json.dumps(part)}\n\n".encode() for part in parts] + [b"data: [DONE]\n\n"]


TOOLS: Any = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
SAID: Any = [{"role": "user", "content": "May it be cancelled?"}]
SYSTEM: Any = [{"role": "system", "content": at("1")}]
CHAT: Any = {
    "model": "m", "messages": SYSTEM + SAID, "tools": TOOLS, "tool_choice": "auto", "logprobs": True, "top_logprobs": 2,
    "seed": 7, "extra_body": {"chat_template_kwargs": {"enable_thinking": False}, "their_own": [1, {"deep": None}]},
}  # fmt: skip
COMPLETION: Any = {"model": "m", "prompt": at("1"), "logprobs": 1, "max_tokens": 1, "extra_body": {"their_own": True}}
STREAM: Any = {"stream": True, "stream_options": {"include_usage": True}}


def chat(client: openai.OpenAI) -> Any:
    return client.chat.completions.create(**CHAT)


def chat_stream(client: openai.OpenAI) -> Any:
    return list(client.chat.completions.create(**CHAT, **STREAM))


def completion(client: openai.OpenAI) -> Any:
    return client.completions.create(**COMPLETION)


def completion_stream(client: openai.OpenAI) -> Any:
    return list(client.completions.create(**COMPLETION, **STREAM))


def response(client: openai.OpenAI) -> Any:
    given: Any = [
        *SAID,
        {"id": "rs_0", "type": "reasoning", "summary": [], "encrypted_content": "gAAAAB=="},
        {"type": "function_call", "call_id": "call_0", "name": "look_up", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_0", "output": "shipped"},
    ]
    include: Any = ["reasoning.encrypted_content"]
    return client.responses.create(model="m", instructions=at("1"), input=given, store=False, include=include)


def message(client: anthropic.Anthropic) -> Any:
    said: Any = [
        *SAID,
        {"role": "assistant", "content": MESSAGE_ANSWER["content"]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "shipped"}]},
    ]
    tools: Any = [{"name": "look_up", "input_schema": {"type": "object", "properties": {}}}]
    system: Any = [{"type": "text", "text": at("1"), "cache_control": {"type": "ephemeral"}}]
    return client.beta.messages.create(
        model="m", max_tokens=2000, system=system, messages=said, tools=tools, betas=["interleaved-thinking-2025-05-14"],
        thinking={"type": "enabled", "budget_tokens": 1024}, extra_body={"their_own": 1},
    )  # fmt: skip


def asked(ask: Callable[[Any], Any], url: str) -> Any:
    """The answer that a client returns to its user, as data."""
    client: Any = (
        anthropic.Anthropic(base_url=url, api_key="k", max_retries=0)
        if ask is message
        else openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
    )
    found = ask(client)
    return [each.model_dump() for each in (found if isinstance(found, list) else [found])]


@pytest.mark.parametrize("mode", [GatewayMode.OBSERVE, GatewayMode.PASS, GatewayMode.STRICT])
@pytest.mark.parametrize("ask", [chat, chat_stream, completion, completion_stream, response, message])
def test_a_client_sends_and_reads_the_same_with_and_without_a_gateway(
    ask: Callable[[Any], Any], mode: GatewayMode
) -> None:
    """This covers tools, log-probabilities, usage, opaque reasoning, betas, and members that no client knows."""
    with raw_upstream(script) as upstream:
        directly = asked(ask, upstream.url)
        with running(GatewaySettings(upstream.url, port=0, mode=mode, rules=CLOCK)) as gateway:
            assert asked(ask, gateway.url) == directly
        one, other = upstream.received
    assert (one.method, one.target, one.body) == (other.method, other.target, other.body)
    named = [b"authorization", b"x-api-key", b"anthropic-beta", b"anthropic-version", b"content-type", b"user-agent"]
    assert [one.header(name) for name in named] == [other.header(name) for name in named]
    assert "their_own" in json.loads(one.body) or ask is response


@pytest.mark.parametrize("ask", [completion, completion_stream])
@pytest.mark.parametrize("mode", [GatewayMode.ERRATUM, GatewayMode.HOIST])
def test_raw_completions_are_not_rewritten(ask: Callable[[Any], Any], mode: GatewayMode) -> None:
    """A prompt without messages has no place for a line, so it is forwarded unchanged."""
    with raw_upstream(script) as upstream:
        directly = asked(ask, upstream.url)
        with running(GatewaySettings(upstream.url, port=0, mode=mode, rules=CLOCK)) as gateway:
            assert asked(ask, gateway.url) == directly
        one, other = upstream.received
        assert one.body == other.body


def test_mode_strict_sends_every_prompt_as_it_came() -> None:
    """While no calibration covers a case, a request with a changed clock is forwarded, and the answer says why."""
    with raw_upstream(script) as upstream:
        settings = GatewaySettings(upstream.url, port=0, mode=GatewayMode.STRICT, rules=CLOCK)
        with running(settings) as gateway:
            said = list(SAID)
            for minute in "123":
                body = json.dumps(
                    {"model": "m", "messages": [{"role": "system", "content": at(minute)}, *said]}
                ).encode()
                got = httpx2.post(f"{gateway.url}/v1/chat/completions", content=body)
                assert upstream.received[-1].body == body
                assert got.headers["x-pkv-mode"] == "strict"
                assert got.headers["x-pkv-action"] == "forwarded; why=no calibration covers it"
                said += [{"role": "assistant", "content": "Yes"}, {"role": "user", "content": minute}]
