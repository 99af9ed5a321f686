"""The time that the gateway adds: sends the same requests directly to an upstream and through gateways, by turns.

The upstream, a gateway in each mode, LiteLLM's proxy if given, and the client are processes of one machine and share
its cores. The figures are differences and ratios within the run.

- Under arrivals (`serve_open`): the latency that many clients see, as the gateway knows more and more conversations. -
One request at a time: how the added time grows with the body. The observer, which works after each answer, finishes
before the next request. - Throughput: clients send requests without a pause, so it includes the observer's work.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from programmable_kv.bench.fixed_upstream import EVENTS, events
from programmable_kv.bench.http_client import Client, Timed
from programmable_kv.bench.serve_load import TURNS, conversation
from programmable_kv.bench.serve_open import CLIENTS as OPEN_CLIENTS
from programmable_kv.bench.serve_open import step
from programmable_kv.bench.serve_peers import LINES, gateway, litellm, litellm_version, upstream
from programmable_kv.bench.serve_ways import DIRECT, LITELLM, MODES, Way, checked_text, percentiles
from programmable_kv.records import Record, Recorder, digest_of

SIZES_KB = (8, 100, 450)
CLIENTS = (1, 8)
ROUNDS = 2
"""Turns that each way gets in the measurement of throughput at one size."""
SESSIONS = (10, 1000, 10_000)
PER_SECOND = 50.0
_WARM = TURNS
"""Requests on each way before any is timed."""


def run(
    path: Path,
    *,
    sizes_kb: Sequence[int] = SIZES_KB,
    sessions: Sequence[int] = SESSIONS,
    per_second: float = PER_SECOND,
    open_seconds: float = 10.0,
    requests: int = 150,
    seconds: float = 1.0,
    litellm_python: str | None = None,
    report: Callable[[int, int], None] | None = None,
    command: str = "",
) -> Record:
    """Measure latency under arrivals, latency and throughput at every body size, and memory, and write the record.

    Args:
        sizes_kb: sizes of the request bodies, in kilobytes.
        sessions: numbers of idle conversations, each with one request of the smallest size, that gateways know while
            requests arrive.
        per_second: requests of the smallest size that arrive per second.
        open_seconds: how long requests arrive on each way, for each of `sessions`.
        requests: requests on each way at each size, for the latency of one request at a time.
        seconds: how long each way is loaded in each of its `ROUNDS` turns, for the throughput.
        litellm_python: the Python of an environment with `litellm[proxy]`; None leaves LiteLLM out.

    Raises:
        RecordError: see `Recorder`.
        InvalidArgumentError: that environment has no LiteLLM.
        ConnectionError: an answer differs from the upstream's.
    """
    peer = litellm_version(litellm_python) if litellm_python is not None else ""
    recorder = Recorder(
        path,
        name="serve",
        version=2,
        title="What the gateway adds to a request: under arrivals, by sessions, by mode and by size of the body",
        command=command,
        model="no model: an upstream with fixed answers",
        model_fingerprint="none",
        data_digest=digest_of(texts(sizes_kb)),
        seeds=[0],
        settings={
            "sizes_kb": list(sizes_kb),
            "sessions": list(sessions),
            "per_second": per_second,
            "open_seconds": open_seconds,
            "open_clients": OPEN_CLIENTS,
            "requests": requests,
            "seconds": seconds,
            "rounds": ROUNDS,
            "clients": list(CLIENTS),
            "turns": TURNS,
            "events": EVENTS,
            "ways": [DIRECT, *MODES, *([LITELLM] if peer else [])],
            "litellm": peer,
        },
    )
    steps: list[tuple[dict[str, Any], Callable[[list[Way]], dict[str, Any]]]] = []
    small = conversation(1000 * min(sizes_kb))
    for count in sorted(sessions):
        arriving = partial(step, bodies=small, sessions=count, per_second=per_second, seconds=open_seconds)
        without = () if count == min(sessions) else (LITELLM,)  # it stores no conversations: once is enough
        steps.append(({"what": "arrivals", "sessions": count}, partial(_on, arriving, without)))
    for kb in sizes_kb:
        bodies = conversation(1000 * kb)
        steps.append(({"what": "latency", "kb": kb}, partial(latency, bodies=bodies, requests=requests)))
        for clients in CLIENTS:
            key = {"what": "throughput", "kb": kb, "clients": clients}
            steps.append((key, partial(throughput, bodies=bodies, clients=clients, seconds=seconds)))
    with tempfile.TemporaryDirectory() as name, ExitStack() as peers:
        folder = Path(name)
        server = peers.enter_context(upstream(folder))
        ways = [Way(DIRECT, server)]
        ways += [Way(mode, peers.enter_context(gateway(mode, server.port, folder, more=LINES))) for mode in MODES]
        if litellm_python is not None:
            ways.append(Way(LITELLM, peers.enter_context(litellm(litellm_python, server.port, folder)), checked_text))
        for number, (key, measure) in enumerate(steps, start=1):
            if not recorder.done(**key):
                recorder.add({**key, "ways": measure(ways)})
            if report is not None:
                report(number, len(steps))
    return recorder.finish(
        summarise(recorder.rows),
        ["Upstream, gateways and client shared one machine with other work: compare within this record only."],
    )


def _on(measure: Callable[[list[Way]], dict[str, Any]], without: Sequence[str], ways: list[Way]) -> dict[str, Any]:
    """Measure all ways except those in `without`."""
    return measure([way for way in ways if way.name not in without])


def steps_of(sizes_kb: Sequence[int], sessions: Sequence[int]) -> int:
    """How many times `run` reports progress."""
    return len(sessions) + len(sizes_kb) * (1 + len(CLIENTS))


def texts(sizes_kb: Sequence[int]) -> Iterator[str]:
    """The text of all request bodies and of the answer."""
    for kb in sizes_kb:
        yield from (body.decode() for body in conversation(1000 * kb))
    yield b"".join(events()).decode()


def latency(ways: Sequence[Way], bodies: Sequence[bytes], requests: int) -> dict[str, Any]:
    """For every way, by turns: percentiles of the milliseconds of one request at a time, and the gateways' actions."""
    sent = {way.name: way.requests(bodies) for way in ways}
    times: dict[str, list[Timed]] = {way.name: [] for way in ways}
    with ExitStack() as open_clients:
        clients = {way.name: open_clients.enter_context(Client(way.peer.port)) for way in ways}
        for number in range(_WARM + requests):
            for way in (*ways[number % len(ways) :], *ways[: number % len(ways)]):
                answer = way.check(clients[way.name].ask(*next(sent[way.name])))
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


def throughput(ways: Sequence[Way], bodies: Sequence[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """For every way: requests answered per second to clients that ask without a pause, and requests not observed."""
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
    return way.peer.metric("pkv_observer_dropped") if way.ours else 0.0


def _load(way: Way, bodies: Sequence[bytes], clients: int, seconds: float) -> tuple[int, float]:
    """The number of answered requests, and the seconds until the last answer."""
    counts = [0] * clients
    faults: list[BaseException] = []
    began = time.perf_counter()
    end = began + seconds

    def work(place: int) -> None:
        try:
            with Client(way.peer.port) as client:
                for body, session in way.requests(bodies):
                    way.check(client.ask(body, session))
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


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For each way: percentiles, the time added to the direct way's, the share of the direct way's throughput, and the
    memory of a session."""
    summary: dict[str, dict[str, Any]] = {}
    for row in rows:
        where = f"open_{row['sessions']}" if row["what"] == "arrivals" else f"at_{row['kb']}_kb"
        direct = row["ways"][DIRECT]
        for way, found in row["ways"].items():
            whole = summary.setdefault(way, {})
            place = whole.setdefault(where, {})
            if row["what"] == "throughput":
                place[f"per_second_at_{row['clients']}"] = found["per_second"]
                place[f"of_direct_at_{row['clients']}"] = round(found["per_second"] / direct["per_second"], 3)
                continue
            for part in ("first", "whole"):
                place |= {f"{part}_{name}": value for name, value in found[part].items()}
                if way != DIRECT:
                    added = {name: round(value - direct[part][name], 3) for name, value in found[part].items()}
                    place |= {f"added_{part}_{name}": value for name, value in added.items()}
            if row["what"] == "latency":
                if way in MODES:
                    place["own_p50_ms"] = found["own"]["p50_ms"]
                    place["rewritten"] = found["actions"].get("erratum", 0) + found["actions"].get("replayed", 0)
                continue
            place |= {"requests": found["requests"], "errors": found["errors"]}
            if found.get("session_bytes") is not None:
                whole["session_kb"] = round(found["session_bytes"] / 1000, 2)  # of the last, largest number of sessions
    for found in summary.values():
        opened = [each for name, each in found.items() if name.startswith("open_")]
        if len(opened) > 1 and "added_first_p50_ms" in opened[0]:
            first, last = (each["added_first_p50_ms"] for each in (opened[0], opened[-1]))
            found["growth_first_p50_ms"] = round(last - first, 3)
    return summary
