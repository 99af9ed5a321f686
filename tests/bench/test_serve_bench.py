"""The gateway's bench: its peers, its load, its sums, and a slice of it."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from programmable_kv.bench import serve
from programmable_kv.bench.fixed_upstream import EVENTS, events
from programmable_kv.bench.http_client import Client, Timed
from programmable_kv.bench.serve_load import TURNS, conversation
from programmable_kv.bench.serve_peers import Peer, gateway, upstream
from programmable_kv.records import read_record

ANSWER = b"".join(events())


@contextmanager
def answering(data: bytes) -> Iterator[int]:
    """A server that answers its first request with these bytes, and closes the connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(data)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        thread.join(10)


@pytest.mark.parametrize("kb", [8, 100, 450])
def test_bodies_have_about_their_size_and_go_on_with_a_conversation(kb: int) -> None:
    bodies = conversation(1000 * kb)
    assert len(bodies) == TURNS
    assert all(0.9 * 1000 * kb < len(body) < 1.15 * 1000 * kb for body in bodies), [len(body) for body in bodies]
    messages = [json.loads(body)["messages"] for body in bodies]
    for before, after in pairwise(messages):
        assert after[1 : len(before)] == before[1:]
        assert after[0]["content"].partition("\n")[0] != before[0]["content"].partition("\n")[0], "the clock moves on"
        assert after[0]["content"].partition("\n")[2] == before[0]["content"].partition("\n")[2]
    for each in messages:
        roles = [message["role"] for message in each[1:]]
        assert roles == [("user", "assistant")[number % 2] for number in range(len(roles))]
        assert roles[-1] == "user"


def test_the_upstream_streams_its_events_over_one_connection(tmp_path: Path) -> None:
    with upstream(tmp_path) as peer, Client(peer.port) as client:
        answers = [client.ask(body, "one") for body in (b"{}", b"x" * 10**6)]
    assert [answer.body for answer in answers] == [ANSWER, ANSWER]
    assert ANSWER.count(b"data: ") == EVENTS
    assert all(0 < answer.first_ms <= answer.whole_ms for answer in answers)
    assert answers[0].header("content-type") == "text/event-stream; charset=utf-8"
    assert answers[0].header("x-pkv-action") == ""


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 2\r\n\r\nno", "answered"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhal", "closed"),
        (b"", "closed"),
    ],
)
def test_an_answer_that_is_none_ends_the_bench(data: bytes, why: str) -> None:
    with answering(data) as port, Client(port) as client, pytest.raises(ConnectionError, match=why):
        client.ask(b"{}", "one")


def test_an_answer_that_is_not_the_upstreams_ends_the_bench() -> None:
    with answering(b"HTTP/1.1 200 OK\r\n\r\n2\r\nno\r\n0\r\n\r\n") as port, Client(port) as client:
        answer = client.ask(b"{}", "one")
    assert answer.body == b"no"
    with pytest.raises(ConnectionError, match="differs"):
        serve.checked(answer)
    serve.checked(Timed(1.0, 2.0, b"", ANSWER))


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="--mode is one of"), gateway("none", 1, tmp_path):
        pass


def test_memory_of_a_process() -> None:
    here = Peer(0, os.getpid()).resident_bytes
    assert here is None or here > 10 * 2**20
    assert Peer(0, 2**30).resident_bytes is None


def test_memory_that_is_not_known_is_no_figure() -> None:
    unknown = {"session_bytes": None, "body_bytes": 8000}
    summary = serve.summarise([{"what": "memory", "ways": dict.fromkeys(serve.MODES, unknown)}])
    assert summary["pass"] == {}


def test_percentiles() -> None:
    found = serve.percentiles([float(number) for number in range(101)])
    assert found == {"p50_ms": 50.0, "p99_ms": 99.0}


def test_the_summary_subtracts_the_direct_way() -> None:
    def way(first: float, per_second: float) -> dict[str, object]:
        times = {"p50_ms": first, "p99_ms": 2 * first}
        actions = {"erratum": 5, "announced": 1}
        own = {"p50_ms": 0.1, "p99_ms": 0.2}
        return {"first": times, "whole": times, "own": own, "actions": actions, "per_second": per_second}

    ways = {"direct": way(1.0, 100.0), **{mode: way(3.0, 25.0) for mode in serve.MODES}}
    rows = [
        {"what": "latency", "kb": 8, "ways": ways},
        {"what": "throughput", "kb": 8, "clients": 1, "ways": ways},
    ]
    summary = serve.summarise(rows)
    assert summary["pass"]["at_8_kb"] == {
        "added_first_p50_ms": 2.0, "added_first_p99_ms": 4.0, "added_whole_p50_ms": 2.0, "added_whole_p99_ms": 4.0,
        "own_p50_ms": 0.1, "rewritten": 5, "per_second_at_1": 25.0, "of_direct_at_1": 0.25,
    }  # fmt: skip
    assert summary["direct"]["at_8_kb"]["first_p99_ms"] == 2.0


@pytest.mark.slow
def test_a_slice_of_the_bench(tmp_path: Path) -> None:
    """Every way is measured, and only the gateway that rewrites rewrites. No time is asserted."""
    steps: list[tuple[int, int]] = []
    path = tmp_path / "serve.json"
    run = serve.run(
        path, sizes_kb=[8], requests=8, seconds=0.1, sessions=20, report=lambda done, all: steps.append((done, all))
    )
    assert read_record(path) == run
    assert steps[-1] == (serve.steps_of([8]), serve.steps_of([8]))
    latency, alone, eight = run.rows[1:]
    assert set(latency["ways"]) == {"direct", *serve.MODES}
    assert {name: way["actions"] for name, way in latency["ways"].items()} == {
        "direct": {},
        "pass": {},
        "observe": {},
        "erratum": {"announced": 1, "erratum": 7},
    }
    for row in (alone, eight):
        assert all(way["requests"] >= row["clients"] and way["per_second"] > 0 for way in row["ways"].values())
    assert run.figure("erratum.at_8_kb.rewritten") == 7
    assert set(run.rows[0]["ways"]) == set(serve.MODES)
