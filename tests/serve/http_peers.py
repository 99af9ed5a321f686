"""HTTP peers for the gateway's tests: an upstream that records requests and sends scripted bytes, and a gateway."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import uvicorn

from programmable_kv.serve.app import gateway_app
from programmable_kv.serve.run import server_of
from programmable_kv.serve.settings import GatewaySettings, LocalSettings


@dataclass(frozen=True)
class Received:
    """A request as it came over the wire."""

    method: str
    target: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    def header(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key.lower() == name]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Script = Callable[[Received], AsyncIterator[bytes]]
_RENDERS = (b"/tokenize", b"/detokenize", b"/apply-template", b"/render")


@dataclass
class RawUpstream:
    """A server that sends exactly the bytes of its script, and closes the connection after each answer."""

    script: Script
    received: list[Received] = field(default_factory=list)
    rendered: list[Received] = field(default_factory=list)
    """The requests to render a prompt, which a gateway sends on its own."""
    left: threading.Event = field(default_factory=threading.Event)
    """Set when a client closes its connection before the script ends."""
    port: int = 0
    scheme: str = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            writer.close()
            return
        line, *fields = head[:-4].split(b"\r\n")
        method, target, _ = line.split(b" ")
        headers = tuple((k, v.strip()) for k, _, v in (each.partition(b":") for each in fields))
        length = next((int(v) for k, v in headers if k.lower() == b"content-length"), 0)
        request = Received(method.decode(), target, headers, await reader.readexactly(length))
        (self.rendered if target.endswith(_RENDERS) else self.received).append(request)
        work = asyncio.ensure_future(self._answer(request, writer))
        gone = asyncio.ensure_future(reader.read(1))
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done() or work.exception() is not None:  # writing fails if the client has left
            self.left.set()
        work.cancel()
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
        writer.close()

    async def _answer(self, request: Received, writer: asyncio.StreamWriter) -> None:
        async for data in self.script(request):
            writer.write(data)
            await writer.drain()


def answer(body: bytes, status: str = "200 OK", *, kind: str = "application/json", more: str = "") -> bytes:
    """The bytes of a complete answer."""
    return (
        f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n{more}\r\n".encode()
        + body
    )


EVENTS_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
)
LAST = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextmanager
def listening(serve: Serve, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """Run a server of connections in a thread. Yields its port, which the system chooses."""
    loop, started, stop, ports = asyncio.new_event_loop(), threading.Event(), asyncio.Event(), list[int]()

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
        ports.append(server.sockets[0].getsockname()[1])
        started.set()
        await stop.wait()
        server.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)


@contextmanager
def raw_upstream(script: Script, tls: ssl.SSLContext | None = None) -> Iterator[RawUpstream]:
    """Run an upstream on a free port, in a thread."""
    upstream = RawUpstream(script, scheme="http" if tls is None else "https")
    with listening(upstream.serve, tls) as upstream.port:
        yield upstream


@dataclass
class Running:
    """A server that runs in a thread."""

    server: uvicorn.Server
    thread: threading.Thread
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def app(self) -> Any:
        return self.server.config.app


@contextmanager
def running(settings: GatewaySettings | LocalSettings, app: Any = None) -> Iterator[Running]:
    """Run a gateway, or another application, on a free port, in the way `pkv serve` runs it."""
    server = server_of(settings, app if isinstance(settings, LocalSettings) else gateway_app(settings))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield Running(server, thread, server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive(), "the gateway did not stop"


def wait_until(true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait until a condition is true that another thread brings about."""
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def metric(url: str, line: str) -> float:
    """The value of one line of the metrics; 0 if the line does not exist."""
    for each in httpx2.get(f"{url}/metrics").text.splitlines():
        if each.startswith(f"{line} "):
            return float(each.rpartition(" ")[2])
    return 0.0
