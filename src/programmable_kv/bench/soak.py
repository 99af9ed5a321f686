"""Loads a gateway, or several that share one state, for a long time, while gateways and their database are killed.

The upstream answers with the time that it read last, so a client sees whether a value was lost or outdated. Each
stretch of the run records the share of the prompt that the upstream found in its cache, latency, the gateway's memory,
wrong answers, and edits of notebooks that were acknowledged and then lost. Clients send requests again that fail while
something restarts.
"""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from programmable_kv.bench.serve_peers import LINES, Peer, free_port, gateway, peer_of
from programmable_kv.bench.soak_clients import PATIENCE_S, TURNS, Client, Editor, Talker
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.records import Record, Recorder, digest_of
from programmable_kv.scenarios.plain_text import documents
from programmable_kv.serve.address import DatabaseAddress, place_of

if TYPE_CHECKING:
    from programmable_kv.bench.database_server import Database

MODE = "erratum"
_HEAD = 6000
"""Characters of a system prompt."""
_AWAY_S = 1.0
"""Seconds after which a killed database is started again."""


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
    editors: int = 0,
    database_kills: int = 0,
    report: Callable[[int, int], None] | None = None,
    command: str = "",
) -> Record:
    """Load a gateway for `minutes`, and write the record.

    Args:
        stretches: number of rows of the record, each for an equal part of the time.
        clients: number of conversations at a time.
        per_second: requests per second of all clients together.
        kills: how often a gateway is killed (SIGKILL) and started again on the same port, spread over the time.
        rebase_after: number of lines in a conversation after which its prefix is renewed in the background.
        observe_mib: how much text of earlier requests the gateway keeps, in MiB. It is small so that it is full early
            in the run; memory that still grows afterwards is a leak.
        gateways: number of gateways. The turns of a conversation go to them in rotation, and they are killed in
            rotation.
        state: the value of `pkv serve --state`: a database's URL for several gateways; a file if empty.
        editors: number of further clients, each with a notebook whose field it edits. Together they make about one edit
            per second.
        database_kills: how often the database and all its processes are killed (SIGKILL) and started again, spread over
            the time. The run starts its own PostgreSQL server for this, and `state` must be empty.

    Raises:
        InvalidArgumentError: several gateways have no database to share, or the database to kill is not the run's own.
        ExperimentError: a database is to be killed, but no PostgreSQL server is found.
    """
    if database_kills and state:
        raise InvalidArgumentError("--database-kills starts and kills a database of its own: leave --state out")
    if gateways > 1 and not database_kills and not isinstance(place_of(state), DatabaseAddress):
        raise InvalidArgumentError(
            "several gateways need a shared database: give --state postgresql://... or --database-kills"
        )
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
            "rebase_after": rebase_after, "observe_mib": observe_mib, "mode": MODE, "turns": TURNS, "gateways": gateways,
            "state": "PostgreSQL" if database_kills or isinstance(place_of(state), DatabaseAddress) else "SQLite",
            "editors": editors, "database_kills": database_kills,
        },
    )  # fmt: skip
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        upstream = stack.enter_context(peer_of("programmable_kv.bench.remembering_upstream", folder / "upstream.log"))
        database = _database(stack) if database_kills else None
        state = state if database is None else database.new().url
        more = ["--rebase-after", str(rebase_after), "--observe-mib", str(observe_mib)]
        served = _Served(upstream.port, folder, [*more, *(["--state", state] if state else [])], gateways)
        stack.callback(served.stop)
        stopped = threading.Event()
        stack.callback(stopped.set)
        working: list[Client] = [
            Talker(served, text, number, clients / per_second, stopped) for number in range(clients)
        ]
        working += [Editor(served, text, clients + number, editors, stopped) for number in range(editors)]
        for client in working:
            client.start()
        began = time.monotonic()
        for stretch in range(stretches):
            until = began + 60 * minutes * (stretch + 1) / stretches
            gateway_kills, kills_of_database = (_due(each, stretch, stretches) for each in (kills, database_kills))
            killing: list[Callable[[], object]] = [served.kill] * gateway_kills
            killing += [] if database is None else [partial(_restart, database)] * kills_of_database
            while killing:
                time.sleep(max(0.0, (until - time.monotonic()) / (2 * len(killing))))
                killing.pop(0)()
            time.sleep(max(0.0, until - time.monotonic()))
            killed = {"kills": gateway_kills, "database_kills": kills_of_database}
            recorder.add({"stretch": stretch, **killed, **_row(working, served.peers)})
            if report is not None:
                report(stretch + 1, stretches)
        stopped.set()
        for client in working:
            client.join(PATIENCE_S)
    return recorder.finish(summarise(recorder.rows))


def _due(kills: int, stretch: int, stretches: int) -> int:
    """The number of kills that fall into one stretch."""
    return round(kills * (stretch + 1) / stretches) - round(kills * stretch / stretches)


def _database(stack: ExitStack) -> Database:
    """A new database server with durable settings (`fsync`), which is removed when the stack closes."""
    from programmable_kv.bench.database_server import Database

    found = Database(free_port(), synced=True)
    stack.callback(found.remove)
    return found


def _restart(database: Database) -> None:
    """Kill the database, and start it again."""
    database.kill()
    time.sleep(_AWAY_S)
    database.start()


class _Served:
    """Gateways that can be killed. A new one takes over the killed one's port and state."""

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
        return self._stacks[at].enter_context(
            gateway(MODE, self._upstream_port, folder, port=port, more=(*LINES, *self._more))
        )

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


def _row(clients: Sequence[Client], peers: Sequence[Peer]) -> dict[str, Any]:
    seen = [client.taken() for client in clients]
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
        "edits": sum(one.edits for one in seen),
        "lost": sum(one.lost for one in seen),
        "hit_rate": round(sum(one.cached for one in seen) / max(1, sum(one.blocks for one in seen)), 4),
        "p50_ms": round(statistics.median(times), 2) if times else None,
        "p99_ms": round(times[int(0.99 * (len(times) - 1))], 2) if times else None,
        "resident_mib": None if resident is None else round(resident / 2**20, 1),
        "actions": dict(sorted(actions.items())),
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over the whole run, and figures of its first and last third, whose difference shows decay."""
    third = max(1, len(rows) // 3)
    first, last = rows[:third], rows[-third:]
    requests = sum(row["requests"] for row in rows)
    return {
        "requests": requests,
        "wrong": sum(row["wrong"] for row in rows),
        "repeated": sum(row["repeated"] for row in rows),
        "kills": sum(row["kills"] for row in rows),
        "database_kills": sum(row["database_kills"] for row in rows),
        "edits": sum(row["edits"] for row in rows),
        "lost": sum(row["lost"] for row in rows),
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
