"""The bench of the gateway: its peers, its load, its sums, and a short run."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from programmable_kv.bench import serve, serve_open
from programmable_kv.bench.fixed_upstream import EVENTS, events, said_in
from programmable_kv.bench.http_client import Client, Timed
from programmable_kv.bench.serve_load import TURNS, conversation
from programmable_kv.bench.serve_peers import Peer, gateway, litellm_version, upstream
from programmable_kv.bench.serve_ways import DIRECT, LITELLM, MODES, Way, checked, checked_text, percentiles
from programmable_kv.errors import InvalidArgumentError
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
        checked(answer)
    checked(Timed(1.0, 2.0, b"", ANSWER))


def test_a_proxy_that_writes_answers_anew_is_held_to_their_text() -> None:
    spaced = ANSWER.replace(b'"object"', b'"added": 1, "object"')
    checked_text(Timed(1.0, 2.0, b"", spaced))
    parts = ANSWER.split(b"\n\n")
    for other in (
        b"",
        ANSWER[:-8],
        ANSWER.replace(b"words", b"works", 1),
        b"\n\n".join(parts[1:]),
        b"data: {}\n\ndata: [DONE]",
    ):
        with pytest.raises(ConnectionError, match="text differs"):
            checked_text(Timed(1.0, 2.0, b"", other))


def test_the_answer_is_a_stream_that_a_client_reads() -> None:
    chunks = [json.loads(line.removeprefix("data: ")) for line in ANSWER.decode().splitlines() if "{" in line]
    assert len(chunks) == EVENTS - 1
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (EVENTS - 2) + ["stop"]
    assert said_in(ANSWER) == "a few words " * (EVENTS - 2)


def test_an_environment_without_litellm_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="has no LiteLLM"):
        litellm_version(str(tmp_path / "python"))


def test_arrivals_are_a_poisson_process_that_is_the_same_again() -> None:
    found = serve_open.arrivals(50, 100, seed=3)
    assert found == serve_open.arrivals(50, 100, seed=3) != serve_open.arrivals(50, 100, seed=4)
    assert found == sorted(found)
    assert 0 < found[0] < found[-1] < 100
    assert 4700 < len(found) < 5300  # 5000 plus or minus four times its square root
    gaps = [after - before for before, after in pairwise(found)]
    assert 0.9 < len(gaps) * sum(gap * gap for gap in gaps) / sum(gaps) ** 2 / 2 < 1.1, "even ones would give a half"


@contextmanager
def pausing(seconds: float) -> Iterator[int]:
    """An upstream that answers requests after a pause, one at a time over all connections."""
    one = threading.Lock()
    answer_bytes = (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"%x\r\n" % len(ANSWER) + ANSWER + b"\r\n0\r\n\r\n"
    )

    def serve_one(connection: socket.socket) -> None:
        with connection:
            while connection.recv(2**16):
                with one:
                    time.sleep(seconds)
                connection.sendall(answer_bytes)

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=serve_one, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def test_what_waits_behind_a_slow_answer_counts_as_slow() -> None:
    """Twice as many requests arrive as are answered, so requests wait; sending one at a time would hide that."""
    with pausing(0.05) as port:
        way = Way(DIRECT, Peer(port, os.getpid()))
        with Client(port) as client:
            alone = checked(client.ask(b"{}", "s")).first_ms
        found = serve_open.open_loop([way], [b"{}"], per_second=40, seconds=1.0)[DIRECT]
    assert found["errors"] == 0
    assert found["requests"] == len(serve_open.arrivals(40, 1.0, seed=0))
    assert alone < 200
    assert found["first"]["p90_ms"] > 400, "the last ones wait for about as long as the first ones are late"


def test_errors_under_arrivals_are_counted() -> None:
    way = Way(DIRECT, Peer(0, os.getpid()), lambda answer: checked(Timed(1.0, 2.0, b"", b"no")))
    with pausing(0.0) as port:
        way.peer = Peer(port, os.getpid())
        with pytest.raises(ConnectionError, match=r"fewer than 2 requests were answered.*differs"):
            serve_open.open_loop([way], [b"{}"], per_second=20, seconds=0.5)


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="--mode is one of"), gateway("none", 1, tmp_path):
        pass


def test_memory_of_a_process() -> None:
    here = Peer(0, os.getpid()).resident_bytes
    assert here is None or here > 10 * 2**20
    assert Peer(0, 2**30).resident_bytes is None


def test_percentiles() -> None:
    found = percentiles([float(number) for number in range(101)])
    assert found == {"p50_ms": 50.0, "p90_ms": 90.0, "p99_ms": 99.0}


def times(first: float) -> dict[str, float]:
    return {"p50_ms": first, "p90_ms": 1.5 * first, "p99_ms": 2 * first}


def test_the_summary_subtracts_the_direct_way() -> None:
    def way(first: float, per_second: float) -> dict[str, object]:
        found = {
            "first": times(first),
            "whole": times(first),
            "own": times(0.1),
            "actions": {"erratum": 5, "announced": 1},
        }
        return {**found, "per_second": per_second}

    ways = {DIRECT: way(1.0, 100.0), **{mode: way(3.0, 25.0) for mode in (*MODES, LITELLM)}}
    rows = [{"what": "latency", "kb": 8, "ways": ways}, {"what": "throughput", "kb": 8, "clients": 1, "ways": ways}]
    summary = serve.summarise(rows)
    added = {f"added_{part}_{name}": 2 * value for part in ("first", "whole") for name, value in times(1.0).items()}
    found = {f"{part}_{name}": value for part in ("first", "whole") for name, value in times(3.0).items()}
    rates = {"per_second_at_1": 25.0, "of_direct_at_1": 0.25}
    assert summary["pass"]["at_8_kb"] == {**found, **added, **rates, "own_p50_ms": 0.1, "rewritten": 5}
    assert summary[LITELLM]["at_8_kb"] == {**found, **added, **rates}
    assert summary[DIRECT]["at_8_kb"]["first_p99_ms"] == 2.0
    assert not any(name.startswith("added") for name in summary[DIRECT]["at_8_kb"])


def test_the_summary_says_what_sessions_cost() -> None:
    def way(first: float, grown: int | None) -> dict[str, object]:
        return {"first": times(first), "whole": times(first), "requests": 9, "errors": 1, "session_bytes": grown}

    rows = [
        {"what": "arrivals", "sessions": 10, "ways": {DIRECT: way(1.0, None), "pass": way(3.0, 90_000)}},
        {"what": "arrivals", "sessions": 1000, "ways": {DIRECT: way(2.0, None), "pass": way(4.5, 12_345)}},
    ]
    summary = serve.summarise(rows)
    assert summary["pass"]["session_kb"] == 12.35, "of the conversations that were opened last, which are the most"
    assert summary["pass"]["growth_first_p50_ms"] == 0.5
    assert summary["pass"]["open_1000"]["errors"] == 1
    assert "session_kb" not in summary[DIRECT]


@pytest.mark.slow
def test_a_slice_of_the_bench(tmp_path: Path) -> None:
    """Every way is measured, the gateways know their conversations, and only one rewrites. No time is asserted."""
    steps: list[tuple[int, int]] = []
    path = tmp_path / "serve.json"
    run = serve.run(
        path, sizes_kb=[8], sessions=[2, 20], per_second=20, open_seconds=0.5, requests=8, seconds=0.1,
        report=lambda done, all: steps.append((done, all)),
    )  # fmt: skip
    assert read_record(path) == run
    assert steps[-1] == (serve.steps_of([8], [2, 20]), serve.steps_of([8], [2, 20]))
    few, many, latency, alone, eight = run.rows
    for row, sessions in ((few, 2), (many, 20)):
        assert set(row["ways"]) == {DIRECT, *MODES}
        for way in row["ways"].values():
            assert (way["requests"], way["errors"]) == (len(serve_open.arrivals(20, 0.5, seed=0)), 0)
        for mode in ("observe", "erratum"):
            assert sessions <= row["ways"][mode]["known"] <= sessions + 2 * serve_open.CLIENTS
    assert {name: way["actions"] for name, way in latency["ways"].items()} == {
        "direct": {},
        "pass": {},
        "observe": {},
        "erratum": {"announced": 1, "erratum": 7},
    }
    for row in (alone, eight):
        assert all(way["requests"] >= row["clients"] and way["per_second"] > 0 for way in row["ways"].values())
    assert run.figure("erratum.at_8_kb.rewritten") == 7
    assert run.settings["litellm"] == ""
