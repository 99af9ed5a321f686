"""How the gateway reads from clients and upstreams: valid and invalid HTTP/1.1, and connections that are kept open."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import httpx2
import pytest

from programmable_kv.serve.protocol import MOST_HEAD
from programmable_kv.serve.settings import GatewaySettings, Limits
from serve.http_peers import EVENTS_HEAD, LAST, Received, answer, chunk, listening, raw_upstream, running


class Keeping:
    """An upstream that answers every request with the same bytes, and counts connections and requests."""

    def __init__(self, data: bytes, *, closes_after_s: float | None = None) -> None:
        self.data = data
        self.closes_after_s = closes_after_s
        self.connections = 0
        self.requests = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                _, _, length = head.lower().partition(b"content-length:")
                await reader.readexactly(int(length.partition(b"\r\n")[0] or 0))
                self.requests += 1
                writer.write(self.data)
                if self.closes_after_s is not None:
                    await asyncio.sleep(self.closes_after_s)
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@contextmanager
def keeping(data: bytes, *, closes_after_s: float | None = None) -> Iterator[tuple[Keeping, str]]:
    """Run a `Keeping` upstream in a thread, behind a gateway. Yields the upstream and the gateway's address."""
    upstream = Keeping(data, closes_after_s=closes_after_s)
    with (
        listening(upstream.serve) as port,
        running(GatewaySettings(f"http://127.0.0.1:{port}", port=0)) as gateway,
    ):
        yield upstream, gateway.url


KEPT = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


def test_a_connection_carries_one_request_after_another() -> None:
    with keeping(KEPT) as (upstream, url), httpx2.Client() as client:
        assert [client.post(f"{url}/v1/completions", content=b"{}").text for _ in range(5)] == ["ok"] * 5
    assert (upstream.connections, upstream.requests) == (1, 5)


@pytest.mark.parametrize(
    "data",
    [
        KEPT + b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged",
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
    ],
)
def test_a_connection_that_says_more_or_wants_to_end_is_not_used_again(data: bytes) -> None:
    """The gateway must never take bytes after an answer for the answer to the next request."""
    with keeping(data) as (upstream, url), httpx2.Client() as client:
        assert [client.post(f"{url}/v1/completions", content=b"{}").text for _ in range(3)] == ["ok"] * 3
    assert (upstream.connections, upstream.requests) == (3, 3)


def test_a_connection_that_the_upstream_closed_meanwhile_is_not_used_again() -> None:
    with keeping(KEPT, closes_after_s=0.02) as (upstream, url), httpx2.Client() as client:
        for _ in range(3):
            assert client.post(f"{url}/v1/completions", content=b"{}").text == "ok"
            time.sleep(0.15)
    assert (upstream.connections, upstream.requests) == (3, 3)


def ask(data: bytes, *, method: str = "POST", limits: Limits | None = None) -> httpx2.Response:
    """The client's answer if the upstream sends these bytes and closes the connection."""

    async def script(_: Received) -> AsyncIterator[bytes]:
        yield data

    with (
        raw_upstream(script) as upstream,
        running(GatewaySettings(upstream.url, port=0, limits=limits or Limits())) as gateway,
    ):
        return httpx2.request(method, f"{gateway.url}/v1/completions", content=b"{}" if method == "POST" else None)


def test_a_body_without_a_length_ends_with_its_connection() -> None:
    got = ask(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\nall of it")
    assert (got.status_code, got.text) == (200, "all of it")


def test_interim_answers_are_passed_over() -> None:
    early = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"
    got = ask(early + answer(b"{}", "201 Created", more="x-after: 1\r\n"))
    assert (got.status_code, got.text, got.headers["x-after"]) == (201, "{}", "1")
    assert "link" not in got.headers


@pytest.mark.parametrize(
    ("method", "status", "length"),
    [("HEAD", "200 OK", "7"), ("GET", "304 Not Modified", "7"), ("GET", "204 No Content", "")],
)
def test_answers_that_have_no_body_end_at_once(
    method: str, status: str, length: str, capfd: pytest.CaptureFixture[str]
) -> None:
    more = f"content-length: {length}\r\n" if length else ""
    got = ask(f"HTTP/1.1 {status}\r\netag: a\r\n{more}\r\n".encode(), method=method)
    assert (got.status_code, got.content, got.headers["etag"]) == (int(status[:3]), b"", "a")
    if method == "HEAD":
        assert got.headers["content-length"] == length
    assert "Exception" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "data",
    [
        b"what is this\r\n\r\n",
        b"HTTP/1.1 999 Odd\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nupgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx-long: " + b"a" * 300_000,
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2",
    ],
)
def test_what_is_no_answer_is_a_typed_error(data: bytes) -> None:
    got = ask(data)
    assert (got.status_code, got.json()["error"]["code"]) == (502, "upstream_error")


def test_a_chunk_that_is_none_cuts_the_answer() -> None:
    with pytest.raises(httpx2.RemoteProtocolError):
        ask(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\nzz\r\n")


def test_header_values_are_the_bytes_that_they_were() -> None:
    async def script(_: Received) -> AsyncIterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nx-theirs: caf\xe9\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"

    with raw_upstream(script) as upstream, running(GatewaySettings(upstream.url, port=0)) as gateway:
        with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
            head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx-mine: caf\xe9 \xf0\r\n"
            connection.sendall(head + b"content-length: 0\r\n\r\n")
            received = connection.recv(65536)
        assert b"x-theirs: caf\xe9\r\n" in received
        assert upstream.received[0].header(b"x-mine") == [b"caf\xe9 \xf0"]


def test_an_upstream_that_answers_before_it_read_all_is_heard() -> None:
    """The gateway passes the answer on, and does not reuse the connection, on which half of a request was sent."""
    data = b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno"
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse() -> None:
            for _ in range(2):
                connection, _ = server.accept()
                connection.recv(100)
                connection.sendall(data)
                connections.append(connection)

        connections: list[socket.socket] = []
        thread = threading.Thread(target=refuse, daemon=True)
        thread.start()
        with running(GatewaySettings(f"http://127.0.0.1:{server.getsockname()[1]}", port=0)) as gateway:
            for _ in range(2):
                got = httpx2.post(f"{gateway.url}/v1/completions", content=b"x" * 20_000_000)
                assert (got.status_code, got.text) == (413, "no")
        thread.join(10)
        assert len(connections) == 2
        for connection in connections:
            connection.close()


def test_an_upstream_is_not_read_faster_than_the_client_reads() -> None:
    sent = [0]

    async def floods(_: Received) -> AsyncIterator[bytes]:
        yield EVENTS_HEAD
        for _ in range(640):
            yield chunk(b"x" * 100_000)
            sent[0] += 100_000
        yield LAST

    with (
        raw_upstream(floods) as upstream,
        running(GatewaySettings(upstream.url, port=0)) as gateway,
        httpx2.stream("POST", f"{gateway.url}/v1/completions", content=b"{}", timeout=30) as got,
    ):
        parts = got.iter_raw()
        nbytes = len(next(parts))
        last = -1
        while sent[0] != last:  # until the upstream cannot send any more
            last = sent[0]
            time.sleep(0.3)
        assert last < 40_000_000, "the rest must wait in the upstream, not in the gateway"
        nbytes += sum(len(part) for part in parts)
    assert nbytes == 64_000_000


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("lines", [1, 3000])
def test_headers_of_any_length_are_not_taken(lines: int, ended: bool) -> None:
    with keeping(KEPT) as (upstream, url):
        port = int(url.rpartition(":")[2])
        line = b"x-long: " + b"a" * (2 * MOST_HEAD // lines)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n")
            try:
                for _ in range(lines):
                    connection.sendall(line + (b"\r\n" if ended or lines > 1 else b""))
                connection.sendall(b"a" * 2 * MOST_HEAD if not ended else b"\r\n")
                received = connection.recv(65536)
            except ConnectionError:  # the gateway closed while the client was sending
                received = b"HTTP/1.1 400"
        assert received.startswith(b"HTTP/1.1 400")
        assert httpx2.post(f"{url}/v1/completions", content=b"{}", headers={"x-long": "a" * 60_000}).text == "ok"
    assert upstream.requests == 1


@pytest.mark.parametrize("parts", [1, 2])
def test_a_client_of_an_older_http_gets_no_chunks(parts: int) -> None:
    """It gets the plain bytes and then the end of the connection, even if its HTTP version arrives late."""

    async def script(_: Received) -> AsyncIterator[bytes]:
        yield EVENTS_HEAD + chunk(b"data: one\n\n") + chunk(b"data: [DONE]\n\n") + LAST

    with (
        raw_upstream(script) as upstream,
        running(GatewaySettings(upstream.url, port=0)) as gateway,
        socket.create_connection(("127.0.0.1", gateway.port)) as connection,
    ):
        request = b"POST /v1/completions HTTP/1.0\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}"
        at = len(request) if parts == 1 else 12
        connection.sendall(request[:at])
        time.sleep(0.1)
        connection.sendall(request[at:])
        received = b""
        while data := connection.recv(65536):
            received += data
    assert received.endswith(b"\r\n\r\ndata: one\n\ndata: [DONE]\n\n")
