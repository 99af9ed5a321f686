"""Several upstreams: a conversation stays at one, and requests skip an upstream that refuses connections."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import Any

import httpx2
import pytest

from programmable_kv.serve import fleet as fleets
from programmable_kv.serve.address import Address
from programmable_kv.serve.fleet import Fleet
from programmable_kv.serve.metrics import Metrics
from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.refusal import UPSTREAM_BROKEN, UPSTREAM_UNREACHABLE, Refusal, RefusedError
from programmable_kv.serve.settings import GatewaySettings
from programmable_kv.serve.upstream import UpstreamAnswer, UpstreamRequest
from serve.caching_upstream import CachingUpstream
from serve.http_peers import Received, Running, answer, metric, raw_upstream, running, wait_until
from serve.processes import free_port, process
from serve.rewriting_peers import CLOCK, at, extends

KEYS = [bytes([number // 256, number % 256]) for number in range(1000)]


class Fake:
    """An upstream without a socket."""

    def __init__(self) -> None:
        self.fails: Refusal | None = None
        self.asked = 0

    async def send(self, request: UpstreamRequest) -> UpstreamAnswer:
        self.asked += 1
        if self.fails is not None:
            raise RefusedError(self.fails)
        answer: Any = object()
        return answer

    async def close(self) -> None: ...


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(fleets, "time", found)
    return found


def fleet_of(*clients: Fake, first: int = 1) -> Fleet:
    members = [(Address(f"http://10.0.0.{number}:8000"), client) for number, client in enumerate(clients, start=first)]
    return Fleet(members, Metrics())


def number(fleet: Fleet, key: bytes) -> int:
    return asyncio.run(fleet.send(key, lambda _: UpstreamRequest("GET", b"/", (), b""))).member.number


def places(fleet: Fleet) -> list[int]:
    return [number(fleet, key) for key in KEYS]


def test_a_key_keeps_to_one_upstream_and_keys_are_spread(clock: Clock) -> None:
    fleet = fleet_of(Fake(), Fake(), Fake())
    found = places(fleet)
    assert places(fleet) == found == places(fleet_of(Fake(), Fake(), Fake())), (
        "also in another process, or after a restart"
    )
    assert all(250 < count < 420 for count in Counter(found).values()), Counter(found)


def test_without_an_upstream_only_its_own_keys_move(clock: Clock) -> None:
    three = places(fleet_of(Fake(), Fake(), Fake()))
    two = places(fleet_of(Fake(), Fake()))
    assert all(before == after for before, after in zip(three, two, strict=True) if before != 3)


def test_an_upstream_that_refuses_connections_is_left_out_for_a_while(clock: Clock) -> None:
    clients = Fake(), Fake(), Fake()
    fleet = fleet_of(*clients)
    before = places(fleet)
    clients[1].fails, clients[1].asked = UPSTREAM_UNREACHABLE, 0
    during = places(fleet)
    assert clients[1].asked == 1, "it is not asked again for a while"
    assert all(new == old if old != 2 else new != 2 for new, old in zip(during, before, strict=True))
    assert set(during) == {1, 3}, "its keys are spread over the others"
    assert [each["reachable"] for each in fleet.health()] == [True, False, True]
    clock.now += fleets.SKIP_S + 1
    places(fleet)
    assert clients[1].asked == 2, "then one request tries it, and the next ones do not wait for that"
    clients[1].fails = None
    places(fleet)
    assert clients[1].asked == 2
    clock.now += fleets.SKIP_S + 1
    assert places(fleet) == before, "and once it answers, its keys are back"
    assert all(each["reachable"] for each in fleet.health())


def test_one_request_tries_it_again_and_the_others_do_not_wait(clock: Clock) -> None:
    """A try at an unreachable upstream may last as long as the connection timeout, so only one request tries."""

    class Slow(Fake):
        async def send(self, request: UpstreamRequest) -> UpstreamAnswer:
            if self.fails is not None:
                await asyncio.sleep(0.2)
            return await super().send(request)

    clients = Slow(), Slow()
    fleet = fleet_of(*clients)
    home = clients[number(fleet, b"k") - 1]
    home.fails = UPSTREAM_UNREACHABLE
    number(fleet, b"k")
    clock.now += fleets.SKIP_S + 1
    home.asked = 0

    async def several() -> None:
        await asyncio.gather(*(fleet.send(b"k", lambda _: UpstreamRequest("GET", b"/", (), b"")) for _ in range(5)))

    asyncio.run(several())
    assert home.asked == 1


def test_where_all_refuse_all_are_tried(clock: Clock) -> None:
    clients = Fake(), Fake()
    fleet = fleet_of(*clients)
    for client in clients:
        client.fails = UPSTREAM_UNREACHABLE
    for _ in range(3):
        with pytest.raises(RefusedError) as raised:
            number(fleet, b"k")
        assert raised.value.refusal is UPSTREAM_UNREACHABLE
    assert [client.asked for client in clients] == [3, 3]
    clients[0].fails = None
    assert number(fleet, b"k") == 1, "no request is refused while one could answer it"


def test_a_request_that_was_sent_goes_nowhere_else(clock: Clock) -> None:
    clients = Fake(), Fake()
    for client in clients:
        client.fails = UPSTREAM_BROKEN
    with pytest.raises(RefusedError):
        number(fleet_of(*clients), b"k")
    assert sum(client.asked for client in clients) == 1


def test_it_is_known_that_a_key_moved(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(fleet: Fleet, key: bytes) -> bool:
        return asyncio.run(fleet.send(key, lambda _: UpstreamRequest("GET", b"/", (), b""))).moved

    clients = Fake(), Fake()
    fleet = fleet_of(*clients)
    home = clients[number(fleet, b"k") - 1]
    assert not moved(fleet, b"k")
    home.fails = UPSTREAM_UNREACHABLE
    assert [moved(fleet, b"k") for _ in range(2)] == [True, False]
    home.fails = None
    clock.now += fleets.SKIP_S + 1
    assert [moved(fleet, b"k") for _ in range(2)] == [True, False]
    monkeypatch.setattr(fleets, "_REMEMBERED", 10)
    places(fleet)
    assert len(fleet._latest) == 10, "what is remembered is bounded"


def ask(gateway: Running, session: str, *, url: str = "/v1/chat/completions") -> httpx2.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    return httpx2.post(f"{gateway.url}{url}", json=body, headers={"x-session-id": session}, timeout=20)


@pytest.mark.slow
def test_one_of_two_upstreams_is_killed_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real processes. No request fails, and only the killed upstream's conversations move; later they return."""
    monkeypatch.setattr(fleets, "SKIP_S", 0.5)
    sessions = [f"s{n}" for n in range(24)]
    ports = free_port(), free_port()
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    with ExitStack() as stack:
        peers = [
            stack.enter_context(process("-m", "programmable_kv.bench.fixed_upstream", str(port), port=port))
            for port in ports
        ]
        settings = GatewaySettings(urls[0], port=0, more_upstreams=(urls[1],))
        gateway = stack.enter_context(running(settings))

        def placed() -> list[str]:
            answers = [ask(gateway, session) for session in sessions]
            assert [each.status_code for each in answers] == [200] * len(sessions)
            assert all(each.text.endswith("data: [DONE]\n\n") for each in answers)
            return [each.headers["x-pkv-upstream"] for each in answers]

        home = placed()
        assert set(home) == {"1", "2"}
        assert placed() == home
        assert httpx2.get(f"{gateway.url}/healthz").json()["status"] == "ok"

        os.kill(peers[0].pid, signal.SIGKILL)
        peers[0].wait(10)
        assert placed() == ["2"] * len(sessions)
        found = httpx2.get(f"{gateway.url}/healthz").json()
        states = [{"upstream": 1, "reachable": False}, {"upstream": 2, "reachable": True}]
        assert found == {"status": "degraded", "upstreams": states}
        assert httpx2.get(f"{gateway.url}/pkv/report").json()["upstreams"] == states
        assert metric(gateway.url, 'pkv_upstream_reachable{upstream="1"}') == 0
        assert metric(gateway.url, 'pkv_upstream_reachable{upstream="2"}') == 1
        assert metric(gateway.url, 'pkv_upstream_unreachable_total{upstream="1"}') >= 1
        assert metric(gateway.url, 'pkv_upstream_answers_total{upstream="2"}') >= len(sessions)

        stack.enter_context(process("-m", "programmable_kv.bench.fixed_upstream", str(ports[0]), port=ports[0]))
        wait_until(lambda: placed() == home)
        assert httpx2.get(f"{gateway.url}/healthz").json()["status"] == "ok"


def test_where_no_upstream_can_be_reached_the_client_is_told() -> None:
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    with running(GatewaySettings(urls[0], port=0, more_upstreams=(urls[1],))) as gateway:
        got = ask(gateway, "s")
        assert (got.status_code, got.json()["error"]["code"]) == (502, "upstream_unreachable")
        assert "x-pkv-upstream" not in got.headers
        assert "127.0.0.1" not in httpx2.get(f"{gateway.url}/healthz").text, "anybody may read it"


async def tells_its_target(request: Received) -> AsyncIterator[bytes]:
    yield answer(json.dumps([request.target.decode(), request.header(b"host")[0].decode()]).encode())


def test_each_upstream_gets_its_own_path_and_host() -> None:
    with raw_upstream(tells_its_target) as one, raw_upstream(tells_its_target) as two:
        settings = GatewaySettings(f"{one.url}/a", port=0, more_upstreams=(f"{two.url}/b/v1",))
        with running(settings) as gateway:
            found = {tuple(ask(gateway, f"s{n}").json()) for n in range(16)}
    ends = {("/a/v1/chat/completions", f"127.0.0.1:{one.port}"), ("/b/v1/chat/completions", f"127.0.0.1:{two.port}")}
    assert found == ends


def test_with_one_upstream_nothing_is_said_of_several() -> None:
    with raw_upstream(tells_its_target) as one, running(GatewaySettings(one.url, port=0)) as gateway:
        assert "x-pkv-upstream" not in ask(gateway, "s").headers
        assert httpx2.get(f"{gateway.url}/healthz").json() == {"status": "ok"}
        assert "upstreams" not in httpx2.get(f"{gateway.url}/pkv/report").json()


def test_rewriting_goes_on_at_another_upstream_and_is_not_judged_by_its_cold_cache() -> None:
    """The second upstream gets the bytes that the first one got. Its cache misses do not count against rewriting."""
    upstreams = CachingUpstream(), CachingUpstream()
    said: list[Any] = [{"role": "user", "content": "hi"}]

    def turn(gateway: Running, number: int) -> str:
        body = {"model": "m", "messages": [{"role": "system", "content": at(str(number))}, *said]}
        got = httpx2.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=20)
        assert got.status_code == 200
        said.extend(({"role": "assistant", "content": "Yes."}, {"role": "user", "content": f"more {number}"}))
        return str(got.headers["x-pkv-upstream"])

    def counted(gateway: Running) -> int:
        [route] = httpx2.get(f"{gateway.url}/pkv/report").json()["rewriting"]["routes"]
        return int(route["counted_by_upstream"])

    with ExitStack() as stack:
        stacks = [stack.enter_context(ExitStack()) for _ in upstreams]
        urls = [
            inner.enter_context(raw_upstream(upstream)).url for inner, upstream in zip(stacks, upstreams, strict=True)
        ]
        settings = GatewaySettings(urls[0], port=0, more_upstreams=(urls[1],), mode=GatewayMode.ERRATUM, rules=CLOCK)
        gateway = stack.enter_context(running(settings))
        home = int(turn(gateway, 0)) - 1
        assert {turn(gateway, number) for number in (1, 2)} == {str(home + 1)}
        wait_until(lambda: counted(gateway) == 2)
        stacks[home].close()
        assert {turn(gateway, number) for number in (3, 4)} == {str(2 - home)}
        wait_until(lambda: counted(gateway) == 3)
        observed = httpx2.get(f"{gateway.url}/pkv/report").json()["observer"]["observed"]
        assert (observed, counted(gateway)) == (5, 3), "all but the first there are judged"
    assert extends(upstreams[1 - home].bodies[0], upstreams[home].bodies[-1])
