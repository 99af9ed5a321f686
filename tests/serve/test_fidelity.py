"""The client's request reaches the upstream byte for byte, and the answer returns byte for byte."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
from collections.abc import AsyncIterator, Iterator

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from programmable_kv.serve.headers import downwards, upwards
from programmable_kv.serve.settings import GatewaySettings
from serve.http_peers import EVENTS_HEAD, LAST, RawUpstream, Received, Running, answer, chunk, raw_upstream, running

BYTES = bytes(range(256))


async def script(request: Received) -> AsyncIterator[bytes]:
    path = request.target.partition(b"?")[0]
    if path == b"/v1/error":
        yield answer(
            b'{"error" :  {"message":"no such model"}}', "404 Not Found", more="x-request-id: r1\r\nRetry-After: 7\r\n"
        )
    elif path == b"/v1/empty":
        yield b"HTTP/1.1 204 No Content\r\n\r\n"
    elif path == b"/v1/moved":
        yield b"HTTP/1.1 307 Temporary Redirect\r\nlocation: http://127.0.0.1:1/elsewhere\r\ncontent-length: 0\r\n\r\n"
    elif path == b"/v1/zipped":
        yield answer(gzip.compress(b"zipped"), more="content-encoding: gzip\r\nset-cookie: a=1\r\nset-cookie: b=2\r\n")
    elif path == b"/v1/slow":
        yield EVENTS_HEAD + chunk(b"data: one\n\n")
        await asyncio.sleep(0.4)
        yield chunk(b": comment\r\ndata: two\r\n\r\n") + LAST
    else:
        yield answer(BYTES, kind="application/octet-stream", more="Server: theirs\r\nx-ratelimit-remaining: 9\r\n")


@pytest.fixture(scope="module")
def upstream() -> Iterator[RawUpstream]:
    with raw_upstream(script) as found:
        yield found


@pytest.fixture(scope="module")
def gateway(upstream: RawUpstream) -> Iterator[Running]:
    with running(GatewaySettings(upstream.url, port=0)) as found:
        yield found


@pytest.fixture(scope="module")
def client(gateway: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=gateway.url) as found:
        yield found


names = st.text(max_size=12) | st.sampled_from(["messages", "model", "stream", "cache_salt", "metadata"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """JSON in any client's style (spaces, order, escapes, duplicate keys), and bytes that are not JSON."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.binary(max_size=200))
    space = draw(st.sampled_from(["", " ", "  ", "\n", "\r\n\t"]))
    text = json.dumps(
        draw(values),
        ensure_ascii=draw(st.booleans()),
        separators=(f"{space},{space}", f"{space}:{space}"),
        indent=draw(st.sampled_from([None, 1, "\t"])),
    )
    twice = '{"model":"a","model":"b","messages":[]}'
    escaped = '{"messages":[{"role":"user","content":"\\u0061"}]}'
    written = draw(st.sampled_from([text, text, twice, escaped]))
    return (space + written + space).encode("utf-8", "surrogatepass")


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=bodies(),
    path=st.sampled_from(
        [
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/responses",
            "/v1/messages",
            "/v1/audio/%C3%A9%2Fx",
            "/v1/a//b;c=1",
        ]
    ),
    query=st.sampled_from(["", "?beta=true", "?a=%7B&b=1+2&a=%20", "?x"]),
)
def test_requests_arrive_byte_for_byte(
    body: bytes, path: str, query: str, upstream: RawUpstream, gateway: Running
) -> None:
    fields = [
        ("User-Agent", "tester/1"),
        ("authorization", "Bearer sk-theirs"),
        ("anthropic-beta", "one-2026-01-01,two"),
        ("X-Stainless-Lang", "python"),
        ("x-twice", "1"),
        ("x-twice", "2"),
        ("content-type", "application/json"),
    ]
    head = f"POST {path}{query} HTTP/1.1\r\nhost: localhost\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in fields) + f"content-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        connection.sendall(head.encode() + body)
        received = b""
        while not received.endswith(BYTES):
            received += connection.recv(65536)
    got = upstream.received[-1]
    assert (got.method, got.target, got.body) == ("POST", (path + query).encode(), body)
    expected = [(name.lower().encode(), value.encode()) for name, value in fields]
    assert [(name.lower(), value) for name, value in got.headers] == [
        (b"host", upstream.url.removeprefix("http://").encode()),
        *expected,
        (b"content-length", str(len(body)).encode()),
    ]


def test_answers_come_back_byte_for_byte(client: httpx2.Client) -> None:
    got = client.get("/v1/models")
    assert got.content == BYTES
    assert got.headers["server"] == "theirs"
    assert got.headers["x-ratelimit-remaining"] == "9"
    assert got.headers["x-pkv-mode"] == "observe"
    assert got.headers["x-pkv-did"] == "forwarded"
    assert 0 < float(got.headers["x-pkv-own-ms"]) < 1000


def test_a_get_gets_no_body_and_no_length(client: httpx2.Client, upstream: RawUpstream) -> None:
    client.get("/v1/models")
    got = upstream.received[-1]
    assert got.header(b"content-length") == []
    assert got.header(b"transfer-encoding") == []


def test_errors_come_back_unharmed(client: httpx2.Client) -> None:
    got = client.post("/v1/error", content=b"{}")
    assert got.status_code == 404
    assert got.content == b'{"error" :  {"message":"no such model"}}'
    assert (got.headers["x-request-id"], got.headers["retry-after"]) == ("r1", "7")


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_every_method_is_forwarded(client: httpx2.Client, upstream: RawUpstream, method: str) -> None:
    assert client.request(method, "/v1/files/f1").status_code == 200
    assert upstream.received[-1].method == method


def test_an_answer_without_a_body_has_none(client: httpx2.Client) -> None:
    got = client.delete("/v1/empty")
    assert (got.status_code, got.content) == (204, b"")


def test_redirects_are_the_clients_business(client: httpx2.Client) -> None:
    got = client.get("/v1/moved")
    assert (got.status_code, got.headers["location"]) == (307, "http://127.0.0.1:1/elsewhere")


def test_packed_answers_stay_packed_and_cookies_are_not_joined(client: httpx2.Client) -> None:
    with client.stream("GET", "/v1/zipped") as got:
        raw = b"".join(got.iter_raw())
    assert gzip.decompress(raw) == b"zipped"
    assert got.headers.get_list("set-cookie") == ["a=1", "b=2"]


def test_a_chunked_body_arrives_whole_with_its_length(client: httpx2.Client, upstream: RawUpstream) -> None:
    client.post("/v1/chat/completions", content=iter([b'{"a"', b": 1}"]))
    got = upstream.received[-1]
    assert got.body == b'{"a": 1}'
    assert got.header(b"content-length") == [b"8"]
    assert got.header(b"transfer-encoding") == []


def test_streams_are_passed_on_as_they_arrive(client: httpx2.Client) -> None:
    with client.stream("POST", "/v1/slow", content=b"{}") as got:
        parts = got.iter_raw()
        first = next(parts)
        waited = got.elapsed if got.is_closed else None
        assert first == b"data: one\n\n"
        assert waited is None, "the first event must come before the stream ends"
        assert b"".join(parts) == b": comment\r\ndata: two\r\n\r\n"


def test_headers_of_one_connection_stay_there() -> None:
    sent = (
        (b"Host", b"gateway"), (b"Connection", b"keep-alive, X-Mine"), (b"x-mine", b"1"), (b"TE", b"trailers"),
        (b"Expect", b"100-continue"), (b"X-PKV-Key", b"secret"), (b"Upgrade", b"h2c"), (b"Accept", b"*/*"),
    )  # fmt: skip
    assert upwards(sent, b"upstream:8000", b"") == ((b"host", b"upstream:8000"), (b"Accept", b"*/*"))
    assert downwards(((b"Keep-Alive", b"5"), (b"X-Pkv-Did", b"forged"), (b"Date", b"now"))) == ((b"date", b"now"),)


@pytest.mark.parametrize(
    ("given", "path"), [("", b"/v1/models"), ("/v1", b"/v1/models"), ("/base/v1/", b"/base/v1/models")]
)
def test_an_upstream_address_may_have_a_path(upstream: RawUpstream, given: str, path: bytes) -> None:
    with running(GatewaySettings(upstream.url + given, port=0)) as gateway:
        httpx2.get(f"{gateway.url}/v1/models")
    assert upstream.received[-1].target == path


@pytest.mark.parametrize("path", ["/v1/../admin", "/v1/%2e%2e/admin", "/v1/x/%2E/y"])
def test_paths_do_not_lead_out_of_v1(gateway: Running, upstream: RawUpstream, path: str) -> None:
    before = len(upstream.received)
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        received = b""
        while data := connection.recv(65536):
            received += data
    assert received.startswith(b"HTTP/1.1 400")
    assert b"invalid_path" in received
    assert len(upstream.received) == before
