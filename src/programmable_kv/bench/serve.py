"""What the gateway adds to a request: the same requests straight to an upstream and through gateways, interleaved in one run.

The upstream, a gateway of each mode and the client are processes of one machine, and share its cores. Figures are differences
and ratios within the run.

Latency is taken one request at a time; the observer, which works behind each answer, ends before the next one. Throughput is
taken with clients that ask without a pause, and has the observer's work in it.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from programmable_kv.bench.fixed_upstream import EVENTS, events
from programmable_kv.bench.http_client import Client, Timed
from programmable_kv.bench.serve_load import TURNS, conversation
from programmable_kv.bench.serve_peers import Peer, gateway, upstream
from programmable_kv.records import Record, Recorder, digest_of

DIRECT = "direct"
MODES = ("pass", "observe", "erratum")
SIZES_KB = (8, 100, 450)
CLIENTS = (1, 8)
ROUNDS = 2
"""turns of each way in the throughput of one size"""
_WARM = TURNS
"""requests of each way before any is timed"""


@dataclass(slots=True)
class Way:
    """One way to the upstream: direct, or through a gateway."""

    name: str
    peer: Peer
    began: int = 0
    """conversations that were opened"""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def requests(self, bodies: Sequence[bytes]) -> Iterator[tuple[bytes, str]]:
        """Endless requests of one conversation after another, each with its conversation's name."""
        while True:
            with self.lock:
                self.began += 1
                name = f"{self.name}-{self.began}"
            for body in bodies:
                yield body, name

    def wait_until_quiet(self) -> None:
        if self.name != DIRECT:
            self.peer.wait_until_quiet()


def run(
    path: Path,
    *,
    sizes_kb: Sequence[int] = SIZES_KB,
    requests: int = 200,
    seconds: float = 1.5,
    sessions: int = 1000,
    report: Callable[[int, int], None] | None = None,
    command: str = "",
) -> Record:
    """Measure latency and throughput at every size of a body, and memory, and write the record.

    Args:
        requests: of each way at each size, for the latency.
        seconds: each way is loaded in one of `ROUNDS` turns, for the throughput.
        sessions: idle conversations, of one request each and of the smallest size, for the memory.

    Raises:
        RecordError: as `Recorder`.
        ConnectionError: a way answered otherwise than the upstream does.
    """
    recorder = Recorder(
        path,
        name="serve",
        version=1,
        title="What the gateway adds to a request, by mode and size of the body",
        command=command,
        model="no model: an upstream with fixed answers",
        model_fingerprint="none",
        data_digest=digest_of(texts(sizes_kb)),
        seeds=[],
        settings={
            "sizes_kb": list(sizes_kb),
            "requests": requests,
            "seconds": seconds,
            "rounds": ROUNDS,
            "clients": list(CLIENTS),
            "sessions": sessions,
            "turns": TURNS,
            "events": EVENTS,
            "ways": [DIRECT, *MODES],
        },
    )
    small = conversation(1000 * min(sizes_kb))[0]
    steps: list[tuple[dict[str, Any], Callable[[list[Way]], dict[str, Any]]]] = [
        ({"what": "memory"}, partial(memory, body=small, sessions=sessions))
    ]
    for kb in sizes_kb:
        bodies = conversation(1000 * kb)
        steps.append(({"what": "latency", "kb": kb}, partial(latency, bodies=bodies, requests=requests)))
        for clients in CLIENTS:
            key = {"what": "throughput", "kb": kb, "clients": clients}
            steps.append((key, partial(throughput, bodies=bodies, clients=clients, seconds=seconds)))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as peers:
        server = peers.enter_context(upstream(Path(folder)))
        gateways = [Way(mode, peers.enter_context(gateway(mode, server.port, Path(folder)))) for mode in MODES]
        ways = [Way(DIRECT, server), *gateways]
        for number, (key, measure) in enumerate(steps, start=1):
            if not recorder.done(**key):
                recorder.add({**key, "ways": measure(ways)})
            if report is not None:
                report(number, len(steps))
    return recorder.finish(
        summarise(recorder.rows),
        ["Upstream, gateways and client shared one machine with other work: compare within this record only."],
    )


def steps_of(sizes_kb: Sequence[int]) -> int:
    """How often `run` reports."""
    return 1 + len(sizes_kb) * (1 + len(CLIENTS))


def texts(sizes_kb: Sequence[int]) -> Iterator[str]:
    """All bodies, and the answer."""
    for kb in sizes_kb:
        yield from (body.decode() for body in conversation(1000 * kb))
    yield b"".join(events()).decode()


def memory(ways: Sequence[Way], body: bytes, sessions: int) -> dict[str, Any]:
    """Of every gateway: bytes by which its process grew with each conversation of one request, after a tenth as many before.

    None where the system does not tell.
    """
    found = {}
    for way in ways[1:]:
        with Client(way.peer.port) as client:
            _open_sessions(way, client, body, max(1, sessions // 10))
            before = way.peer.resident_bytes
            _open_sessions(way, client, body, sessions)
            after = way.peer.resident_bytes
        grown = None if before is None or after is None else round((after - before) / sessions)
        found[way.name] = {"session_bytes": grown, "body_bytes": len(body)}
    return found


def _open_sessions(way: Way, client: Client, body: bytes, count: int) -> None:
    for number, (each, session) in enumerate(way.requests([body])):
        if number == count:
            break
        checked(client.ask(each, session))
    way.wait_until_quiet()


def latency(ways: Sequence[Way], bodies: Sequence[bytes], requests: int) -> dict[str, Any]:
    """Of every way: percentiles of the milliseconds of one request at a time, in turns, and what gateways said they did."""
    sent = {way.name: way.requests(bodies) for way in ways}
    times: dict[str, list[Timed]] = {way.name: [] for way in ways}
    with ExitStack() as open_clients:
        clients = {way.name: open_clients.enter_context(Client(way.peer.port)) for way in ways}
        for number in range(_WARM + requests):
            for way in (*ways[number % len(ways) :], *ways[: number % len(ways)]):
                answer = checked(clients[way.name].ask(*next(sent[way.name])))
                way.wait_until_quiet()
                if number >= _WARM:
                    times[way.name].append(answer)
    return {name: _latency(answers) for name, answers in times.items()}


def _latency(answers: Sequence[Timed]) -> dict[str, Any]:
    actions: dict[str, int] = {}
    for answer in answers:
        action = answer.header("x-pkv-action").partition(";")[0]
        if action:
            actions[action] = actions.get(action, 0) + 1
    own = [float(answer.header("x-pkv-own-ms") or 0) for answer in answers]
    return {
        "first": percentiles([answer.first_ms for answer in answers]),
        "whole": percentiles([answer.whole_ms for answer in answers]),
        "own": percentiles(own),
        "actions": actions,
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The 50th and the 99th, of at least two values."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50_ms": round(cuts[49], 3), "p99_ms": round(cuts[98], 3)}


def throughput(ways: Sequence[Way], bodies: Sequence[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """Of every way: requests answered in a second to clients that ask without a pause, and requests the observer left out."""
    done = dict.fromkeys((way.name for way in ways), 0)
    spent = dict.fromkeys((way.name for way in ways), 0.0)
    dropped = {way.name: _dropped(way) for way in ways}
    for number in range(ROUNDS):
        for way in ways if number % 2 == 0 else reversed(ways):
            answered, took = _load(way, bodies, clients, seconds)
            done[way.name] += answered
            spent[way.name] += took
            way.wait_until_quiet()
    return {
        way.name: {
            "per_second": round(done[way.name] / spent[way.name], 2),
            "requests": done[way.name],
            "not_observed": round(_dropped(way) - dropped[way.name]),
        }
        for way in ways
    }


def _dropped(way: Way) -> float:
    return 0.0 if way.name == DIRECT else way.peer.metric("pkv_observer_dropped")


def _load(way: Way, bodies: Sequence[bytes], clients: int, seconds: float) -> tuple[int, float]:
    """Requests that were answered, and the seconds until the last of them was."""
    counts = [0] * clients
    faults: list[BaseException] = []
    began = time.perf_counter()
    end = began + seconds

    def work(place: int) -> None:
        try:
            with Client(way.peer.port) as client:
                for body, session in way.requests(bodies):
                    checked(client.ask(body, session))
                    counts[place] += 1
                    if time.perf_counter() > end:
                        return
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
    return sum(counts), time.perf_counter() - began


_ANSWER = b"".join(events())


def checked(answer: Timed) -> Timed:
    """
    Raises:
        ConnectionError: an answer that is not the upstream's, byte for byte.
    """
    if answer.body != _ANSWER:
        raise ConnectionError(f"an answer differs from what the upstream sends: {answer.body[:200]!r}")
    return answer


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By mode: what it adds to the percentiles of the direct way, the part of its throughput, and memory of an idle session."""
    summary: dict[str, dict[str, Any]] = {mode: {} for mode in MODES}
    for row in rows:
        ways = row["ways"]
        for mode in MODES:
            found = ways[mode]
            if row["what"] == "memory":
                if found["session_bytes"] is not None:
                    summary[mode]["session_kb"] = round(found["session_bytes"] / 1000, 2)
                continue
            place = summary[mode].setdefault(f"at_{row['kb']}_kb", {})
            direct = ways[DIRECT]
            if row["what"] == "latency":
                for part in ("first", "whole"):
                    for name, value in found[part].items():
                        place[f"added_{part}_{name}"] = round(value - direct[part][name], 3)
                place["own_p50_ms"] = found["own"]["p50_ms"]
                place["rewritten"] = found["actions"].get("erratum", 0) + found["actions"].get("replayed", 0)
            else:
                place[f"per_second_at_{row['clients']}"] = found["per_second"]
                place[f"of_direct_at_{row['clients']}"] = round(found["per_second"] / direct["per_second"], 3)
    summary[DIRECT] = {}
    for row in rows:
        if row["what"] == "latency":
            direct = row["ways"][DIRECT]
            summary[DIRECT][f"at_{row['kb']}_kb"] = {
                f"{part}_{name}": value for part in ("first", "whole") for name, value in direct[part].items()
            }
    return summary
