"""A notebook's own part of a request, in each protocol and together with anything that the client sends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from programmable_kv.serve.settings import GatewaySettings
from serve.caching_upstream import CachingUpstream
from serve.http_peers import raw_upstream, running
from serve.rewriting_peers import CHAT, MESSAGES, RESPONSES

ROUTES = (CHAT, MESSAGES, RESPONSES)
SYSTEM = {"role": "system", "content": "The order is {status}."}
CALL = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "found"}


@pytest.fixture(scope="module")
def upstream() -> CachingUpstream:
    return CachingUpstream()


@pytest.fixture(scope="module")
def http(upstream: CachingUpstream) -> Iterator[httpx2.Client]:
    with (
        raw_upstream(upstream) as server,
        running(GatewaySettings(server.url, port=0)) as front,
        httpx2.Client(base_url=front.url, timeout=60) as found,
    ):
        yield found


def made(http: httpx2.Client, messages: list[Any], **more: Any) -> Any:
    got = http.post("/v1/notebooks", json={"upstream_model": "m", "messages": messages, **more})
    assert got.status_code == 201, got.text
    return got.json()["model"]


def ask(http: httpx2.Client, route: str, model: str, **more: Any) -> httpx2.Response:
    said = [{"role": "user", "content": "May it be cancelled?"}]
    body = {"model": model, ("input" if route == RESPONSES else "messages"): said, **more}
    return http.post(route, content=json.dumps({"max_tokens": 9, **body} if route == MESSAGES else body))


def error(got: httpx2.Response) -> tuple[int, str]:
    said = got.json()
    return got.status_code, said.get("code") or said["error"]["code"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("content", ["", [{"text": "The order is new."}], [{"type": "text", "text": ""}]])
def test_a_result_may_follow_any_text(route: str, content: Any, http: httpx2.Client, upstream: CachingUpstream) -> None:
    """The text may be empty, and a part of it may leave out its type."""
    model = made(http, [SYSTEM, CALLS, {"role": "user", "content": content}, RESULT], fields={"status": "new"})
    got = ask(http, route, model)
    assert got.status_code == 200, got.text
    sent = json.dumps(upstream.bodies[-1])
    assert "found" in sent
    assert "The order is new." in sent
    if route == MESSAGES:
        blocks = [block for each in upstream.bodies[-1]["messages"][:-1] for block in each["content"]]
        assert next(block["type"] for block in blocks if block.get("text") != "") == "tool_use"
        assert all(block.get("type") for block in blocks)


@pytest.mark.parametrize("fields", [{}, {"status": "new"}])
@pytest.mark.parametrize(
    ("route", "member", "value"),
    [
        *((MESSAGES, "system", value) for value in ({"type": "text", "text": "BE NICE"}, 5, 0, False, {})),
        *((RESPONSES, "instructions", value) for value in (["BE NICE"], [], {"text": "BE NICE"}, 5, False)),
    ],
)
def test_a_system_prompt_of_another_form_is_refused(
    route: str, member: str, value: Any, fields: dict[str, Any], http: httpx2.Client, upstream: CachingUpstream
) -> None:
    """The gateway refuses it instead of leaving it out."""
    messages = [SYSTEM] if fields else [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]
    model, before = made(http, messages, fields=fields), len(upstream.bodies)
    assert error(ask(http, route, model, **{member: value})) == (400, "invalid_request")
    assert len(upstream.bodies) == before


@pytest.mark.parametrize("value", ["", None, [], [{"type": "text", "text": "BE NICE"}], [{"text": "BE NICE"}]])
def test_a_system_prompt_of_messages_follows_as_it_came(
    value: Any, http: httpx2.Client, upstream: CachingUpstream
) -> None:
    assert ask(http, MESSAGES, made(http, [SYSTEM], fields={"status": "new"}), system=value).status_code == 200
    first, *rest = upstream.bodies[-1]["system"]
    assert first["text"] == "The order is new."
    assert [each for each in rest if "BE NICE" in each["text"]] == (value or [])


def test_a_client_may_begin_with_a_system_message_of_its_own(http: httpx2.Client, upstream: CachingUpstream) -> None:
    """The message belongs to the head. A different one begins a different conversation."""
    model = made(http, [SYSTEM], fields={"status": "new"})
    said = [{"role": "system", "content": "Answer in French."}, {"role": "user", "content": "May it be cancelled?"}]
    assert ask(http, CHAT, model, messages=said).status_code == 200
    first = upstream.bodies[-1]["messages"]
    assert [each["role"] for each in first] == ["system", "system", "user"]
    assert first[1]["content"].startswith("Answer in French.")
    path = f"/v1/notebooks/{model.partition(':')[2]}/fields"
    assert http.patch(path, json={"status": "late"}).status_code == 200
    more = [*said, {"role": "assistant", "content": "Non."}, {"role": "user", "content": "Et maintenant?"}]
    assert ask(http, CHAT, model, messages=more).status_code == 200
    second = upstream.bodies[-1]["messages"]
    assert second[:2] == first[:2]
    assert "late" in json.dumps(second[2:])
    more[0] = {"role": "system", "content": "Answer in German."}
    assert ask(http, CHAT, model, messages=more).status_code == 200
    assert "Answer in German." in upstream.bodies[-1]["messages"][1]["content"]


def test_a_tool_keeps_all_that_is_said_about_it(http: httpx2.Client, upstream: CachingUpstream) -> None:
    function = {"name": "look_up", "description": "Looks up.", "parameters": {"type": "object"}, "strict": True}
    marker = {"cache_control": {"type": "ephemeral"}}
    model = made(http, [SYSTEM], fields={"status": "new"}, tools=[{"type": "function", "function": function, **marker}])
    told = {"name": "look_up", "description": "Looks up.", "strict": True, **marker}
    assert ask(http, MESSAGES, model).status_code == 200
    assert upstream.bodies[-1]["tools"] == [{**told, "input_schema": {"type": "object"}}]
    assert ask(http, RESPONSES, model).status_code == 200
    assert upstream.bodies[-1]["tools"] == [{**told, "type": "function", "parameters": {"type": "object"}}]


TEXTS = ["x", "", " ", "{f}", "{f}{f}", "{", "\n", "\x00", "\u2028", "\ud800", "𝒳", "<|im_end|>", "a" * 300]
NUMBERS = [0, 1, -1, 1.5, 10**30, True, None]
NESTED: list[Any] = [[], {}, [[]], [{}], [None], ["x"], {"type": "text"}, {"type": "text", "text": "{f}"}, {"f": {}}]
ODD = st.sampled_from([*TEXTS, *NUMBERS, *NESTED])
ROLE = st.sampled_from(["system", "developer", "user", "assistant", "tool", "", 5, None])
PART = st.one_of(
    st.fixed_dictionaries({"text": ODD}, optional={"type": st.sampled_from(["text", "image", 5, None])}), ODD
)
CONTENT = st.one_of(st.sampled_from(["Status {f}.", "{f}", '{"a": "{f}"}']), st.lists(PART, max_size=3), ODD)
A_CALL = st.one_of(
    st.just(CALL), st.fixed_dictionaries({"id": ODD, "function": st.one_of(ODD, st.just({"name": "n"}))})
)
MESSAGE = st.one_of(
    st.fixed_dictionaries(
        {"role": ROLE, "content": CONTENT},
        optional={"tool_calls": st.one_of(st.lists(A_CALL, max_size=2), ODD), "tool_call_id": ODD, "name": ODD},
    ),
    st.sampled_from([SYSTEM, CALLS, RESULT, {"role": "user", "content": "{f}"}, {"role": "user", "content": ""}]),
    ODD,
)
FIELD = st.one_of(
    ODD,
    st.fixed_dictionaries(
        {"value": ODD},
        optional={
            "kind": st.sampled_from(["text", "block", "number", "date", "enum", "boolean", "json", "", 5]),
            "among": ODD, "at_least": ODD, "at_most": ODD, "charset": ODD, "max_length": ODD,
        },
    ),
)  # fmt: skip
TOOL = st.one_of(
    ODD, st.fixed_dictionaries({"function": st.one_of(ODD, st.fixed_dictionaries({"name": ODD, "parameters": ODD}))})
)
BOOK = st.fixed_dictionaries(
    {"upstream_model": st.sampled_from(["m", "m", "m", "", 5]), "messages": st.lists(MESSAGE, max_size=4)},
    optional={
        "fields": st.dictionaries(st.sampled_from(["f", "f", "f", "", "g h"]), FIELD),
        "tools": st.one_of(st.lists(TOOL, max_size=2), ODD), "template_kwargs": ODD, "skills": ODD, "other": ODD,
    },
)  # fmt: skip
WHOLE = st.fixed_dictionaries(
    {"upstream_model": st.just("m"), "messages": st.lists(MESSAGE, max_size=3).map(lambda some: [*some, SYSTEM])},
    optional={"tools": st.sampled_from([None, [], [{"type": "function", "function": {"name": "look_up"}}]])},
).map(lambda book: {**book, "fields": {"status": "new"}})  # fmt: skip
ASKED = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("messages", "input"), st.one_of(st.lists(MESSAGE, max_size=3), ODD)),
        **dict.fromkeys(("system", "instructions", "tools", "tool_choice", "chat_template_kwargs", "cache_salt"), ODD),
        **dict.fromkeys(("previous_response_id", "metadata", "stream", "max_tokens"), ODD),
    },
)  # fmt: skip


def typed(got: httpx2.Response) -> bool:
    """Whether an answer is an error with a code, due to the client's request or to the upstream's refusal."""
    assert got.status_code < 500 or error(got)[1] == "upstream_error", got.text[:300]
    return got.status_code >= 400 and bool(error(got)[1])


def send(http: httpx2.Client, method: str, path: str, body: Any, **params: Any) -> httpx2.Response:
    return http.request(method, path, content=json.dumps(body), params=params)


@given(
    body=st.one_of(BOOK, WHOLE, ODD),
    edits=st.lists(st.dictionaries(st.sampled_from(["f", "status", ""]), ODD), max_size=2),
    asked=ASKED,
)
@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_a_client_sends_is_taken_or_its_own_mistake(
    body: Any, edits: list[Any], asked: dict[str, Any], http: httpx2.Client
) -> None:
    got = send(http, "POST", "/v1/notebooks", body)
    if typed(got):
        return
    path, model = f"/v1/notebooks/{got.json()['id']}", got.json()["model"]
    try:
        for edit in edits:
            typed(send(http, "PATCH", f"{path}/fields", edit, mode="full" if "" in edit else "erratum"))
        for read in (path, "/v1/notebooks"):
            assert http.get(read).status_code == 200
        for route in ROUTES:
            typed(ask(http, route, model))
            typed(ask(http, route, model, **asked))
            typed(send(http, "POST", route, {**asked, "model": model}))
    finally:
        assert http.delete(path).status_code == 204


@pytest.mark.parametrize("body", [b"", b"[]", b"5", b"nul", b"{}", b'{"a": 1', b'"\\ud800"', b"[" * 10_000, b"\xff"])
def test_bodies_that_are_no_objects(body: bytes, http: httpx2.Client) -> None:
    book = http.post(
        "/v1/notebooks", json={"upstream_model": "m", "messages": [SYSTEM], "fields": {"status": "new"}}
    ).json()
    for method, path in (("POST", "/v1/notebooks"), ("PATCH", f"/v1/notebooks/{book['id']}/fields")):
        got = http.request(method, path, content=body)
        assert typed(got) or (method == "PATCH" and body in (b"", b"{}"))
