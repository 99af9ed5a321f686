"""Notebooks in front of an upstream, through official clients: what the upstream gets, and the resource's answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from programmable_kv.serve.access import ApiKey, new_key
from programmable_kv.serve.rewriting.forms import LineRole
from programmable_kv.serve.settings import GatewaySettings
from serve.caching_upstream import CachingUpstream
from serve.http_peers import raw_upstream, running
from serve.rewriting_peers import RULES, extends

POLICY = "You are a shop's agent.\nThe order is {status}, for {amount} euros.\n" + RULES
FIELDS = {"status": {"value": "pending", "kind": "enum", "among": ["pending", "shipped", "lost"]}, "amount": 30}
BOOK = {"upstream_model": "m", "messages": [{"role": "system", "content": POLICY}], "fields": FIELDS}
LINE = re.compile(r"\[state ([0-9a-f]{16})\] (.*)\.")
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"


@pytest.fixture
def upstream() -> Iterator[tuple[CachingUpstream, str]]:
    script = CachingUpstream()
    with raw_upstream(script) as server:
        yield script, server.url


@pytest.fixture
def front(upstream: tuple[CachingUpstream, str]) -> Iterator[str]:
    with running(GatewaySettings(upstream[1], port=0, line_role=LineRole.SYSTEM)) as found:
        yield found.url


@pytest.fixture
def http(front: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=front, timeout=30) as found:
        yield found


def made(http: httpx2.Client, **change: Any) -> dict[str, Any]:
    got = http.post("/v1/notebooks", json={**BOOK, **change})
    assert got.status_code == 201, got.text
    assert got.headers["etag"] == '"1"'
    found: dict[str, Any] = got.json()
    return found


def patched(http: httpx2.Client, book: dict[str, Any], **values: Any) -> dict[str, Any]:
    got = http.patch(f"/v1/notebooks/{book['id']}/fields", json=values)
    assert got.status_code == 200, got.text
    found: dict[str, Any] = got.json()
    return found


def talk(front: str, route: str, book: dict[str, Any], turns: list[Any], *, stream: bool = False) -> None:
    """Send one request with the official client of a protocol."""
    if route == MESSAGES:
        claude = anthropic.Anthropic(base_url=front, api_key="k", max_retries=0)
        said = claude.messages.create(model=book["model"], max_tokens=9, messages=turns)
        assert said.content[0].text == "Yes."  # type: ignore[union-attr]
        return
    client = openai.OpenAI(base_url=f"{front}/v1", api_key="k", max_retries=0)
    if route == RESPONSES:
        assert client.responses.create(model=book["model"], input=turns).output_text == "Yes."
    elif stream:
        parts = list(client.chat.completions.create(model=book["model"], messages=turns, stream=True))
        assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == "Yes."
    else:
        answer = client.chat.completions.create(model=book["model"], messages=turns)
        assert answer.choices[0].message.content == "Yes."


def turns(*said: str) -> list[Any]:
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]


def text_of(content: Any) -> str:
    return content if isinstance(content, str) else "\n\n".join(part["text"] for part in content)


def head_of(body: Any) -> str:
    """The system prompt in a body that the upstream got."""
    system = body.get("system") or body.get("instructions")
    return text_of(system if system is not None else body["messages"][0]["content"])


def said(body: Any) -> list[tuple[str, str]]:
    """The conversation in a body that the upstream got, as (role, text)."""
    messages = body.get("input") or body["messages"]
    found = [(each["role"], text_of(each["content"])) for each in messages]
    return found[1:] if found[0][0] == "system" else found


def values_in(line: str) -> dict[str, str]:
    """The values that a line states."""
    found = LINE.fullmatch(line)
    assert found is not None, line
    return dict(json.loads("{" + found[2].replace('"; "', '", "') + "}"))


@pytest.mark.parametrize("route", [CHAT, RESPONSES, MESSAGES])
def test_the_head_stays_and_new_values_are_told_once(
    route: str, http: httpx2.Client, front: str, upstream: tuple[CachingUpstream, str]
) -> None:
    """Every request has the same head. Each edit adds one line after the newest turn, and the line stays there."""
    script, _ = upstream
    book = made(http)
    talk(front, route, book, turns("May it be cancelled?"))
    assert patched(http, book, status="shipped")["version"] == 2
    talk(front, route, book, turns("May it be cancelled?", "Yes.", "And now?"))
    talk(front, route, book, turns("May it be cancelled?", "Yes.", "And now?", "No.", "Sure?"))
    patched(http, book, status="lost", amount=40)
    talk(front, route, book, turns("May it be cancelled?", "Yes.", "And now?", "No.", "Sure?", "Yes.", "Why?"))
    first, second, third, fourth = script.bodies
    assert {body["model"] for body in script.bodies} == {"m"}
    assert head_of(first).startswith(POLICY.format(status="pending", amount=30))
    assert len({head_of(body) for body in script.bodies}) == 1
    assert all(extends(*pair) for pair in ((second, first), (third, second), (fourth, third)))
    assert [role for role, _ in said(first)] == ["user"]
    told = [text for _, text in said(fourth) if "[state" in text]
    lines = [text[text.index("[state") :] for text in told]
    assert [values_in(line) for line in lines] == [{"status": "shipped"}, {"status": "lost", "amount": "40"}]
    assert f"[state {LINE.fullmatch(lines[0])[1]}]" in head_of(first)  # type: ignore[index]
    if route != CHAT:
        return
    total, cached = script.counts[1]
    assert cached > 0.8 * total, "the head and the first turn are read from the cache after an edit"


def test_a_conversation_that_begins_later_has_the_same_head(
    http: httpx2.Client, front: str, upstream: tuple[CachingUpstream, str]
) -> None:
    script, _ = upstream
    book = made(http)
    talk(front, CHAT, book, turns("One?"))
    patched(http, book, status="shipped")
    talk(front, CHAT, book, turns("Another?"), stream=True)
    talk(front, CHAT, book, turns("Another?", "Yes.", "Again?"))
    one, other, again = script.bodies
    assert head_of(one) == head_of(other) == head_of(again)
    assert [role for role, _ in said(other)] == ["user", "system"]
    assert values_in(said(other)[1][1]) == {"status": "shipped"}
    assert extends(again, other)
    fork = http.post(f"/v1/notebooks/{book['id']}/fork").json()
    assert fork["id"] != book["id"]
    assert fork["fields"] == {"status": "shipped", "amount": "30"}
    patched(http, fork, status="lost")
    talk(front, CHAT, fork, turns("Third?"))
    assert head_of(script.bodies[-1]) == head_of(one)
    assert values_in(said(script.bodies[-1])[1][1]) == {"status": "lost"}
    assert http.get(f"/v1/notebooks/{book['id']}").json()["fields"]["status"] == "shipped"


def test_a_line_never_parts_a_call_from_its_result(
    http: httpx2.Client, front: str, upstream: tuple[CachingUpstream, str]
) -> None:
    """While a call has no result, the latest values are sent in their places. After the result there is a line."""
    script, _ = upstream
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
    book = made(http, tools=[tool])
    asked = turns("Where is it?")
    call = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}
    called = [*asked, {"role": "assistant", "content": None, "tool_calls": [call]}]
    answered = [*called, {"role": "tool", "tool_call_id": "c1", "content": "in transit"}]

    def send(messages: list[Any]) -> Any:
        got = http.post(CHAT, json={"model": book["model"], "messages": messages})
        assert got.status_code == 200, got.text
        return script.bodies[-1]

    assert send(asked)["tools"] == [tool]
    patched(http, book, status="shipped")
    behind = send(answered)
    assert [each["role"] for each in behind["messages"]] == ["system", "user", "assistant", "tool", "system"]
    assert values_in(behind["messages"][-1]["content"]) == {"status": "shipped"}
    patched(http, book, status="lost")
    assert "lost" in head_of(send(called))
    differ = http.post(CHAT, json={"model": book["model"], "messages": asked, "tools": [{**tool, "x": 1}]})
    assert (differ.status_code, differ.json()["error"]["code"]) == (400, "tools_differ")
    claude = http.post(MESSAGES, json={"model": book["model"], "max_tokens": 3, "messages": asked})
    assert claude.status_code == 200
    assert script.bodies[-1]["tools"] == [{"name": "look_up", "input_schema": {"type": "object", "properties": {}}}]


def test_turns_of_the_notebooks_own_hold_fields_too(
    http: httpx2.Client, front: str, upstream: tuple[CachingUpstream, str]
) -> None:
    """The notebook's turns are sent unchanged. A system message never states a value that is only in a user's turn."""
    script, _ = upstream
    messages = [
        {"role": "system", "content": RULES},
        {"role": "user", "content": [{"type": "text", "text": "My order is {status}, note: {note}."}]},
        {"role": "assistant", "content": "Noted."},
    ]
    for route in (CHAT, RESPONSES, MESSAGES):
        book = made(http, messages=messages, fields={"status": "pending", "note": "none"})
        talk(front, route, book, turns("One?"))
        patched(http, book, note="fragile")
        talk(front, route, book, turns("One?", "Yes.", "Two?"))
        one, two = script.bodies[-2:]
        assert extends(two, one)
        assert "note: none" in json.dumps(two)
        role, text = said(two)[-1]
        assert role == "user"
        assert values_in(text[text.index("[state") :]) == {"note": "fragile"}


def test_a_notebook_without_a_system_message_announces_its_lines_all_the_same(
    http: httpx2.Client, front: str, upstream: tuple[CachingUpstream, str]
) -> None:
    script, _ = upstream
    own = [{"role": "user", "content": f"{RULES} The order is {{status}}."}, {"role": "assistant", "content": "Yes."}]
    for route in (CHAT, RESPONSES, MESSAGES):
        book = made(http, messages=own, fields={"status": "pending"})
        talk(front, route, book, turns("One?"))
        patched(http, book, status="shipped")
        talk(front, route, book, turns("One?", "Yes.", "Two?"))
        one, two = script.bodies[-2:]
        assert "[state " in head_of(one)
        assert extends(two, one)
        assert "shipped" in said(two)[-1][1]


def test_a_client_s_own_system_prompt_follows_the_notebook_s(
    http: httpx2.Client, front: str, upstream: tuple[CachingUpstream, str]
) -> None:
    script, _ = upstream
    book = made(http)
    base = POLICY.format(status="pending", amount=30)
    own = {"system": "Be brief.", "max_tokens": 3, "messages": turns("One?")}
    assert http.post(MESSAGES, json={"model": book["model"], **own}).status_code == 200
    assert [each["text"] for each in script.bodies[-1]["system"]][:2] == [base, "Be brief."]
    asked = {"model": book["model"], "instructions": "Be brief.", "input": "One?"}
    assert http.post(RESPONSES, json=asked).status_code == 200
    assert script.bodies[-1]["instructions"].startswith(f"{base}\n\nBe brief.")
    assert script.bodies[-1]["input"] == [{"role": "user", "content": "One?"}]
    brief = [{"role": "system", "content": "Be brief."}, *turns("One?")]
    for status in ("pending", "shipped"):
        patched(http, book, status=status)
        assert http.post(CHAT, json={"model": book["model"], "messages": brief}).status_code == 200
    assert [each["content"] for each in script.bodies[-1]["messages"][:1]] == [base]
    assert values_in(script.bodies[-1]["messages"][-1]["content"]) == {"status": "shipped"}
    other = [{"role": "system", "content": "Be long."}, *turns("One?")]
    assert http.post(CHAT, json={"model": book["model"], "messages": other}).status_code == 200
    assert script.bodies[-1]["messages"][0]["content"] == base, "another conversation, and the same notebook"


def test_the_same_values_again_change_nothing_and_versions_are_checked(http: httpx2.Client) -> None:
    book = made(http)
    path = f"/v1/notebooks/{book['id']}/fields"
    assert patched(http, book, status="pending")["version"] == 1
    assert patched(http, book, status="shipped")["account"]["mode_used"] == "erratum"
    again = patched(http, book, status="shipped")
    assert (again["version"], again["account"]["mode_used"]) == (2, "none")
    late = http.patch(path, json={"status": "lost"}, headers={"if-match": '"1"'})
    assert (late.status_code, late.json()["error"]["code"]) == (412, "version_changed")
    assert http.patch(path, json={"status": "lost"}, headers={"if-match": '"2"'}).headers["etag"] == '"3"'
    assert http.delete(f"/v1/notebooks/{book['id']}", headers={"if-match": '"2"'}).status_code == 412
    [listed] = http.get("/v1/notebooks").json()["data"]
    assert listed["fields"] == {"status": "lost", "amount": "30"}
    assert http.delete(f"/v1/notebooks/{book['id']}", headers={"if-match": '"3"'}).status_code == 204
    assert http.get(f"/v1/notebooks/{book['id']}").json()["error"]["code"] == "no_such_notebook"


def test_it_says_what_its_fields_may_hold(http: httpx2.Client) -> None:
    more = {
        "amount": {"value": 30, "at_least": 0, "at_most": 500.5},
        "code": {"value": "A-1", "max_length": 8, "charset": "A-Z0-9-"},
    }
    book = made(http, messages=[{"role": "system", "content": POLICY + "{code}"}], fields={**FIELDS, **more})
    assert book["types"] == {
        "status": {"kind": "enum", "among": ["pending", "shipped", "lost"]},
        "amount": {"kind": "number", "at_least": 0, "at_most": 500.5},
        "code": {"kind": "text", "charset": "A-Z0-9-", "max_length": 8},
    }
    assert http.get(f"/v1/notebooks/{book['id']}").json()["types"] == book["types"]


@pytest.mark.parametrize("bound", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_bound_that_no_json_can_tell_is_refused(http: httpx2.Client, bound: str) -> None:
    fields = json.dumps(FIELDS).replace('"amount": 30', f'"amount": {{"value": 30, "at_most": {bound}}}')
    body = json.dumps({**BOOK, "fields": {}}).replace('"fields": {}', f'"fields": {fields}')
    got = http.post("/v1/notebooks", content=body, headers={"content-type": "application/json"})
    assert (got.status_code, got.json()["error"]["code"]) == (400, "invalid_request")
    assert http.get("/v1/notebooks").json()["data"] == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"upstream_model": None}, "invalid_request"), ({"messages": []}, "invalid_request"), ({"x": 1}, "invalid_request"),
        ({"fields": {"nowhere": "x", **FIELDS}}, "unknown_field"), ({"fields": {"status": "<|im_end|>"}}, "invalid_value"),
        ({"fields": {"status": "[state 0] x"}}, "invalid_value"), ({"fields": {"status": {"kind": "text"}}}, "invalid_request"),
        ({"fields": {"status": {"value": "x", "kind": "enum"}}}, "invalid_argument"), ({"tools": [{}]}, "invalid_request"),
        ({"messages": [{"role": "robot", "content": POLICY}]}, "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "invalid_value"),
    ],
)  # fmt: skip
def test_what_is_no_notebook_is_refused(http: httpx2.Client, change: dict[str, Any], code: str) -> None:
    got = http.post("/v1/notebooks", json={**BOOK, **change})
    assert 400 <= got.status_code < 500
    assert got.json()["error"]["code"] == code, got.text
    assert http.get("/v1/notebooks").json()["data"] == []


def test_errors_have_the_form_of_the_protocol(http: httpx2.Client, front: str) -> None:
    claude = anthropic.Anthropic(base_url=front, api_key="k", max_retries=0)
    with pytest.raises(anthropic.NotFoundError, match="no notebook"):
        claude.messages.create(model="notebook:nb_none", max_tokens=2, messages=turns("hi"))
    client = openai.OpenAI(base_url=f"{front}/v1", api_key="k", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="no notebook"):
        client.chat.completions.create(model="notebook:nb_none", messages=turns("hi"))
    book = made(http)
    for path, body, code in [
        ("/v1/completions", {"prompt": "x"}, "unsupported_parameter"), (CHAT, {"messages": []}, "invalid_request"),
        (CHAT, {"messages": "x"}, "invalid_request"), (CHAT, {"messages": [3]}, "invalid_request"),
        (RESPONSES, {"input": "x", "previous_response_id": "r"}, "invalid_request"),
    ]:  # fmt: skip
        got = http.post(path, json={"model": book["model"], **body})
        assert (got.status_code, got.json()["error"]["code"]) == (400, code)
    assert http.get(f"/v1/notebooks/{book['id']}/tokens").json()["error"]["code"] == "no_such_route"
    wrong = http.patch(f"/v1/notebooks/{book['id']}/fields", json={"nowhere": "x"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "unknown_field")
    assert http.patch(f"/v1/notebooks/{book['id']}/fields?mode=suffix", json={}).status_code == 400


def test_requests_to_the_model_itself_go_through_as_before(
    http: httpx2.Client, upstream: tuple[CachingUpstream, str]
) -> None:
    script, _ = upstream
    body = {"model": "m", "messages": turns("is notebook:x a model?")}
    got = http.post(CHAT, json=body)
    assert script.bodies[-1] == body
    assert "x-pkv-action" not in got.headers


def test_an_upstream_that_refuses_a_role_gets_another_form() -> None:
    """An upstream that refuses all roles gets the latest values in their places. The client never sees an error."""
    strict = CachingUpstream(refuses=lambda body: any(m["role"] == "system" for m in body["messages"][1:]))
    nothing = CachingUpstream(refuses=lambda body: "[state" in json.dumps(body))
    for script, told in ((strict, True), (nothing, False)):
        with (
            raw_upstream(script) as server,
            running(GatewaySettings(server.url, port=0, line_role=LineRole.SYSTEM)) as front,
            httpx2.Client(base_url=front.url, timeout=30) as http,
        ):
            book = made(http)
            talk(front.url, CHAT, book, turns("One?"))
            patched(http, book, status="shipped")
            talk(front.url, CHAT, book, turns("One?", "Yes.", "Two?"))
        last = script.bodies[-1]
        assert script.refused
        assert ("shipped" in head_of(last)) is not told
        assert [role for role, _ in said(last)] == ["user", "assistant", "user", *(["user"] if told else [])]


def test_many_lines_end_in_a_rebase_in_the_background(upstream: tuple[CachingUpstream, str]) -> None:
    script, url = upstream
    settings = GatewaySettings(url, port=0, rebase_after=3, line_role=LineRole.SYSTEM)
    with running(settings) as front, httpx2.Client(base_url=front.url) as http:
        book = made(http)
        said_ = ["0?"]
        for turn in range(1, 8):
            patched(http, book, amount=turn)
            talk(front.url, CHAT, book, turns(*said_))
            said_ += ["Yes.", f"{turn}?"]
    heads = [head_of(body) for body in script.bodies]
    assert len(set(heads)) >= 2, "the prefix was written anew"
    last = script.bodies[-1]
    lines = [values_in(text) for role, text in said(last) if role == "system"]
    told = lines[-1]["amount"] if lines else None
    assert (told or re.search(r"for (\S+) euros", head_of(last))[1]) == "7"  # type: ignore[index]
    assert len(lines) < 6


def test_a_long_value_is_written_into_the_text_of_new_conversations(
    http: httpx2.Client, front: str, upstream: tuple[CachingUpstream, str]
) -> None:
    script, _ = upstream
    messages = [{"role": "system", "content": "Memory:\n{memory}\nBe kind."}]
    book = made(http, messages=messages, fields={"memory": {"value": "", "kind": "block"}})
    edited = patched(http, book, memory="- likes tea\n" * 40)
    assert edited["account"]["mode_used"] == "full"
    assert edited["account"]["why"]
    talk(front, CHAT, book, turns("One?"))
    assert head_of(script.bodies[-1]).startswith("Memory:\n- likes tea")
    assert len(said(script.bodies[-1])) == 1
    got = http.patch(f"/v1/notebooks/{book['id']}/fields?mode=full", json={"memory": "nothing"}).json()
    assert got["account"] == {"mode_asked": "full", "mode_used": "full", "why": "", "line_bytes": 0}


def test_the_notebook_says_what_the_upstream_counted(
    http: httpx2.Client, front: str, upstream: tuple[CachingUpstream, str]
) -> None:
    script, _ = upstream
    book = made(http)
    for said_ in (["One?"], ["One?", "Yes.", "Two?"]):
        talk(front, CHAT, book, turns(*said_))
    for _ in range(200):
        usage = http.get(f"/v1/notebooks/{book['id']}").json()["usage"]
        if usage["requests"] == 2:
            break
    total = sum(each for each, _ in script.counts)
    cached = sum(each for _, each in script.counts)
    assert usage == {"requests": 2, "counted_by_upstream": 2, "input_tokens": total, "cached_tokens": cached}


def test_tenants_do_not_see_each_others_notebooks(upstream: tuple[CachingUpstream, str]) -> None:
    keys = {name: new_key(name) for name in ("one", "two")}
    known = tuple(ApiKey(name, line.partition(":")[2]) for name, (_, line) in keys.items())
    script, url = upstream
    with running(GatewaySettings(url, port=0, keys=known, salts=True)) as front:
        one, two = (
            httpx2.Client(base_url=front.url, headers={"authorization": f"Bearer {keys[name][0]}"}, timeout=30)
            for name in ("one", "two")
        )
        book = made(one)
        assert two.get("/v1/notebooks").json()["data"] == []
        for got in (
            two.get(f"/v1/notebooks/{book['id']}"), two.post(f"/v1/notebooks/{book['id']}/fork"),
            two.patch(f"/v1/notebooks/{book['id']}/fields", json={"status": "lost"}), two.delete(f"/v1/notebooks/{book['id']}"),
            two.post(CHAT, json={"model": book["model"], "messages": turns("hi")}),
        ):  # fmt: skip
            assert (got.status_code, got.json()["error"]["code"]) == (404, "no_such_notebook")
        assert httpx2.get(f"{front.url}/v1/notebooks").status_code == 401
        own = made(two)
        for client, mine in ((one, book), (two, own)):
            assert client.post(CHAT, json={"model": mine["model"], "messages": turns("hi")}).status_code == 200
        salts = {body["cache_salt"] for body in script.bodies}
        assert len(salts) == 2


def test_a_restart_goes_on_and_a_deleted_notebook_leaves_nothing(
    upstream: tuple[CachingUpstream, str], tmp_path: Path
) -> None:
    script, url = upstream
    state = tmp_path / "state"
    settings = GatewaySettings(url, port=0, state=state)
    secret = "zebra-quagga-okapi"
    with running(settings) as front, httpx2.Client(base_url=front.url) as http:
        messages = [{"role": "system", "content": f"{POLICY} {secret}"}]
        book, kept = made(http, messages=messages), made(http)
        talk(front.url, CHAT, book, turns("One?"))
        patched(http, book, status="shipped")
        talk(front.url, CHAT, book, turns("One?", "Yes.", "Two?"))
    with running(settings) as front, httpx2.Client(base_url=front.url) as http:
        assert http.get(f"/v1/notebooks/{book['id']}").json()["version"] == 2
        talk(front.url, CHAT, book, turns("One?", "Yes.", "Two?", "Yes.", "Three?"))
        assert extends(script.bodies[-1], script.bodies[-2])
        held = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        assert secret.encode() in held
        assert http.delete(f"/v1/notebooks/{book['id']}").status_code == 204
        held = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        assert secret.encode() not in held
        assert book["id"].encode() not in held
        assert [each["id"] for each in http.get("/v1/notebooks").json()["data"]] == [kept["id"]]
        got = http.post(CHAT, json={"model": book["model"], "messages": turns("One?")})
        assert got.json()["error"]["code"] == "no_such_notebook"


def test_there_are_at_most_so_many(upstream: tuple[CachingUpstream, str]) -> None:
    with (
        running(GatewaySettings(upstream[1], port=0, max_notebooks=2)) as front,
        httpx2.Client(base_url=front.url) as http,
    ):
        book, _ = made(http), made(http)
        for got in (http.post("/v1/notebooks", json=BOOK), http.post(f"/v1/notebooks/{book['id']}/fork")):
            assert (got.status_code, got.json()["error"]["code"]) == (429, "notebooks_full")
