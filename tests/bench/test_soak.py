"""The soak: its upstream finds prefixes and reads the last value; a short run with a killed gateway loses nothing."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from programmable_kv.bench.database_server import ABSENT, programs
from programmable_kv.bench.remembering_upstream import BLOCK, PrefixCache, answered, read_last
from programmable_kv.bench.serve_peers import Peer
from programmable_kv.bench.soak import run, summarise
from programmable_kv.bench.soak_clients import Editor
from programmable_kv.errors import InvalidArgumentError
from serve.http_peers import answer, listening, wait_until


def test_the_upstream_finds_what_two_prompts_begin_with() -> None:
    cache = PrefixCache()
    text = "".join(f"{number:04}" for number in range(4 * BLOCK))
    assert cache.read(text) == (16, 0)
    assert cache.read(text) == (16, 16)
    assert cache.read(text[: 8 * BLOCK] + "x" + text[8 * BLOCK :]) == (16, 8)
    assert cache.read("x" + text) == (16, 0)


def test_the_upstream_forgets_what_was_used_least() -> None:
    cache = PrefixCache(capacity=4)
    first, second = "a" * 4 * BLOCK, "b" * 4 * BLOCK
    cache.read(first)
    assert cache.read(first) == (4, 4)
    cache.read(second)
    assert cache.read(first) == (4, 0)


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("Now: 10:01:02\nrules", "10:01:02"),
        ('Now: 10:01:02\nrules\n[state 12ab] "the time": "10:05:00".', "10:05:00"),
        ('[state 12ab] "the time": "10:05:00".\n[state 12ab] "the time": "10:04:00".', "10:04:00"),
        ('Now: 10:01:02\nrules\n[state 12ab] "now": "10:05:00".', "10:05:00"),
        ("no time", ""),
    ],
)
def test_the_upstream_says_the_time_that_it_reads_last(text: str, time: str) -> None:
    assert read_last(text) == time
    body: Any = {"messages": [{"role": "system", "content": text}, {"role": "user", "content": "?"}]}
    reply = json.loads(answered(PrefixCache(), body).partition(b"\r\n\r\n")[2])
    assert reply["choices"][0]["message"]["content"] == time


@pytest.mark.slow
def test_a_killed_gateway_loses_no_value(tmp_path: Path) -> None:
    record = run(tmp_path / "soak.json", minutes=0.15, stretches=2, clients=3, per_second=12, kills=1, rebase_after=3)
    first, second = record.rows
    assert first["kills"] + second["kills"] == 1
    assert first["repeated"] + second["repeated"] > 0, "the clients noticed"
    assert record.figure("wrong") == 0
    assert record.figure("requests") > 20
    assert any(action.startswith("rebase") for row in record.rows for action in row["actions"])
    assert record.figure("hit_rate") > 0.8


@pytest.mark.slow
@pytest.mark.xdist_group("postgres")
def test_a_killed_database_loses_no_acknowledged_edit(tmp_path: Path) -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed: it is in the extra `dev`")

    if programs() is None:
        pytest.skip(ABSENT)
    record = run(
        tmp_path / "soak.json", minutes=0.2, stretches=1, clients=2, per_second=8, kills=1, gateways=2, editors=2,
        database_kills=1, rebase_after=3,
    )  # fmt: skip
    [row] = record.rows
    assert (row["kills"], row["database_kills"]) == (1, 1)
    assert any("the state cannot be reached" in action for action in row["actions"]), "the database was away"
    assert record.figure("edits") >= 4
    assert (record.figure("lost"), record.figure("wrong")) == (0, 0)


class Keeper:
    """A gateway that keeps notebooks as it likes."""

    def __init__(self, kept: Callable[[int, str], tuple[int, str]]) -> None:
        self.kept, self.version, self.value = kept, 1, "00:00:00"
        self.asked = threading.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        body = json.loads(await reader.readexactly(length) or b"{}")
        if head.startswith(b"PATCH"):
            self.version, self.value = self.version + 1, body["now"]
        told = {"id": "nb_1", "version": self.version, "fields": {"now": self.value}}
        if head.startswith(b"PATCH"):
            self.version, self.value = self.kept(self.version, self.value)
        if b"/chat/" in head:
            self.asked.set()
            choice = {"message": {"content": "03:03:03"}}
            told = {"choices": [choice], "usage": {"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 0}}}
        writer.write(answer(json.dumps(told).encode()))
        await writer.drain()
        writer.close()


@pytest.mark.parametrize(
    ("kept", "lost"),
    [
        (lambda version, value: (version, value), 0),
        (lambda version, _: (version - 1, "00:00:00"), 1),
        (lambda version, _: (version, "00:00:00"), 1),
    ],
)
def test_an_editor_sees_a_lost_edit_and_a_wrong_answer(kept: Any, lost: int) -> None:
    keeper, stopped = Keeper(kept), threading.Event()

    class Served:
        peers: Sequence[Peer] = ()

    with listening(keeper.serve) as port:
        Served.peers = [Peer(port, 0)]
        editor = Editor(Served(), "rules", 0, 60, stopped)
        editor.start()
        wait_until(lambda: keeper.asked.wait(0.01) and editor._seen.wrong == 1)
        stopped.set()
        editor.join(10)
    seen = editor.taken()
    assert (seen.edits, seen.lost, seen.wrong) == (1, lost, 1)


def test_a_database_that_is_not_the_run_s_own_is_not_killed(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="a database of its own"):
        run(tmp_path / "soak.json", state="postgresql://user@10.0.0.1/pkv", database_kills=1)
    with pytest.raises(InvalidArgumentError, match="need a shared database"):
        run(tmp_path / "soak.json", gateways=2)


def test_what_decays_shows_in_the_summary() -> None:
    counts = dict.fromkeys(("wrong", "repeated", "kills", "database_kills", "edits", "lost"), 0)
    row = {"requests": 10, **counts, "p50_ms": 1.0, "p99_ms": 2.0}
    rows = [{**row, "hit_rate": 1 - 0.1 * n, "resident_mib": 50.0 + 10 * n} for n in range(6)]
    summary = summarise(rows)
    assert summary["first_hit_rate"] == pytest.approx(0.95)
    assert summary["last_hit_rate"] == pytest.approx(0.55)
    assert summary["last_resident_mib"] - summary["first_resident_mib"] == pytest.approx(40)
