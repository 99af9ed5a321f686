"""The end of a request: whatever the client's headers say, gateway and upstream must agree (request smuggling)."""

from __future__ import annotations

import socket
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress

import pytest

from programmable_kv.serve.headers import upwards
from programmable_kv.serve.protocol import MOST_HEAD
from programmable_kv.serve.settings import GatewaySettings
from serve.http_peers import RawUpstream, Received, answer, raw_upstream, running

BODY = b"GET /slow/private HTTP/1.1\r\nHost: x\r\n\r\n"


@contextmanager
def gateway() -> Iterator[tuple[RawUpstream, int]]:
    async def script(_: Received) -> AsyncIterator[bytes]:
        yield answer(b"{}")

    with raw_upstream(script) as upstream, running(GatewaySettings(upstream.url, port=0)) as found:
        yield upstream, found.port


def talk(port: int, pieces: Sequence[bytes]) -> bytes:
    """Send pieces of bytes. Returns the answer up to the end of its headers, or more."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            client.sendall(piece)
        found = b""
        while b"\r\n\r\n" not in found:
            data = client.recv(65536)
            if not data:
                break
            found += data
        return found


def post(*headers: bytes, body: bytes = b"{}") -> bytes:
    lines = [b"POST /v1/completions HTTP/1.1", b"Host: localhost", *headers]
    return b"\r\n".join([*lines, b"", b""]) + body


@pytest.mark.parametrize("named", [b"content-length", b"keep-alive, Content-Length"])
def test_a_body_keeps_its_length_whatever_connection_names(named: bytes) -> None:
    with gateway() as (upstream, port):
        talk(port, [post(b"Connection: " + named, b"Content-Length: %d" % len(BODY), body=BODY)])
        assert [each.body for each in upstream.received] == [BODY]
        assert upstream.received[0].header(b"content-length") == [str(len(BODY)).encode()]


@pytest.mark.parametrize("upgrade", [b"h2c", b"websocket"])
@pytest.mark.parametrize("cut", [0, 20, 60, 150, None])
@pytest.mark.parametrize("before", [0, 1])
def test_a_request_that_asks_for_another_protocol_keeps_its_body(upgrade: bytes, cut: int | None, before: int) -> None:
    """Java's HTTP client sends these headers with every request, to ask for HTTP/2."""
    headers = [b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: " + upgrade, b"HTTP2-Settings: AAE"]
    whole = post(*headers, b"Content-Length: %d" % len(BODY), body=BODY)
    at = len(whole) - len(BODY) if cut is None else cut
    with gateway() as (upstream, port), socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(before):
            client.sendall(post(b"Content-Length: 2"))
            read_answer(client)
        client.sendall(whole[:at])
        time.sleep(0.05)
        client.sendall(whole[at:])
        assert read_answer(client).startswith(b"HTTP/1.1 200 ")
        client.sendall(post(b"Content-Length: 2"))
        assert read_answer(client).startswith(b"HTTP/1.1 200 "), "and the connection goes on"
        assert [each.body for each in upstream.received] == [*[b"{}"] * before, BODY, b"{}"]
        assert not any(each.header(b"upgrade") or each.header(b"http2-settings") for each in upstream.received)


def test_one_that_asks_for_another_protocol_behind_a_request_that_is_not_answered_is_not_read() -> None:
    upgrade = post(b"Connection: Upgrade", b"Upgrade: h2c", b"Content-Length: %d" % len(BODY), body=BODY)
    with gateway() as (upstream, port), socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(post(b"Content-Length: 2") + upgrade)
        while client.recv(65536):
            pass
        assert [each.body for each in upstream.received] in ([], [b"{}"])


def read_answer(client: socket.socket) -> bytes:
    """Read one answer, which is chunked or has a known length."""
    found = b""
    while not (found.endswith((b"\r\n0\r\n\r\n", b"{}"))):
        data = client.recv(65536)
        assert data, found
        found += data
    return found


@pytest.mark.parametrize("rewritten", [False, True])
@pytest.mark.parametrize(
    "said",
    [
        [(b"content-length", b"3"), (b"transfer-encoding", b"chunked")],
        [(b"content-length", b"3"), (b"Content-Length", b"10")],
        [(b"connection", b"content-length"), (b"content-length", b"10")],
        [],
    ],
)
def test_there_is_one_length_and_it_is_the_bodys(said: list[tuple[bytes, bytes]], rewritten: bool) -> None:
    found = upwards([(b"a", b"1"), *said, (b"b", b"2")], b"up", b"0123456789", rewritten=rewritten)
    assert [value for name, value in found if name.lower() == b"content-length"] == [b"10"]
    assert [name for name, _ in found if name in (b"a", b"b")] == [b"a", b"b"]
    assert not [name for name, _ in found if name.lower() == b"transfer-encoding"]


def test_a_request_without_a_body_gets_no_length() -> None:
    assert upwards([(b"a", b"1")], b"up", b"") == ((b"host", b"up"), (b"a", b"1"))


def test_what_follows_a_body_is_no_header() -> None:
    chunked = b"2\r\n{}\r\n0\r\nX-Session-Id: forged\r\n\r\n"
    with gateway() as (upstream, port):
        assert talk(port, [post(b"Transfer-Encoding: chunked", body=chunked)]).startswith(b"HTTP/1.1 200")
        assert upstream.received[0].body == b"{}"
        assert upstream.received[0].header(b"x-session-id") == []


def test_long_headers_may_come_in_pieces_and_longer_ones_are_refused() -> None:
    def asked(nbytes: int) -> bytes:
        fields = [b"X-%d: %b" % (at, b"v" * 1000) for at in range(nbytes // 1000)]
        data = post(*fields, b"Content-Length: 2")
        return talk(port, [data[at : at + 1448] for at in range(0, len(data), 1448)])

    with gateway() as (upstream, port):
        assert asked(MOST_HEAD * 3 // 4).startswith(b"HTTP/1.1 200")
        with suppress(ConnectionError):  # the gateway may close while the client sends, and the answer is lost
            assert b" 400 " in asked(3 * MOST_HEAD).partition(b"\r\n")[0]
        assert len(upstream.received) == 1


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_client_of_http_1_0_may_write_its_first_line_in_pieces(cut: int) -> None:
    data = b"\r\nPOST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
    with gateway() as (upstream, port):
        assert b" 200 " in talk(port, [data[:cut], data[cut:]]).partition(b"\r\n")[0]
        assert upstream.received[0].body == b"{}"
