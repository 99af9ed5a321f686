"""Servers killed under load: acknowledged edits survive the restart, and no line of a conversation changes."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import pytest

from serve import places
from serve.caching_upstream import CachingUpstream
from serve.http_peers import raw_upstream, wait_until
from serve.processes import free_port, process
from serve.rewriting_peers import at, extends

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("places")]
KILLS = 2


def kills() -> int:
    """The number of kills. With a database one is enough, because starts are slow and later kills show nothing new."""
    return KILLS if places.now.database is None else 1


CLOCK_RULES = {"volatile": [{"name": "the time", "pattern": "^Now: (.*)$"}]}


class Talker(threading.Thread):
    """One client with one conversation, whose clock changes with every request. It repeats failed requests."""

    def __init__(self, port: int, number: int, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.url = f"http://127.0.0.1:{port}/v1/chat/completions"
        self.name_, self.stop = f"talker-{number}", stop
        self.said: list[Any] = [{"role": "user", "content": f"{self.name_}: begin"}]
        self.actions: list[str] = []
        self.minute = 0

    def run(self) -> None:
        while not self.stop.is_set() and len(self.said) < 400:
            self.minute = (self.minute + 1) % 10
            body = {"model": "m", "messages": [{"role": "system", "content": at(str(self.minute))}, *self.said]}
            try:
                got = httpx2.post(self.url, json=body, headers={"x-session-id": self.name_}, timeout=10)
                assert got.status_code == 200, got.text
            except httpx2.HTTPError:
                time.sleep(0.05)
                continue
            self.actions.append(got.headers["x-pkv-action"])
            self.said += [
                {"role": "assistant", "content": "Yes."},
                {"role": "user", "content": f"turn {len(self.said)}"},
            ]


def test_a_killed_gateway_goes_on_with_every_conversation(tmp_path: Path) -> None:
    """Over three kills, every request at the upstream extends the one before it: no line is lost or reworded."""
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps(CLOCK_RULES))
    upstream = CachingUpstream()
    port = free_port()
    stop = threading.Event()
    with raw_upstream(upstream) as server:
        words = [
            "-m", "programmable_kv", "serve", "--upstream", server.url, "--port", str(port), "--mode", "erratum",
            "--line-role", "system", "--volatile", str(rules), "--state", places.now.option(tmp_path / "state"),
        ]  # fmt: skip
        talkers = [Talker(port, number, stop) for number in range(4)]
        for kill in range(kills() + 1):
            with process(*words, port=port) as gateway:
                if kill == 0:
                    for talker in talkers:
                        talker.start()
                before = [len(talker.actions) for talker in talkers]
                wait_until(
                    lambda before=before: all(len(t.actions) > n + 4 for t, n in zip(talkers, before, strict=True)), 60
                )  # type: ignore[misc]
                if kill < kills():
                    gateway.send_signal(signal.SIGKILL)
                    continue
                stop.set()
                for talker in talkers:
                    talker.join(20)
    for talker in talkers:
        mine = [body for body in upstream.bodies if body["messages"][1]["content"].startswith(talker.name_)]
        assert len(mine) >= len(talker.actions) > 4 * kills()
        assert {action.partition(";")[0] for action in talker.actions[1:]} <= {"erratum", "replayed"}, talker.actions
        for earlier, later in pairwise(mine):
            assert extends(later, earlier), "a line that was sent was lost"


def test_a_killed_gateway_keeps_every_acknowledged_value_of_a_notebook(tmp_path: Path) -> None:
    """Over three kills, no acknowledged edit is lost, and the upstream's requests state the latest one."""
    upstream = CachingUpstream()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    stop = threading.Event()
    acknowledged = [(1, "new")]
    tried = ["new"]

    def patch(identity: str) -> None:
        while not stop.is_set():
            tried.append(f"v{len(tried)}")
            try:
                got = httpx2.patch(f"{url}/v1/notebooks/{identity}/fields", json={"status": tried[-1]}, timeout=10)
            except httpx2.HTTPError:
                return
            assert got.status_code == 200, got.text
            acknowledged.append((got.json()["version"], tried[-1]))

    with raw_upstream(upstream) as server:
        words = [
            "-m", "programmable_kv", "serve", "--upstream", server.url, "--port", str(port), "--state", str(tmp_path / "state"),
        ]  # fmt: skip
        identity = ""
        for kill in range(KILLS + 1):
            stop.clear()
            with process(*words, port=port) as gateway:
                if not identity:
                    system = [{"role": "system", "content": at("0", "It is {status}.")}]
                    body = {"upstream_model": "m", "messages": system, "fields": {"status": "new"}}
                    identity = httpx2.post(f"{url}/v1/notebooks", json=body, timeout=30).json()["id"]
                found = httpx2.get(f"{url}/v1/notebooks/{identity}", timeout=30).json()
                version, value = acknowledged[-1]
                held = (found["version"], found["fields"]["status"])
                assert held in [(version, value), (version + 1, tried[-1])]
                acknowledged.append(held)
                asked = {"model": f"notebook:{identity}", "messages": [{"role": "user", "content": f"{kill}?"}]}
                assert httpx2.post(f"{url}/v1/chat/completions", json=asked, timeout=30).status_code == 200
                sent = json.dumps(upstream.bodies[-1])
                assert sent.count(held[1]) == 1
                thread = threading.Thread(target=patch, args=(identity,), daemon=True)
                thread.start()
                wanted = len(acknowledged) + 5
                wait_until(lambda wanted=wanted: len(acknowledged) > wanted, 60)  # type: ignore[misc]
                gateway.send_signal(signal.SIGKILL)
                thread.join(20)
            stop.set()


LOCAL = """
import sys
from programmable_kv.bench.tiny_chat import tiny_chat_model
from programmable_kv.serve.address import place_of
from programmable_kv.serve.run import run_local
from programmable_kv.serve.settings import LocalSettings
run_local(lambda: tiny_chat_model(2048), LocalSettings(port=int(sys.argv[1]), state=place_of(sys.argv[2])))
"""


def test_a_killed_local_server_keeps_every_acknowledged_value(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1/notebooks"
    acknowledged: dict[str, tuple[int, str]] = {}
    tried: dict[str, str] = {}
    stop = threading.Event()

    def patch(identity: str) -> None:
        draw = random.Random(identity)
        while not stop.is_set():
            value = f"v{draw.randrange(10**6)}"
            tried[identity] = value
            try:
                got = httpx2.patch(f"{url}/{identity}/fields", json={"status": value}, timeout=10)
            except httpx2.HTTPError:
                return
            assert got.status_code == 200, got.text
            acknowledged[identity] = (got.json()["version"], value)

    names: list[str] = []
    for kill in range(kills()):
        stop.clear()
        with process("-c", LOCAL, str(port), places.now.option(tmp_path / "state"), port=port) as server:
            if not names:
                for _ in range(3):
                    body = {"messages": [{"role": "system", "content": "It is {status}."}], "fields": {"status": "new"}}
                    names.append(httpx2.post(url, json=body, timeout=30).json()["id"])
            _check(url, names, acknowledged, tried)
            threads = [threading.Thread(target=patch, args=(name,), daemon=True) for name in names]
            for thread in threads:
                thread.start()
            wanted = {name: acknowledged[name][0] + 3 for name in names}
            wait_until(lambda wanted=wanted: all(acknowledged[n][0] > wanted[n] for n in names), 60)  # type: ignore[misc]
            server.send_signal(signal.SIGKILL)
            for thread in threads:
                thread.join(20)
        stop.set()
        assert kill < kills()
    with process("-c", LOCAL, str(port), places.now.option(tmp_path / "state"), port=port):
        _check(url, names, acknowledged, tried)
        got = httpx2.post(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json={"model": f"notebook:{names[0]}", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
            timeout=30,
        )
        assert got.status_code == 200


def _check(url: str, names: list[str], acknowledged: dict[str, tuple[int, str]], tried: dict[str, str]) -> None:
    """Check that each notebook has its last acknowledged value, or the one that was in flight when the server died."""
    for name in names:
        found = httpx2.get(f"{url}/{name}", timeout=30).json()
        version, value = acknowledged.get(name, (1, "new"))
        assert (found["version"], found["fields"]["status"]) in [(version, value), (version + 1, tried.get(name))]
        acknowledged[name] = (found["version"], found["fields"]["status"])
