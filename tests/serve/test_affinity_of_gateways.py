"""Several gateways and upstreams, all in processes: every gateway sends a conversation to the same upstream."""

from __future__ import annotations

import json
import os
import signal
import threading
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from serve.http_peers import wait_until
from serve.processes import free_port, process
from serve.rewriting_peers import at
from serve.test_killed import CLOCK_RULES
from serve.test_shared_killed import ALLOWED, Client

if TYPE_CHECKING:
    from programmable_kv.bench.database_server import Database

pytestmark = pytest.mark.slow
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"


def turn(kind: str, number: int, said: list[Any], minute: int) -> tuple[str, dict[str, str], dict[str, Any]]:
    """The path, headers and body of a conversation's next request from a kind of client."""
    body: dict[str, Any] = {"model": "m", "messages": [{"role": "system", "content": at(str(minute))}, *said]}
    match kind:
        case "header":
            return CHAT, {"x-session-id": f"s{number}"}, body
        case "body":
            return CHAT, {}, {**body, "prompt_cache_key": f"k{number}"}
        case "anthropic":
            return MESSAGES, {}, {"model": "m", "max_tokens": 9, "system": at(str(minute)), "messages": said}
        case "responses":
            return RESPONSES, {}, {"model": "m", "instructions": at(str(minute)), "input": said}
    return CHAT, {}, body


@pytest.mark.parametrize("mode", ["observe", "erratum"])
def test_gateways_that_share_nothing_choose_the_same_upstream(tmp_path: Path, mode: str) -> None:
    """Each gateway has its own state. In mode `erratum` the user's first message contains a clock too."""
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps(CLOCK_RULES))
    upstreams, ports = [free_port(), free_port(), free_port()], [free_port(), free_port()]
    with ExitStack() as stack:
        for port in upstreams:
            stack.enter_context(process("-m", "programmable_kv.bench.fixed_upstream", str(port), port=port))
        for port in ports:
            words = ["serve", "--port", str(port), "--mode", mode, "--state", str(tmp_path / f"state-{port}")]
            words += ["--volatile", str(rules)] if mode == "erratum" else []
            words += [word for each in upstreams for word in ("--upstream", f"http://127.0.0.1:{each}")]
            stack.enter_context(process("-m", "programmable_kv", *words, port=port))
        found = {}
        for number, kind in enumerate(["header", "body", "nameless", "anthropic", "responses"] * 5):
            said: list[Any] = []
            answered = []
            for minute in range(4):
                clock = f"Now: 10:0{minute}\n" if mode == "erratum" else ""
                said = [{"role": "user", "content": f"{clock}I am {number}"}, *said[1:]]
                path, headers, body = turn(kind, number, said, minute)
                url = f"http://127.0.0.1:{ports[(number + minute) % 2]}{path}"
                got = httpx2.post(url, json=body, headers=headers, timeout=20)
                assert got.status_code == 200, got.text
                answered.append(got.headers["x-pkv-upstream"])
                said += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": f"more {minute}"}]
            found[number, kind] = answered
    assert all(len(set(answered)) == 1 for answered in found.values()), found
    assert {answered[0] for answered in found.values()} == {"1", "2", "3"}, "and all of them are used"


@pytest.mark.xdist_group("postgres")
def test_an_upstream_dies_and_returns_and_every_conversation_goes_on(database: Database, tmp_path: Path) -> None:
    """Two gateways on one database, two upstreams. No answer uses an outdated value, and no conversation is reset."""
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps(CLOCK_RULES))
    place, stop = database.new(), threading.Event()
    upstreams, ports = [free_port(), free_port()], [free_port(), free_port()]
    clients = [Client(ports, number, stop, named=number % 2 == 0) for number in range(8)]

    def upstream(port: int) -> Any:
        return process("-m", "programmable_kv.bench.remembering_upstream", str(port), port=port)

    def go_on(turns: int = 4) -> None:
        before = [client.answered for client in clients]
        wait_until(lambda: all(c.answered >= n + turns for c, n in zip(clients, before, strict=True)), 90)

    with ExitStack() as stack:
        peers = [stack.enter_context(upstream(port)) for port in upstreams]
        for port in ports:
            words = ["serve", "--port", str(port), "--mode", "erratum", "--volatile", str(rules), "--state", place.url]
            words += [word for each in upstreams for word in ("--upstream", f"http://127.0.0.1:{each}")]
            stack.enter_context(process("-m", "programmable_kv", *words, port=port))
        for client in clients:
            client.start()
        go_on()
        home = [client.places[0] for client in clients]
        assert set(home) == {"1", "2"}
        assert all(set(client.places) == {place} for client, place in zip(clients, home, strict=True))

        os.kill(peers[0].pid, signal.SIGKILL)
        peers[0].wait(10)
        died = [len(client.places) for client in clients]
        go_on()
        away = [len(client.places) for client in clients]
        assert all(client.places[-1] == "2" for client in clients), "its conversations go on at the other one"
        stack.enter_context(upstream(upstreams[0]))
        wait_until(lambda: all(c.places[-2:] == [place] * 2 for c, place in zip(clients, home, strict=True)), 90)
        go_on()
        stop.set()
        for client in clients:
            client.join(30)
    for client, place, first, last in zip(clients, home, died, away, strict=True):
        assert not client.wrong, "a value was lost, or an outdated one held"
        assert {refused.partition(" ")[2] for refused in client.refused} <= ALLOWED
        did = {action.partition(";")[0] for action in client.actions[1:]}
        assert did <= {"erratum", "replayed", "rebase"}, client.actions
        if place == "2":
            assert set(client.places) == {"2"}, "no other conversation moves"
        else:
            assert set(client.places[first + 1 : last]) == {"2"}
            assert client.places[-1] == "1", "and they come back"
        # While a conversation stays at one upstream, its cache has everything that it read in the turn before.
        stayed = [
            n for (one, other), n in zip(pairwise(client.places), client.uncached[1:], strict=True) if one == other
        ]
        assert max(stayed) < 20, stayed
