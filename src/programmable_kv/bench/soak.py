"""A gateway, or several with one state, under load for a long time: clocks that move at every turn, gateways that are killed.

The upstream answers with the time that it read last, so that a lost or outdated value is seen by the client that sent it. What
is watched in each stretch of the run: the share of the prompt that the upstream found in its cache, latency, the gateway's
memory, wrong answers. Requests that fail while a gateway restarts are sent again, as clients do.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from programmable_kv.bench.serve_peers import Peer, gateway, peer_of
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.records import Record, Recorder, digest_of
from programmable_kv.scenarios.plain_text import documents
from programmable_kv.serve.address import DatabaseAddress, place_of

MODE = "erratum"
_HEAD = 6000
"""characters of a system prompt"""
_TURNS = 60
"""requests of one conversation, before the client begins another"""
_PATIENCE_S = 20.0


def run(
    path: Path,
    *,
    minutes: float = 30.0,
    stretches: int = 15,
    clients: int = 8,
    per_second: float = 20.0,
    kills: int = 5,
    rebase_after: int = 12,
    observe_mib: int = 8,
    gateways: int = 1,
    state: str = "",
    report: Callable[[int, int], None] | None = None,
    command: str = "",
) -> Record:
    """Load a gateway for so long, and write the record.

    Args:
        stretches: rows of the record, each an equal part of the time.
        clients: conversations at a time.
        per_second: requests of all clients together.
        kills: how often the gateway is killed (SIGKILL) and started again on the same port, spread over the time.
        rebase_after: lines of a conversation after which its prefix is renewed in the background.
        observe_mib: how much text of earlier requests the gateway keeps. Little, so that it is full early in the run, and
            memory that grows on is a leak.
        gateways: how many there are. A conversation's turns go to them in turn, and they are killed in turn.
        state: what `pkv serve --state` takes, a database's URL where there are several gateways; empty: a file.

    Raises:
        InvalidArgumentError: several gateways without a database.
    """
    if gateways > 1 and not isinstance(place_of(state), DatabaseAddress):
        raise InvalidArgumentError("several gateways share a database: give --state postgresql://...")
    text = " ".join(documents("held_out"))[:_HEAD]
    recorder = Recorder(
        path,
        name=path.stem,
        version=1,
        title="A gateway under load for a long time",
        command=command,
        model="no model: an upstream that counts",
        model_fingerprint="",
        data_digest=digest_of([text]),
        seeds=[0],
        settings={
            "minutes": minutes, "stretches": stretches, "clients": clients, "per_second": per_second, "kills": kills,
            "rebase_after": rebase_after, "observe_mib": observe_mib, "mode": MODE, "turns": _TURNS,
            "gateways": gateways, "state": "PostgreSQL" if isinstance(place_of(state), DatabaseAddress) else "SQLite",
        },
    )  # fmt: skip
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        upstream = stack.enter_context(peer_of("programmable_kv.bench.remembering_upstream", folder / "upstream.log"))
        more = ["--rebase-after", str(rebase_after), "--observe-mib", str(observe_mib)]
        served = _Served(upstream.port, folder, [*more, *(["--state", state] if state else [])], gateways)
        stack.callback(served.stop)
        stopped = threading.Event()
        stack.callback(stopped.set)
        talkers = [_Talker(served, text, number, clients / per_second, stopped) for number in range(clients)]
        for talker in talkers:
            talker.start()
        began = time.monotonic()
        died = 0
        for stretch in range(stretches):
            until = began + 60 * minutes * (stretch + 1) / stretches
            due = round(kills * (stretch + 1) / stretches)
            restarted = due - died
            while died < due:
                time.sleep(max(0.0, (until - time.monotonic()) / (2 * (due - died))))
                served.kill()
                died += 1
            time.sleep(max(0.0, until - time.monotonic()))
            recorder.add({"stretch": stretch, "kills": restarted, **_row(talkers, served.peers)})
            if report is not None:
                report(stretch + 1, stretches)
        stopped.set()
        for talker in talkers:
            talker.join(_PATIENCE_S)
    return recorder.finish(summarise(recorder.rows))


class _Served:
    """Gateways that can be killed; the next one takes over the port and the state."""

    def __init__(self, upstream_port: int, folder: Path, more: Sequence[str], number: int) -> None:
        """`more`: options of `pkv serve`."""
        self._upstream_port, self._folder, self._more = upstream_port, folder, more
        self._stacks = [ExitStack() for _ in range(number)]
        self._kills = 0
        self.peers: list[Peer] = []
        for at in range(number):
            self.peers.append(self._started(at, None))

    def _started(self, at: int, port: int | None) -> Peer:
        folder = self._folder / f"gateway-{at}"
        folder.mkdir(exist_ok=True)
        return self._stacks[at].enter_context(gateway(MODE, self._upstream_port, folder, port=port, more=self._more))

    def kill(self) -> None:
        at = self._kills % len(self.peers)
        self._kills += 1
        os.kill(self.peers[at].pid, signal.SIGKILL)
        self._stacks[at].close()
        self._stacks[at] = ExitStack()
        self.peers[at] = self._started(at, self.peers[at].port)

    def stop(self) -> None:
        for stack in self._stacks:
            stack.close()


@dataclass(slots=True)
class _Seen:
    """What one client saw since it was last asked."""

    milliseconds: list[float] = field(default_factory=list)
    blocks: int = 0
    cached: int = 0
    wrong: int = 0
    repeated: int = 0
    actions: dict[str, int] = field(default_factory=dict)


class _Talker(threading.Thread):
    """A client with one conversation after another, whose clock moves at every request."""

    def __init__(self, served: _Served, text: str, number: int, pause_s: float, stopped: threading.Event) -> None:
        super().__init__(daemon=True)
        self._served, self._text, self._number = served, text, number
        self._pause_s, self._stopped = pause_s, stopped
        self._random = random.Random(number)
        self._lock = threading.Lock()
        self._seen = _Seen()
        self._tries = 0

    def run(self) -> None:
        conversation = 0
        while not self._stopped.is_set():
            conversation += 1
            name = f"client-{self._number}-{conversation}"
            said = [{"role": "user", "content": f"{name}: what time is it?"}]
            for turn in range(_TURNS):
                if self._stopped.is_set():
                    return
                answer = self._ask(name, said, f"{10 + turn // 60}:{turn % 60:02}:{self._random.randrange(60):02}")
                said += [{"role": "assistant", "content": answer}, {"role": "user", "content": f"and now ({turn})?"}]
                self._stopped.wait(self._random.expovariate(1 / self._pause_s))

    def _ask(self, name: str, said: list[dict[str, str]], now: str) -> str:
        system = {"role": "system", "content": f"Now: {now}\nYou answer with the time.\n{self._text}"}
        body = json.dumps({"model": "remembering", "messages": [system, *said]}).encode()
        headers = {"content-type": "application/json", "x-session-id": name}
        while not self._stopped.is_set():
            began = time.perf_counter()
            self._tries += 1
            peer = self._served.peers[(self._number + self._tries) % len(self._served.peers)]
            connection = http.client.HTTPConnection("127.0.0.1", peer.port, timeout=_PATIENCE_S)
            try:
                connection.request("POST", "/v1/chat/completions", body, headers)
                response = connection.getresponse()
                content = response.read()
                if response.status != 200:
                    raise OSError(f"status {response.status}: {content[:200]!r}")
                action = response.headers.get("x-pkv-action", "")
            except (OSError, http.client.HTTPException):
                with self._lock:
                    self._seen.repeated += 1
                self._stopped.wait(0.1)
                continue
            finally:
                connection.close()
            reply = json.loads(content)
            answer = str(reply["choices"][0]["message"]["content"])
            usage = reply["usage"]
            with self._lock:
                seen = self._seen
                seen.milliseconds.append(1e3 * (time.perf_counter() - began))
                seen.blocks += usage["prompt_tokens"]
                seen.cached += usage["prompt_tokens_details"]["cached_tokens"]
                seen.wrong += answer != now
                seen.actions[action] = seen.actions.get(action, 0) + 1
            return answer
        return ""

    def taken(self) -> _Seen:
        """What was seen since the last time."""
        with self._lock:
            seen, self._seen = self._seen, _Seen()
        return seen


def _row(talkers: list[_Talker], peers: Sequence[Peer]) -> dict[str, Any]:
    seen = [talker.taken() for talker in talkers]
    times = sorted(ms for one in seen for ms in one.milliseconds)
    actions: dict[str, int] = {}
    for one in seen:
        for action, count in one.actions.items():
            actions[action] = actions.get(action, 0) + count
    memory = [peer.resident_bytes for peer in peers]
    resident = max((each for each in memory if each is not None), default=None)
    return {
        "requests": len(times),
        "repeated": sum(one.repeated for one in seen),
        "wrong": sum(one.wrong for one in seen),
        "hit_rate": round(sum(one.cached for one in seen) / max(1, sum(one.blocks for one in seen)), 4),
        "p50_ms": round(statistics.median(times), 2) if times else None,
        "p99_ms": round(times[int(0.99 * (len(times) - 1))], 2) if times else None,
        "resident_mib": None if resident is None else round(resident / 2**20, 1),
        "actions": dict(sorted(actions.items())),
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole run, and its first and last third beside one another: what decays shows there."""
    third = max(1, len(rows) // 3)
    first, last = rows[:third], rows[-third:]
    requests = sum(row["requests"] for row in rows)
    return {
        "requests": requests,
        "wrong": sum(row["wrong"] for row in rows),
        "repeated": sum(row["repeated"] for row in rows),
        "kills": sum(row["kills"] for row in rows),
        "hit_rate": round(sum(row["hit_rate"] * row["requests"] for row in rows) / max(1, requests), 4),
        **{
            f"{name}_{figure}": _mean([row[figure] for row in some])
            for figure in ("hit_rate", "p50_ms", "p99_ms", "resident_mib")
            for name, some in (("first", first), ("last", last))
        },
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.mean(known), 4) if known else None
