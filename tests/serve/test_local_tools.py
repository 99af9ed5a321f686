"""Tools on the local server: the chat template shows them and a model calls them, or the server refuses them."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from programmable_kv import Model
from programmable_kv.bench.tiny_chat import tiny_chat_model
from programmable_kv.errors import TemplateError
from programmable_kv.serve.local.server import local_app
from programmable_kv.serve.local.tools import check_tools, split
from programmable_kv.serve.refusal import RefusedError
from programmable_kv.serve.settings import LocalSettings
from serve.calling_model import CALL, QWEN, SAID, TOOL, taught, templated
from serve.http_peers import Running, running

pytestmark = pytest.mark.xdist_group("tools of the local server")  # the slowest servers to start

pytest_plugins = ["serve.local_clients"]
ASK = [{"role": "user", "content": "What is on A1?"}]
SHELVES = {"role": "system", "content": "Mind the shelves."}
RESULT = "Three boxes."
ANSWER = "There are three boxes."
WITH_RESULT = [
    *ASK,
    {"role": "assistant", "content": SAID.strip(), "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"shelf": "A1"}'}}
    ]},
    {"role": "tool", "tool_call_id": "c1", "content": RESULT},
]  # fmt: skip
FOR_CLAUDE: Any = [{"name": "look", "description": "Look at a shelf.", "input_schema": TOOL["function"]["parameters"]}]
FOR_RESPONSES: Any = [{"type": "function", **TOOL["function"]}]


@pytest.fixture(scope="module")
def model() -> Model:
    return taught([(ASK, SAID + CALL), (WITH_RESULT, ANSWER), ([SHELVES, *ASK], SAID + CALL + CALL)], [TOOL])


def test_chat_calls_a_tool_and_reads_its_result(openai_client: openai.OpenAI, model: Model) -> None:
    ask: Any = {"model": model.name, "tools": [TOOL], "temperature": 0}
    got = openai_client.chat.completions.create(**ask, messages=ASK).choices[0]
    assert got.finish_reason == "tool_calls"
    assert got.message.content == SAID
    [call] = got.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"shelf": "A1"})
    said = [
        *ASK,
        {**got.message.model_dump(exclude_none=True), "content": SAID.strip()},
        {"role": "tool", "tool_call_id": call.id, "content": RESULT},
    ]
    answer = openai_client.chat.completions.create(**ask, messages=said).choices[0]
    assert (answer.message.content, answer.finish_reason) == (ANSWER, "stop")


def test_chat_streams_a_call(openai_client: openai.OpenAI, model: Model) -> None:
    ask: Any = {"model": model.name, "tools": [TOOL], "temperature": 0, "stream": True}
    parts = [part.choices[0] for part in openai_client.chat.completions.create(**ask, messages=ASK)]
    assert "".join(part.delta.content or "" for part in parts) == SAID
    [call] = [call for part in parts for call in part.delta.tool_calls or ()]
    assert (call.index, call.function.name, json.loads(call.function.arguments)) == (0, "look", {"shelf": "A1"})
    assert parts[-1].finish_reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_messages_call_a_tool_and_read_its_result(claude: anthropic.Anthropic, model: Model, stream: bool) -> None:
    ask: Any = {"model": model.name, "tools": FOR_CLAUDE, "extra_body": {"temperature": 0}, "max_tokens": 90}
    if stream:
        with claude.messages.stream(**ask, messages=ASK) as events:
            got = events.get_final_message()
    else:
        got = claude.messages.create(**ask, messages=ASK)
    text, use = got.content
    assert got.stop_reason == "tool_use"
    assert (text.text, use.name, use.input) == (SAID, "look", {"shelf": "A1"})
    result = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": RESULT}]}
    shown = [
        {"type": "text", "text": SAID.strip()},
        {"type": "tool_use", "id": use.id, "name": use.name, "input": use.input},
    ]
    said = [*ASK, {"role": "assistant", "content": shown}, {"role": "user", "content": [result]}]
    answer = claude.messages.create(**ask, messages=said)
    assert ([block.text for block in answer.content], answer.stop_reason) == ([ANSWER], "end_turn")


@pytest.mark.parametrize("stream", [False, True])
def test_responses_call_a_tool_and_read_its_result(openai_client: openai.OpenAI, model: Model, stream: bool) -> None:
    ask: Any = {"model": model.name, "tools": FOR_RESPONSES, "temperature": 0}
    if stream:
        events = list(openai_client.responses.create(**ask, input=ASK, stream=True))
        kinds = [event.type.removeprefix("response.") for event in events]
        assert kinds[-5:] == [
            "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
            "completed",
        ]  # fmt: skip
        got = events[-1].response
    else:
        got = openai_client.responses.create(**ask, input=ASK)
    message, call = got.output
    assert (message.content[0].text, call.name, json.loads(call.arguments)) == (SAID, "look", {"shelf": "A1"})
    said = [
        *ASK,
        {"role": "assistant", "content": SAID.strip()},
        {"type": "function_call", "call_id": call.call_id, "name": "look", "arguments": call.arguments},
        {"type": "function_call_output", "call_id": call.call_id, "output": RESULT},
    ]
    assert openai_client.responses.create(**ask, input=said).output_text == ANSWER


def test_where_no_call_is_allowed_the_model_is_shown_no_tools(openai_client: openai.OpenAI, model: Model) -> None:
    plain = openai_client.chat.completions.create(model=model.name, messages=ASK, temperature=0, max_tokens=4)  # type: ignore[arg-type]
    ask: Any = {"tools": [TOOL], "tool_choice": "none", "temperature": 0, "max_tokens": 4}
    got = openai_client.chat.completions.create(model=model.name, messages=ASK, **ask)  # type: ignore[arg-type]
    assert got.usage == plain.usage


def test_a_notebook_keeps_its_tools(server: Running, openai_client: openai.OpenAI) -> None:
    body = {"messages": ASK, "tools": [TOOL]}
    book = httpx2.post(f"{server.url}/v1/notebooks", json=body, timeout=30).json()
    with_tools = httpx2.post(f"{server.url}/v1/notebooks", json={"messages": ASK}, timeout=30).json()
    assert book["tokens"] > with_tools["tokens"]
    said: Any = [{"role": "assistant", "content": "So."}, {"role": "user", "content": "hi"}]
    openai_client.chat.completions.create(model=book["model"], messages=said, tools=[TOOL], max_tokens=2)  # type: ignore[list-item]
    for model in (book["model"], with_tools["model"]):
        other: Any = [{**TOOL, "function": {**TOOL["function"], "name": "other"}}]
        with pytest.raises(openai.BadRequestError, match="when it is created"):
            openai_client.chat.completions.create(model=model, messages=said, tools=other)


def called(server: Running, path: str, **more: Any) -> tuple[str, list[str], str]:
    """Ask a notebook with a tool. Returns the answer's text, the called tools, and the reason why it ended."""
    body = {"messages": [SHELVES], "tools": [TOOL]}
    book = httpx2.post(f"{server.url}/v1/notebooks", json=body, timeout=30).json()
    asked = {"input": ASK} if path == "/v1/responses" else {"messages": ASK}
    limit = {"max_tokens": 90} if path == "/v1/messages" else {}
    got = httpx2.post(
        f"{server.url}{path}", json={"model": book["model"], "temperature": 0, **asked, **limit, **more}, timeout=30
    )
    assert got.status_code == 200, got.text
    found = got.json()
    if path == "/v1/messages":
        blocks = found["content"]
        said = "".join(each["text"] for each in blocks if each["type"] == "text")
        return said, [each["name"] for each in blocks if each["type"] == "tool_use"], found["stop_reason"]
    if path == "/v1/responses":
        parts = [part for each in found["output"] if each["type"] == "message" for part in each["content"]]
        calls = [each["name"] for each in found["output"] if each["type"] == "function_call"]
        return "".join(part["text"] for part in parts), calls, found["status"]
    message, why = found["choices"][0]["message"], found["choices"][0]["finish_reason"]
    return message["content"], [each["function"]["name"] for each in message.get("tool_calls", ())], why


NO_CALL, ONE_CALL = {"tool_choice": "none"}, {"parallel_tool_calls": False}
CLAUDES_NO_CALL: Any = {"tool_choice": {"type": "none"}}
CLAUDES_ONE_CALL: Any = {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}


@pytest.mark.parametrize(
    ("path", "none", "one", "ends"),
    [
        ("/v1/chat/completions", NO_CALL, ONE_CALL, ("stop", "tool_calls")),
        ("/v1/responses", NO_CALL, ONE_CALL, ("completed", "completed")),
        ("/v1/messages", CLAUDES_NO_CALL, CLAUDES_ONE_CALL, ("end_turn", "tool_use")),
    ],
)
def test_a_notebook_calls_as_many_tools_as_the_request_allows(
    path: str, none: Any, one: Any, ends: tuple[str, str], server: Running
) -> None:
    assert called(server, path) == (SAID, ["look", "look"], ends[1])
    assert called(server, path, **one) == (SAID, ["look"], ends[1])
    text, calls, why = called(server, path, **none)
    assert (calls, why) == ([], ends[0])
    assert text == SAID + CALL + CALL, "its cached text names the tools: what it says is text"


def test_what_cannot_be_kept_is_refused_of_a_notebook_s_tools_too(server: Running) -> None:
    strict = {**TOOL, "function": {**TOOL["function"], "strict": True}}
    got = httpx2.post(f"{server.url}/v1/notebooks", json={"messages": ASK, "tools": [strict]}, timeout=30)
    assert (got.status_code, got.json()["error"]["code"]) == (400, "unsupported_parameter")


def test_tools_that_may_not_be_called_must_be_the_notebook_s_too(server: Running) -> None:
    book = httpx2.post(f"{server.url}/v1/notebooks", json={"messages": ASK, "tools": [TOOL]}, timeout=30).json()
    other = {**TOOL, "function": {**TOOL["function"], "name": "other"}}
    body = {"model": book["model"], "messages": ASK, "tools": [other], "tool_choice": "none"}
    got = httpx2.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)
    assert (got.status_code, got.json()["error"]["code"]) == (400, "tools_differ")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/notebooks"])
def test_a_template_without_tools_refuses_them(path: str) -> None:
    """The embedded model has such a template."""
    tools = {"/v1/messages": FOR_CLAUDE, "/v1/responses": FOR_RESPONSES}.get(path, [TOOL])
    asked = {"input": ASK} if path == "/v1/responses" else {"messages": ASK}
    named = {} if path == "/v1/notebooks" else {"model": "tiny random llama"}
    limit = {"max_tokens": 5} if path == "/v1/messages" else {}
    settings = LocalSettings(port=0)
    with running(settings, local_app(tiny_chat_model(1024), settings)) as server:
        got = httpx2.post(f"{server.url}{path}", json={**asked, **named, **limit, "tools": tools})
        assert got.status_code == 400, got.text
        found = got.json()
        assert (found["code"] if path == "/v1/messages" else found["error"]["code"]) == "tools_not_supported"
        assert "ignores tools" in found["error"]["message"]
        assert httpx2.post(f"{server.url}{path}", json={**asked, **named, **limit}).is_success


@pytest.mark.weights
def test_the_embedded_model_s_template_takes_no_tools() -> None:
    from programmable_kv import load_model

    with pytest.raises(RefusedError, match="ignores tools"):
        check_tools(load_model(), [TOOL])


def test_calls_in_another_form_are_refused() -> None:
    """The template shows the tools, but writes calls in a form that the server does not read."""
    other = QWEN.replace("<tool_call>", "[CALL]").replace("</tool_call>", "[/CALL]")
    with pytest.raises(RefusedError, match="in a form"):
        check_tools(templated(other), [TOOL])
    check_tools(templated(), [TOOL, {**TOOL, "function": {**TOOL["function"], "name": "another"}}])
    with pytest.raises((RefusedError, TemplateError)):
        check_tools(templated("{{ raise_exception('no') }}"), [TOOL])


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ("plain", "plain", []),
        (SAID + CALL, SAID.strip(), [("look", {"shelf": "A1"})]),
        (CALL + CALL, "", [("look", {"shelf": "A1"})] * 2),
        ("<tool_call>{</tool_call>", "<tool_call>{</tool_call>", []),
        ("<tool_call>\n{\"name\": \"look\"", "<tool_call>\n{\"name\": \"look\"", []),
        ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
        ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
        ('<tool_call>{"name": "x", "arguments": 1}</tool_call>', '<tool_call>{"name": "x", "arguments": 1}</tool_call>', []),
        (f"<tool_call>{{</tool_call>{CALL}", "<tool_call>{</tool_call>", [("look", {"shelf": "A1"})]),
    ],
)  # fmt: skip
def test_what_cannot_be_read_stays_text(text: str, said: str, calls: list[Any]) -> None:
    found, read = split(text)
    assert found == said
    assert [(call.name, json.loads(call.arguments)) for call in read] == calls
