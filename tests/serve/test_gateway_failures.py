"""The gateway when the upstream or the client fails, and under too much load. A test breaks each guard on purpose."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from hashlib import sha256

import anthropic
import httpx2
import openai
import pytest

from programmable_kv.errors import InvalidArgumentError
from programmable_kv.serve.access import ApiKey
from programmable_kv.serve.admission import Admission
from programmable_kv.serve.refusal import RefusedError
from programmable_kv.serve.settings import GatewaySettings, Limits
from programmable_kv.serve.unreachable import not_connected
from serve.http_peers import EVENTS_HEAD, LAST, Received, answer, chunk, metric, raw_upstream, running, wait_until

DELTA = b'data: {"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"he"}}]}\n\n'
MESSAGE = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","type":"message","role":"assistant",'
    b'"model":"x","content":[],"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":3,"output_tokens":1}}}\n\n'
)
SECRET = "the-users-secret"
CHAT = {"model": "m", "messages": [{"role": "user", "content": SECRET}], "stream": True}


async def dies_between_events(request: Received) -> AsyncIterator[bytes]:
    yield EVENTS_HEAD + chunk(MESSAGE if request.target.startswith(b"/v1/messages") else DELTA)


async def dies_within_an_event(_: Received) -> AsyncIterator[bytes]:
    yield EVENTS_HEAD + chunk(DELTA[:30])


async def dies_within_a_body(_: Received) -> AsyncIterator[bytes]:
    yield answer(b'{"id": 1}')[:-4]


async def dies_within_events_of_a_known_length(_: Received) -> AsyncIterator[bytes]:
    yield answer(DELTA + DELTA, kind="text/event-stream")[: -len(DELTA)]


async def dies_before_the_answer(_: Received) -> AsyncIterator[bytes]:
    return
    yield b""


async def is_silent(_: Received) -> AsyncIterator[bytes]:
    await asyncio.sleep(60)
    yield b""


async def is_silent_within(_: Received) -> AsyncIterator[bytes]:
    yield EVENTS_HEAD + chunk(DELTA)
    await asyncio.sleep(60)


async def streams_for_long(_: Received) -> AsyncIterator[bytes]:
    yield EVENTS_HEAD
    for _ in range(600):
        yield chunk(DELTA)
        await asyncio.sleep(0.1)


async def answers(_: Received) -> AsyncIterator[bytes]:
    yield answer(b"{}")


def test_the_death_of_an_upstream_ends_a_chat_stream_with_an_error_that_openai_raises() -> None:
    with raw_upstream(dies_between_events) as upstream, running(GatewaySettings(upstream.url, port=0)) as gateway:
        client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="k", max_retries=0)
        stream = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}], stream=True)
        parts = iter(stream)
        assert next(parts).choices[0].delta.content == "he"
        with pytest.raises(openai.APIError, match="middle of its answer"):
            next(parts)
        line = 'pkv_upstream_failures_total{code="upstream_died",route="/v1/chat/completions"}'
        wait_until(lambda: metric(gateway.url, line) == 1)


def test_the_death_of_an_upstream_ends_a_messages_stream_with_an_error_that_anthropic_raises() -> None:
    with raw_upstream(dies_between_events) as upstream, running(GatewaySettings(upstream.url, port=0)) as gateway:
        client = anthropic.Anthropic(base_url=gateway.url, api_key="k", max_retries=0)
        stream = client.messages.create(
            model="m", max_tokens=9, messages=[{"role": "user", "content": "hi"}], stream=True
        )
        parts = iter(stream)
        assert next(parts).type == "message_start"
        with pytest.raises(anthropic.APIStatusError, match="middle of its answer"):
            next(parts)


def test_the_death_of_an_upstream_ends_a_responses_stream_with_an_error_event() -> None:
    with raw_upstream(dies_between_events) as upstream, running(GatewaySettings(upstream.url, port=0)) as gateway:
        got = httpx2.post(f"{gateway.url}/v1/responses", json={"input": "hi", "stream": True})
    last = got.text.split("\n\n")[-2]
    assert last.startswith('event: error\ndata: {"type": "error", "code": "upstream_died"')


@pytest.mark.parametrize("script", [dies_within_an_event, dies_within_a_body, dies_within_events_of_a_known_length])
def test_an_answer_that_cannot_be_ended_is_cut_visibly(script: object) -> None:
    with raw_upstream(script) as upstream, running(GatewaySettings(upstream.url, port=0)) as gateway:  # type: ignore[arg-type]
        with pytest.raises(httpx2.RemoteProtocolError):
            httpx2.post(f"{gateway.url}/v1/chat/completions", json=CHAT)
        line = 'pkv_upstream_failures_total{code="upstream_died",route="/v1/chat/completions"}'
        wait_until(lambda: metric(gateway.url, line) == 1)


@pytest.mark.parametrize(
    ("script", "status", "code"),
    [(dies_before_the_answer, 502, "upstream_error"), (is_silent, 504, "upstream_timeout")],
)
def test_no_answer_is_a_typed_error(script: object, status: int, code: str) -> None:
    limits = Limits(read_s=0.3)
    with raw_upstream(script) as upstream, running(GatewaySettings(upstream.url, port=0, limits=limits)) as gateway:  # type: ignore[arg-type]
        got = httpx2.post(f"{gateway.url}/v1/chat/completions", json=CHAT)
        assert (got.status_code, got.json()["error"]["code"]) == (status, code)
        assert got.headers["x-pkv-did"] == f"refused; code={code}"
        got = httpx2.post(f"{gateway.url}/v1/messages", json=CHAT)
        assert (got.json()["type"], got.json()["code"]) == ("error", code)


def test_an_upstream_that_falls_silent_within_a_stream_is_told_apart() -> None:
    limits = Limits(read_s=0.3)
    with raw_upstream(is_silent_within) as upstream:
        with running(GatewaySettings(upstream.url, port=0, limits=limits)) as gateway:
            got = httpx2.post(f"{gateway.url}/v1/chat/completions", json=CHAT)
        assert '"code": "upstream_timeout"' in got.text
        assert upstream.left.wait(5), "the upstream must see that nobody listens"


def test_an_upstream_that_is_not_there_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with running(GatewaySettings(f"http://127.0.0.1:{port}", port=0)) as gateway:
        client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="k", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="the connection was refused"):
            client.models.list()
        assert metric(gateway.url, 'pkv_upstream_failures_total{code="upstream_unreachable",route="/v1/models"}') == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ConnectionRefusedError(111, "Connect call failed ('10.0.0.1', 80)"),
            "the connection was refused. Is it running?",
        ),
        (TimeoutError(), "it did not answer in time"),
        (socket.gaierror(-2, "Name or service not known"), "the host name in its address is unknown"),
        (OSError(errno.EHOSTUNREACH, "Connect call failed ('10.0.0.1', 80)"), "No route to host. Is it running?"),
        (
            OSError("Multiple exceptions: [Errno 111] ('10.0.0.1', 80), [Errno 101] ('::1', 80)"),
            "none of its addresses accepts a connection. Is it",
        ),
    ],
)
def test_it_is_said_why_there_is_no_connection_and_no_address(error: OSError, said: str) -> None:
    refusal = not_connected(error)
    assert (refusal.status, refusal.code) == (502, "upstream_unreachable")
    assert refusal.message.startswith(f"cannot connect to the upstream: {said}")
    assert "10.0.0.1" not in refusal.message


@pytest.mark.parametrize("script", [streams_for_long, is_silent])
def test_a_client_that_leaves_ends_the_upstreams_request(script: object) -> None:
    with raw_upstream(script) as upstream, running(GatewaySettings(upstream.url, port=0)) as gateway:  # type: ignore[arg-type]
        with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}")
            wait_until(lambda: len(upstream.received) == 1)
        assert upstream.left.wait(5)
        wait_until(lambda: metric(gateway.url, 'pkv_client_gone_total{route="/v1/chat/completions"}') == 1)
        assert metric(gateway.url, "pkv_running") == 0


def test_a_client_that_takes_nothing_gives_its_place_back() -> None:
    async def floods(_: Received) -> AsyncIterator[bytes]:
        yield EVENTS_HEAD
        while True:
            yield chunk(DELTA * 1000)

    limits = Limits(stall_s=0.3)
    with raw_upstream(floods) as upstream, running(GatewaySettings(upstream.url, port=0, limits=limits)) as gateway:
        with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}")
            wait_until(lambda: metric(gateway.url, 'pkv_client_gone_total{route="/v1/chat/completions"}') == 1)
            assert upstream.left.wait(5)
        assert metric(gateway.url, "pkv_running") == 0


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_refused(chunked: bool) -> None:
    limits = Limits(max_body_bytes=1000)
    with raw_upstream(answers) as upstream, running(GatewaySettings(upstream.url, port=0, limits=limits)) as gateway:
        body = iter([b"x" * 600, b"x" * 600]) if chunked else b"x" * 1001
        got = httpx2.post(f"{gateway.url}/v1/messages", content=body)
        assert (got.status_code, got.json()["error"]["type"]) == (413, "request_too_large")
        assert upstream.received == []
        assert httpx2.post(f"{gateway.url}/v1/messages", content=b"x" * 1000).status_code == 200


def test_a_body_that_does_not_come_is_refused() -> None:
    limits = Limits(body_s=0.2)
    with raw_upstream(answers) as upstream, running(GatewaySettings(upstream.url, port=0, limits=limits)) as gateway:
        with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{")
            assert connection.recv(65536).startswith(b"HTTP/1.1 408")
        assert metric(gateway.url, "pkv_running") == 0


def test_too_many_requests_are_refused_and_the_others_are_served() -> None:
    go = threading.Event()

    async def waits(_: Received) -> AsyncIterator[bytes]:
        while not go.is_set():
            await asyncio.sleep(0.01)
        yield answer(b"{}")

    limits = Limits(max_running=2, max_waiting=1)
    with raw_upstream(waits) as upstream, running(GatewaySettings(upstream.url, port=0, limits=limits)) as gateway:

        def ask() -> httpx2.Response:
            return httpx2.post(f"{gateway.url}/v1/chat/completions", json=CHAT)

        with ThreadPoolExecutor(4) as pool:
            admitted = [pool.submit(ask) for _ in range(3)]
            wait_until(lambda: metric(gateway.url, "pkv_waiting") == 1 and len(upstream.received) == 2)
            refused = ask()
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.json()["error"]["code"] == "gateway_full"
            assert len(upstream.received) == 2, "the one that waits must not be with the upstream"
            go.set()
            assert [each.result().status_code for each in admitted] == [200, 200, 200]
        assert metric(gateway.url, "pkv_running") == 0


def test_one_who_sends_bodies_slowly_takes_no_place_from_others() -> None:
    keys = tuple(ApiKey(name, sha256(name.encode()).hexdigest()) for name in ("slow", "quick"))
    settings = GatewaySettings("http://127.0.0.1:1", port=0, keys=keys, limits=Limits(max_running=2, max_waiting=1))
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer slow\r\ncontent-length: 9\r\n\r\n"
    )
    with raw_upstream(answers) as upstream, running(replace(settings, upstream=upstream.url)) as gateway:

        def ask(key: str) -> httpx2.Response:
            return httpx2.post(f"{gateway.url}/v1/messages", json=CHAT, headers={"x-api-key": key})

        with ExitStack() as slow:
            for _ in range(3):
                slow.enter_context(socket.create_connection(("127.0.0.1", gateway.port))).sendall(head)
            wait_until(lambda: ask("slow").status_code == 429)
            assert ask("quick").status_code == 200
        wait_until(lambda: ask("slow").status_code == 200)


def test_waiting_ends_with_a_typed_error() -> None:
    limits = Limits(max_running=1, wait_s=0.2)
    with (
        raw_upstream(streams_for_long) as upstream,
        running(GatewaySettings(upstream.url, port=0, limits=limits)) as gateway,
    ):
        with httpx2.stream("POST", f"{gateway.url}/v1/chat/completions", json=CHAT):
            got = httpx2.post(f"{gateway.url}/v1/messages", json=CHAT)
        assert (got.status_code, got.json()["error"]["type"]) == (503, "overloaded_error")


def test_a_place_is_never_lost() -> None:
    """Waiting requests may get a place, be cancelled before or after that, or time out: no place is lost or added."""

    async def scenario() -> None:
        admission = Admission(max_running=1, max_waiting=5, wait_s=0.05)
        await admission.enter()
        with pytest.raises(RefusedError):
            await admission.enter()
        waits = [asyncio.ensure_future(admission.enter()) for _ in range(3)]
        await asyncio.sleep(0)
        waits[0].cancel()
        await asyncio.sleep(0)
        admission.leave()  # gives the place to the second one
        waits[1].cancel()  # before the second one could run
        await asyncio.gather(*waits, return_exceptions=True)
        assert waits[2].exception() is None
        assert (admission.running, admission.waiting) == (1, 0)
        admission.leave()
        assert admission.running == 0

    asyncio.run(scenario())


def test_a_gateway_that_stops_lets_answers_end() -> None:
    go = threading.Event()

    async def waits(_: Received) -> AsyncIterator[bytes]:
        yield EVENTS_HEAD + chunk(DELTA)
        while not go.is_set():
            await asyncio.sleep(0.01)
        yield chunk(b"data: [DONE]\n\n") + LAST

    with (
        raw_upstream(waits) as upstream,
        running(GatewaySettings(upstream.url, port=0)) as gateway,
        httpx2.stream("POST", f"{gateway.url}/v1/chat/completions", json=CHAT) as got,
    ):
        parts = got.iter_raw()
        next(parts)
        gateway.server.should_exit = True
        wait_until(lambda: refuses_connections(gateway.port))
        go.set()
        assert b"".join(parts) == b"data: [DONE]\n\n"


def test_a_gateway_that_stops_does_not_wait_for_ever() -> None:
    limits = Limits(shutdown_s=1.0)
    with (
        raw_upstream(streams_for_long) as upstream,
        running(GatewaySettings(upstream.url, port=0, limits=limits)) as gateway,
    ):
        with httpx2.stream("POST", f"{gateway.url}/v1/chat/completions", json=CHAT) as got:
            parts = got.iter_raw()  # keep a reference: a garbage-collected stream is closed
            next(parts)
            gateway.server.should_exit = True
            gateway.thread.join(8)
            assert not gateway.thread.is_alive()
        assert upstream.left.wait(5)


def refuses_connections(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return True
    return False


def test_logs_hold_no_prompt(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.DEBUG)
    for script in (dies_between_events, dies_within_a_body, dies_before_the_answer, answers):
        with raw_upstream(script) as upstream, running(GatewaySettings(upstream.url, port=0)) as gateway:
            for path in (f"/v1/chat/completions?key={SECRET}", f"/v1/{SECRET}/x", f"/v1/{SECRET}/%2e%2e/x"):
                with suppress(httpx2.RemoteProtocolError):
                    httpx2.post(f"{gateway.url}{path}", json=CHAT, headers={"x-mine": SECRET})
    logged = [record for record in caplog.records if record.name.startswith("programmable_kv")]
    assert len(logged) > 10
    assert not any(SECRET in record.getMessage() + str(record.exc_text) for record in logged)
    printed = capfd.readouterr()
    assert "without completing response" in printed.err, "what uvicorn logs must be looked at, too"
    assert SECRET not in printed.out + printed.err


@pytest.mark.parametrize(
    "change",
    [
        {"upstream": "localhost:8000"}, {"upstream": "ftp://a"}, {"upstream": "http://u:p@a"}, {"upstream": "http://a?b"},
        {"upstream": "http://é"}, {"host": "0.0.0.0"}, {"host": "::"}, {"host": "example.org"}, {"port": 70000},
        {"more_upstreams": ("ftp://a",)}, {"more_upstreams": ("http://127.0.0.1:8000/v1/",)},
        {"more_upstreams": ("http://b", "HTTP://B/")},
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError):
        replace(GatewaySettings("http://127.0.0.1:8000"), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"max_running": 0}, {"max_body_bytes": 0}, {"max_waiting": -1}, {"read_s": 0.0}])
def test_limits_that_cannot_be_meant_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(InvalidArgumentError):
        replace(Limits(), **change)  # type: ignore[arg-type]
