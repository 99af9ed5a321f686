"""Two gateways on one database under load. Gateways, upstream and database are killed, and conversations go on."""

from __future__ import annotations

import json
import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from serve.http_peers import wait_until
from serve.processes import free_port, process
from serve.rewriting_peers import CHAT, RULES
from serve.test_killed import CLOCK_RULES

if TYPE_CHECKING:
    from programmable_kv.bench.database_server import Database

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("postgres")]
ALLOWED = {"upstream_unreachable", "upstream_died", "upstream_error"}
"""The error codes that clients may get while the upstream is down."""


class Client(threading.Thread):
    """One conversation whose clock changes every request. It takes turns between gateways, and retries failures."""

    def __init__(self, ports: list[int], number: int, stop: threading.Event, *, named: bool = True) -> None:
        super().__init__(daemon=True)
        self.ports, self.number, self.stop = ports, number, stop
        self.headers = {"x-session-id": f"{number}"} if named else {}
        self.said: list[Any] = [{"role": "user", "content": f"client {number}: what time is it?"}]
        self.answered = 0
        self.actions: list[str] = []
        self.refused: list[str] = []
        self.wrong: list[tuple[str, str]] = []
        self.uncached: list[int] = []
        """For each answer: the prompt's blocks that were not in the upstream's cache."""
        self.places: list[str] = []
        """For each answer: the number of the upstream that gave it, if there are several."""

    def run(self) -> None:
        tries = 0
        while not self.stop.is_set():
            tries += 1
            now = f"{self.answered // 60}:{self.answered % 60:02}"
            body = {"model": "m", "messages": [{"role": "system", "content": f"Now: {now}\n{RULES}"}, *self.said]}
            port = self.ports[(tries + self.number) % len(self.ports)]
            try:
                got = httpx2.post(f"http://127.0.0.1:{port}{CHAT}", json=body, headers=self.headers, timeout=20)
            except httpx2.HTTPError:
                time.sleep(0.05)
                continue
            if got.status_code != 200:
                self.refused.append(f"{got.status_code} {got.json()['error']['code']}")
                time.sleep(0.05)
                continue
            reply = got.json()
            said = reply["choices"][0]["message"]["content"]
            if said != now:
                self.wrong.append((now, said))
            usage = reply["usage"]
            self.uncached.append(usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"])
            self.actions.append(got.headers["x-pkv-action"])
            self.places.append(got.headers.get("x-pkv-upstream", ""))
            self.answered += 1
            self.said += [{"role": "assistant", "content": said}, {"role": "user", "content": f"and {self.answered}?"}]
            time.sleep(0.02)


def test_whatever_is_killed_the_conversations_go_on(database: Database, tmp_path: Path) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps(CLOCK_RULES))
    place, stop = database.new(), threading.Event()
    upstream_port, ports = free_port(), [free_port(), free_port()]
    upstream_words = ("-m", "programmable_kv.bench.remembering_upstream", str(upstream_port))

    def gateway(port: int) -> Any:
        words = ["serve", "--upstream", f"http://127.0.0.1:{upstream_port}", "--port", str(port), "--mode", "erratum"]
        words += ["--line-role", "system"]
        words += ["--volatile", str(rules), "--state", place.url, "--rebase-after", "8"]
        return process("-m", "programmable_kv", *words, port=port)

    clients = [Client(ports, number, stop) for number in range(3)]

    def go_on(turns: int = 5) -> None:
        before = [client.answered for client in clients]
        wait_until(lambda: all(c.answered >= n + turns for c, n in zip(clients, before, strict=True)), 90)

    with ExitStack() as stack:
        upstream = ExitStack()
        stack.enter_context(upstream)
        upstream.enter_context(process(*upstream_words, port=upstream_port))
        first = stack.enter_context(gateway(ports[0]))
        stack.enter_context(gateway(ports[1]))
        for client in clients:
            client.start()
        go_on()

        first.send_signal(signal.SIGKILL)
        go_on()
        assert {action.partition(";")[0] for client in clients for action in client.actions[1:]} <= {
            "erratum", "replayed", "rebase"
        }, "the other gateway goes on with the same lines"  # fmt: skip
        assert not [client.refused for client in clients if client.refused]
        assert all(max(client.uncached[1:]) < 20 for client in clients), "and with the same bytes"
        stack.enter_context(gateway(ports[0]))

        upstream.close()  # kills it
        before = [len(client.refused) for client in clients]
        wait_until(lambda: all(len(c.refused) > n for c, n in zip(clients, before, strict=True)), 60)
        upstream.enter_context(process(*upstream_words, port=upstream_port))
        go_on()

        database.kill()
        go_on(3)
        database.start()
        restarted = [len(client.actions) for client in clients]
        wait_until(
            lambda: all(
                [action.partition(";")[0] for action in c.actions[n:][-3:]] == ["erratum"] * 3
                for c, n in zip(clients, restarted, strict=True)
            ),
            60,
        )
        stop.set()
        for client in clients:
            client.join(30)
    for client in clients:
        assert not client.wrong, "a value was lost, or an outdated one held"
        assert {refused.partition(" ")[2] for refused in client.refused} <= ALLOWED
        assert not [action for action in client.actions if action.startswith("reset")], "no session was begun anew"
        away = [action for action in client.actions if action.startswith("forwarded")]
        assert set(away) <= {"forwarded; why=the state cannot be reached"}
        assert away, "while the database was away, requests went through as they came"
