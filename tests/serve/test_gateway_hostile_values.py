"""Hostile values through a gateway's notebooks: each is refused, or the upstream gets it as data in its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from programmable_kv.serve.rewriting.forms import LineRole
from programmable_kv.serve.settings import GatewaySettings
from serve.caching_upstream import CachingUpstream
from serve.hostile import hostile
from serve.http_peers import raw_upstream, running
from serve.rewriting_peers import RULES

SYSTEM = f"{RULES}The order is {{status}}, its note is {{note}}. Never cancel a shipped order."
OTHERS = {"note": "none"}
pytestmark = pytest.mark.slow


class QuickUpstream(CachingUpstream):
    """An upstream that reports everything as cached, because a real cache would be slow for huge texts."""

    def _read(self, text: str) -> tuple[int, int]:
        return len(text), len(text)


@pytest.fixture(scope="module")
def upstream() -> CachingUpstream:
    return QuickUpstream()


@pytest.fixture(scope="module")
def http(upstream: CachingUpstream) -> Iterator[httpx2.Client]:
    with (
        raw_upstream(upstream) as server,
        running(GatewaySettings(server.url, port=0, line_role=LineRole.SYSTEM)) as front,
        httpx2.Client(base_url=front.url, timeout=60) as found,
    ):
        yield found


def post(http: httpx2.Client, method: str, path: str, body: Any) -> httpx2.Response:
    return http.request(method, path, content=json.dumps(body), headers={"content-type": "application/json"})


def made(http: httpx2.Client, status: Any) -> httpx2.Response:
    body = {"upstream_model": "m", "messages": [{"role": "system", "content": SYSTEM}]}
    return post(http, "POST", "/v1/notebooks", {**body, "fields": {"status": status, **OTHERS}})


def refused(got: httpx2.Response) -> bool:
    if 400 <= got.status_code < 500:
        assert got.json()["error"]["code"]
        return True
    assert got.status_code < 300, got.text[:300]
    return False


def sent(
    http: httpx2.Client, upstream: CachingUpstream, book: dict[str, Any], asked: str = "so?"
) -> list[dict[str, Any]]:
    """Begin a conversation with a notebook. Returns the messages that the upstream gets."""
    body = {"model": book["model"], "messages": [{"role": "user", "content": asked}]}
    got = http.post("/v1/chat/completions", json=body)
    assert got.status_code == 200, got.text[:300]
    found: list[dict[str, Any]] = upstream.bodies[-1]["messages"]
    return found


def test_at_creation_a_value_is_refused_or_stands_in_its_place(http: httpx2.Client, upstream: CachingUpstream) -> None:
    taken = 0
    for value in hostile():
        got = made(http, value)
        if refused(got):
            continue
        taken += 1
        book = got.json()
        head, turn = sent(http, upstream, book)
        text = SYSTEM.format(status=book["fields"]["status"], **OTHERS)
        assert head["content"].startswith(text), repr(value)[:80]
        assert head["content"][len(text) :].startswith("\n\nSome values in this conversation"), repr(value)[:80]
        assert turn == {"role": "user", "content": "so?"}
        assert http.delete(f"/v1/notebooks/{book['id']}").status_code == 204
    assert 60 <= taken < len(hostile()), f"{taken} were taken: the test sees both"


def test_an_edit_is_refused_or_told_as_one_json_string(http: httpx2.Client, upstream: CachingUpstream) -> None:
    book = made(http, "pending").json()
    path = f"/v1/notebooks/{book['id']}"
    first = sent(http, upstream, book)[0]
    for number, value in enumerate(hostile()):
        before = http.get(path).json()
        got = post(http, "PATCH", f"{path}/fields", {"status": value})
        after = http.get(path).json()
        if refused(got):
            assert (after["fields"], after["version"]) == (before["fields"], before["version"]), repr(value)[:80]
            continue
        assert after["fields"]["note"] == OTHERS["note"]
        messages = sent(http, upstream, book, f"{number}?")
        if got.json()["account"]["mode_used"] == "full":
            assert messages[0]["content"].startswith(SYSTEM.format(status=after["fields"]["status"], **OTHERS))
            assert not refused(post(http, "PATCH", f"{path}/fields?mode=full", {"status": "pending"}))
            continue
        told = [message for message in messages if message["role"] == "system"]
        assert told[0] == first
        if after["fields"]["status"] == "pending":
            continue
        line = told[-1]["content"]
        assert "\n" not in line
        assert "<" not in line
        token, _, rest = line.partition("] ")
        assert token.startswith("[state "), line[:80]
        assert json.loads(f"{{{rest[:-1]}}}") == {"status": after["fields"]["status"]}, repr(value)[:80]
    assert http.delete(path).status_code == 204


def test_hostile_names_and_questions_are_typed_errors_or_data(http: httpx2.Client, upstream: CachingUpstream) -> None:
    book = made(http, "pending").json()
    routes = [("/v1/chat/completions", "messages"), ("/v1/responses", "input"), ("/v1/messages", "messages")]
    for number, value in enumerate(each for each in hostile() if isinstance(each, str)):
        body = {"upstream_model": "m", "messages": [{"role": "system", "content": SYSTEM}], "fields": {value: "x"}}
        refused(post(http, "POST", "/v1/notebooks", body))
        assert refused(post(http, "PATCH", f"/v1/notebooks/{book['id']}/fields", {value: "x"})) or value == "status"
        path, member = routes[number % 3]
        asked = {"model": book["model"], member: [{"role": "user", "content": value}], "max_tokens": 1}
        got = post(http, "POST", path, asked)
        if not refused(got):
            messages = upstream.bodies[-1][member]
            said = [each["content"] for each in messages if each["role"] == "user"]
            assert value in said or any(value in part["text"] for part in said[-1] if isinstance(part, dict))
