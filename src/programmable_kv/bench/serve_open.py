"""The gateway's bench under arrivals that do not wait for answers, as the gateway knows more and more conversations.

A request's time counts from when the request was due, not from when it was sent, so waiting behind a slow answer
counts.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

from programmable_kv.bench.http_client import Client, Timed
from programmable_kv.bench.serve_ways import Way, percentiles

CLIENTS = 8
"""Number of clients, each with its own connection and conversation. A free client takes the next arrival."""
BLOCK_S = 2.0
"""Seconds for which one way gets requests before the next way's turn."""
_AT_ONCE = 200
"""Number of idle conversations opened before waiting for the observer."""


def arrivals(per_second: float, seconds: float, seed: int) -> list[float]:
    """Arrival times in seconds from the start, from a Poisson process."""
    draw = random.Random(seed)
    found: list[float] = []
    at = draw.expovariate(per_second)
    while at < seconds:
        found.append(at)
        at += draw.expovariate(per_second)
    return found


def open_loop(ways: Sequence[Way], bodies: Sequence[bytes], per_second: float, seconds: float) -> dict[str, Any]:
    """For every way: percentiles under arrivals, and errors. Ways take turns; in a round all get the same arrivals."""
    found: dict[str, _Asked] = {way.name: _Asked() for way in ways}
    for number in range(max(1, round(seconds / BLOCK_S))):
        due = arrivals(per_second, min(BLOCK_S, seconds), seed=number)
        first = number % len(ways)
        for way in (*ways[first:], *ways[:first]):
            _block(way, bodies, due, found[way.name])
            way.wait_until_quiet()
    return {name: asked.summary() for name, asked in found.items()}


class _Asked:
    """The answers and errors on one way. Several threads add to it."""

    def __init__(self) -> None:
        self.answers: list[Timed] = []
        self.errors: list[str] = []

    def summary(self) -> dict[str, Any]:
        if len(self.answers) < 2:
            raise ConnectionError(f"fewer than 2 requests were answered: {self.errors[:1]}")
        return {
            "first": percentiles([answer.first_ms for answer in self.answers]),
            "whole": percentiles([answer.whole_ms for answer in self.answers]),
            "requests": len(self.answers) + len(self.errors),
            "errors": len(self.errors),
            "error": self.errors[0] if self.errors else "",
        }


def _block(way: Way, bodies: Sequence[bytes], due: Sequence[float], asked: _Asked) -> None:
    """Send one round of arrivals.

    Each client first opens its connection with an uncounted request, since real clients keep their connections open.
    """
    lock = threading.Lock()
    places = iter(due)
    ready = threading.Barrier(CLIENTS + 1)
    start = [0.0]

    def work() -> None:
        requests = way.requests(bodies)
        with Client(way.peer.port) as client:
            try:
                way.check(client.ask(*next(requests)))
            finally:
                ready.wait()
                ready.wait()
            while True:
                with lock:
                    at = next(places, None)
                if at is None:
                    return
                at += start[0]
                time.sleep(max(0.0, at - time.perf_counter()))
                try:
                    asked.answers.append(way.check(client.ask(*next(requests), due=at)))
                except OSError as error:
                    asked.errors.append(f"{type(error).__name__}: {error}"[:300])
                    client.close()

    def quietly() -> None:
        try:
            work()
        except OSError as error:
            asked.errors.append(f"{type(error).__name__}: {error}"[:300])

    threads = [threading.Thread(target=quietly) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    ready.wait()
    way.wait_until_quiet()
    start[0] = time.perf_counter()
    ready.wait()
    for thread in threads:
        thread.join()


def open_sessions(ways: Sequence[Way], body: bytes, sessions: int) -> dict[str, Any]:
    """Open idle conversations of one request on all our gateways in parallel, until each has `sessions` of them.

    Returns:
        For each gateway: the bytes by which its process grew per conversation (None if the system does not say), the
        size of the body, and the number of conversations that the gateway reports.

    Raises:
        ConnectionError: a request failed.
    """
    found: dict[str, Any] = {}
    faults: list[OSError] = []

    def work(way: Way) -> None:
        count = max(0, sessions - way.idle)
        try:
            before = way.peer.resident_bytes
            with Client(way.peer.port) as client:
                requests = (next(way.requests([body])) for _ in range(count))
                for lot in _lots(requests):
                    for each, session in lot:
                        way.check(client.ask(each, session))
                    way.wait_until_quiet()
            after = way.peer.resident_bytes
            way.idle += count
            grown = None if before is None or after is None or not count else round((after - before) / count)
            known = way.peer.metric("pkv_conversations") or way.peer.metric("pkv_observer_sessions")
            found[way.name] = {"session_bytes": grown, "body_bytes": len(body), "known": round(known)}
        except OSError as error:
            faults.append(error)

    with ExitStack() as stack:
        for way in ways:
            if way.ours:
                thread = threading.Thread(target=work, args=(way,))
                thread.start()
                stack.callback(thread.join)
    if faults:
        raise faults[0]
    return found


def _lots(requests: Iterator[tuple[bytes, str]]) -> Iterator[list[tuple[bytes, str]]]:
    while lot := list(islice(requests, _AT_ONCE)):
        yield lot


def step(
    ways: Sequence[Way], bodies: Sequence[bytes], *, sessions: int, per_second: float, seconds: float
) -> dict[str, Any]:
    """Open idle conversations up to `sessions`, and measure the latency under arrivals."""
    idle = open_sessions(ways, bodies[0], sessions)
    found = open_loop(ways, bodies, per_second, seconds)
    return {name: {**each, **idle.get(name, {})} for name, each in found.items()}
