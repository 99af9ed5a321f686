"""Short requests with much work: a long notebook takes time in proportion to its length, and does not block others."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from programmable_kv.prompt.written import in_json_string, places_in_json
from programmable_kv.serve.notebooks.book import Book, declared, guard, located
from programmable_kv.serve.notebooks.source import source_of
from programmable_kv.serve.settings import GatewaySettings, Limits
from serve.caching_upstream import CachingUpstream
from serve.http_peers import raw_upstream, running

MOST = 2**20
PIECES = ["{a}", "{b}", '"', ":", ",", "{", "}", "[", "]", " ", "\n", "\\", "x", '\\"', '{"a": "', '"}']


@pytest.fixture(scope="module")
def http() -> Iterator[httpx2.Client]:
    with (
        raw_upstream(CachingUpstream()) as server,
        running(GatewaySettings(server.url, port=0, limits=Limits(max_body_bytes=MOST))) as front,
        httpx2.Client(base_url=front.url, timeout=60) as found,
    ):
        yield found


def body_of(text: str, **fields: Any) -> dict[str, Any]:
    return {"upstream_model": "m", "messages": [{"role": "system", "content": text}], "fields": fields}


@given(st.lists(st.sampled_from(PIECES), max_size=16).map("".join))
@settings(max_examples=500, deadline=None)
def test_one_reading_finds_what_a_look_at_each_place_finds(content: str) -> None:
    expected: dict[str, bool | None] = {}
    for name in ("a", "b"):
        placeholder = "{" + name + "}"
        places = [at for at in range(len(content)) if content.startswith(placeholder, at)]
        found = {in_json_string(content[:at], content[at + len(placeholder) :]) for at in places}
        if found:
            expected[name] = None if len(found) > 1 else found.pop()
    assert places_in_json(content, ("a", "b")) == expected


def test_a_string_with_far_ends_is_text() -> None:
    assert places_in_json('{"k": "' + "x" * 1900 + '{a}"}', ["a"]) == {"a": True}
    assert places_in_json('{"k": "' + "x" * 2100 + '{a}"}', ["a"]) == {"a": False}
    assert places_in_json('{"k": "{a}' + "x" * 2100 + '"}', ["a"]) == {"a": False}


def seconds(work: Callable[[], object]) -> float:
    """The thread's CPU time, the minimum of three runs."""
    taken = []
    for _ in range(3):
        begun = time.thread_time()
        work()
        taken.append(time.thread_time() - begun)
    return min(taken)


@pytest.mark.parametrize("text", ["{f}", '{"a": "{f}"}', '"{f}', '\\"{f}'])
def test_twice_as_many_placeholders_take_twice_as_long(text: str) -> None:
    short, long = (seconds(lambda n=n: located(body_of(text * n, f="x"))) for n in (4_000, 32_000))  # type: ignore[misc]
    assert long < 30 * short, "eight times as many"


def test_the_messages_are_searched_once() -> None:
    """The state keeps the places of a notebook's fields, so that requests do not search its messages."""
    source = source_of({"messages": [{"role": "user", "content": '{"a": "{f}"}'}], "fields": {"f": "x"}})
    source["places"] = located(source)
    texts, _ = declared(source)
    kept = json.loads(json.dumps(source))
    kept["messages"] = [{"role": "user", "content": "elsewhere"}]
    assert Book("nb", "t", 1, kept, "token", texts, texts).types["f"].in_json


def test_many_fields_are_guarded_in_time() -> None:
    """The guard checks each value against each name, but prepares each name only once."""
    names = [f"field_{number}" for number in range(1000)]
    texts, types = declared(body_of(" ".join("{" + name + "}" for name in names), **dict.fromkeys(names, "x")))
    assert seconds(lambda: guard(texts, types, texts)) < 2


def test_others_are_answered_while_a_notebook_is_made(http: httpx2.Client) -> None:
    body = body_of("{f}" * (MOST // 4), f="x")
    made = threading.Thread(target=lambda: http.post("/v1/notebooks", json=body))
    begun = time.monotonic()
    made.start()
    longest = 0.0
    with httpx2.Client(base_url=http.base_url, timeout=60) as other:
        while made.is_alive():
            asked = time.monotonic()
            assert other.get("/healthz").status_code == 200
            longest = max(longest, time.monotonic() - asked)
            time.sleep(0.01)
    whole = time.monotonic() - begun
    assert longest < max(0.2, whole / 2), f"one waited for {longest:.2f} s of {whole:.2f}"


def test_a_short_request_makes_no_long_prompt(http: httpx2.Client) -> None:
    """A short request may repeat a placeholder of a long value very often."""
    text, value = "{f}" * 300, "x" * 50_000
    got = http.post("/v1/notebooks", json=body_of(text, f=value))
    assert (got.status_code, got.json()["error"]["code"]) == (413, "notebook_too_large")
    book = http.post("/v1/notebooks", json=body_of(text, f="x")).json()
    path = f"/v1/notebooks/{book['id']}"
    for mode in ("erratum", "full"):
        edited = http.patch(f"{path}/fields", params={"mode": mode}, json={"f": value})
        assert (edited.status_code, edited.json()["error"]["code"]) == (413, "notebook_too_large")
    after = http.get(path).json()
    assert (after["fields"], after["version"]) == ({"f": "x"}, 1)
    assert http.patch(f"{path}/fields", json={"f": "x" * (MOST // 300)}).status_code == 200, (
        "as long as a request may be"
    )
