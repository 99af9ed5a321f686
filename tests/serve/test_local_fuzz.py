"""The local server answers any JSON with a typed error or a valid answer, and notebooks stay intact."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from programmable_kv.bench.tiny_chat import tiny_chat_model
from programmable_kv.serve.local.server import local_app
from programmable_kv.serve.settings import LocalSettings
from serve.http_peers import running
from serve.test_local import FIELDS, MESSAGES

FUZZED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def http() -> Iterator[httpx2.Client]:
    model = tiny_chat_model(512)
    local = LocalSettings(port=0, max_notebooks=2)
    with running(local, local_app(model, local)) as server, httpx2.Client(base_url=server.url, timeout=30) as found:
        yield found


@pytest.fixture(scope="module")
def book(http: httpx2.Client) -> dict[str, Any]:
    return http.post("/v1/notebooks", json={"messages": MESSAGES, "fields": FIELDS}).json()  # type: ignore[no-any-return]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "user",
        "system",
        "tool",
        "<|im_start|>",
        "<|im_end|>",
        "{status}",
        "{x}",
        "{",
        "pending",
        "\r\n",
        "e\u0301",
        "😀",
        "a\x00b",
    ]
)  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
messages = st.lists(
    values
    | st.fixed_dictionaries(
        {"role": texts, "content": texts | values},
        optional={"tool_calls": values, "tool_call_id": values, "name": values, "other": values},
    ),
    max_size=3,
)
fields = st.dictionaries(
    st.sampled_from(["x", "status", "a b", ""]),
    values
    | st.fixed_dictionaries(
        {"value": values},
        optional={
            "kind": st.sampled_from(["text", "number", "enum", "date", "json", "no"]) | values,
            "among": values, "at_least": values, "charset": values, "max_length": values,
        },
    ),
    max_size=2,
)  # fmt: skip


def typed(got: httpx2.Response, *good: int) -> bool:
    """Whether the server did what the request asks. Otherwise check that the answer is a typed error."""
    assert got.status_code in good or 400 <= got.status_code < 500, got.text
    if got.status_code not in good:
        assert got.json()["error"]["code"], got.text
        assert got.json()["error"]["message"]
    return got.status_code in good


@FUZZED
@given(
    body=values
    | st.fixed_dictionaries(
        {"messages": messages | values},
        optional={"fields": fields | values, "tools": values, "template_kwargs": values},
    )
)
def test_making_notebooks(http: httpx2.Client, body: Any) -> None:
    got = http.post("/v1/notebooks", json=body)
    if typed(got, 201):
        assert http.delete(f"/v1/notebooks/{got.json()['id']}").status_code == 204


@FUZZED
@given(
    body=values | st.dictionaries(st.sampled_from(["status", "amount", "x"]), values, max_size=2),
    mode=st.none() | texts,
)
def test_editing(http: httpx2.Client, book: dict[str, Any], body: Any, mode: str | None) -> None:
    path = f"/v1/notebooks/{book['id']}"
    before = http.get(path).json()
    got = http.patch(f"{path}/fields", json=body, params={} if mode is None else {"mode": mode})
    after = http.get(path).json()
    if typed(got, 200):
        assert {**got.json(), "account": None} == {**after, "account": None}
        assert after["version"] - before["version"] == (after["fields"] != before["fields"])
    else:
        assert after == before


@FUZZED
@given(
    said=messages,
    options=st.dictionaries(
        st.sampled_from(["temperature", "top_p", "stop", "seed", "stream", "n", "stream_options", "max_tokens"]),
        values,
        max_size=2,
    ),
)
def test_chatting(http: httpx2.Client, book: dict[str, Any], said: Any, options: dict[str, Any]) -> None:
    before = http.get(f"/v1/notebooks/{book['id']}").json()
    body = {"model": book["model"], "messages": said, "max_tokens": 2, **options}
    typed(http.post("/v1/chat/completions", json=body), 200)
    assert http.get(f"/v1/notebooks/{book['id']}").json() == before


@FUZZED
@given(
    protocol=st.sampled_from(["/v1/responses", "/v1/messages", "/v1/completions"]),
    said=messages | values,
    options=st.dictionaries(
        st.sampled_from(
            ["instructions", "system", "tools", "tool_choice", "stop_sequences", "include", "top_logprobs", "logprobs",
             "stream", "temperature", "top_k", "top_p", "metadata", "text", "reasoning", "thinking",
             "max_output_tokens", "prompt"]
        ),
        values,
        max_size=3,
    ),
)  # fmt: skip
def test_the_other_protocols(
    http: httpx2.Client, book: dict[str, Any], protocol: str, said: Any, options: dict[str, Any]
) -> None:
    before = http.get(f"/v1/notebooks/{book['id']}").json()
    limit = "max_output_tokens" if protocol == "/v1/responses" else "max_tokens"
    named = "input" if protocol == "/v1/responses" else "messages"
    given_body = {"model": book["model"], named: said, "prompt": said, limit: 2, **options}
    got = http.post(
        protocol, json={key: value for key, value in given_body.items() if key != "prompt" or "com" in protocol}
    )
    if protocol == "/v1/messages" and got.status_code != 200:
        assert (got.json()["type"], 400 <= got.status_code < 500, bool(got.json()["code"])) == ("error", True, True), (
            got.text
        )
    else:
        typed(got, 200)
    assert http.get(f"/v1/notebooks/{book['id']}").json() == before
