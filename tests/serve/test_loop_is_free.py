"""Slow work does not block the event loop: long bodies of a server's own routes, and calls that wait for the disk."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import threading
from pathlib import Path
from typing import Any

import httpx2
import pytest

from programmable_kv.serve import endpoint
from programmable_kv.serve.aside import Aside
from programmable_kv.serve.reading import LONG_BODY, collector_paused, json_of
from programmable_kv.serve.settings import GatewaySettings
from programmable_kv.serve.state import FileState
from serve.http_peers import running


def test_while_a_file_waits_for_the_disk_the_loop_goes_on(tmp_path: Path) -> None:
    """A call that needs the state waits in a thread, while the loop goes on."""
    state = FileState(tmp_path / "state.sqlite", durable=False)
    aside = Aside(state)
    begun, end = threading.Event(), threading.Event()

    def write() -> None:
        with state.write(durable=True):
            begun.set()
            end.wait(10)

    async def work() -> bool:
        assert not aside.waits
        writing = threading.Thread(target=write)
        writing.start()
        begun.wait(10)
        assert aside.waits
        asked = asyncio.ensure_future(aside.run(state.rows, "SELECT count(*) FROM conversations"))
        await asyncio.sleep(0.05)
        waited = not asked.done()
        end.set()
        assert await asked == [(0,)]
        writing.join()
        assert not aside.waits
        return waited

    try:
        assert asyncio.run(work()), "the loop went on, and the call waited"
    finally:
        end.set()
        state.close()


def test_a_state_whose_long_work_fails_is_free_again(tmp_path: Path) -> None:
    state = FileState(tmp_path / "state.sqlite", durable=False)
    with pytest.raises(sqlite3.OperationalError), state.write(durable=True) as run:
        run.execute("no statement")
    assert not state.busy
    state.scrub()
    assert not state.busy
    state.close()


@pytest.mark.parametrize("long", [False, True])
def test_long_bodies_are_read_beside_the_loop(long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def read(data: bytes) -> Any:
        threads.append(threading.current_thread().name)
        return json_of(data)

    monkeypatch.setattr(endpoint, "json_of", read)
    body = b'{"messages": [], "x": "%b"}' % (b"x" * LONG_BODY * long)
    with running(GatewaySettings("http://127.0.0.1:9", port=0)) as front:
        got = httpx2.post(f"{front.url}/v1/notebooks", content=body)
        assert got.json()["error"]["code"] == "invalid_request"
        assert [name == front.thread.name for name in threads] == [not long]


def test_the_collector_goes_on_after_a_pause() -> None:
    assert gc.isenabled()
    with collector_paused():
        assert not gc.isenabled()
    with pytest.raises(ValueError, match="Expecting"):
        json_of(b"{")
    assert gc.isenabled()
    gc.disable()
    try:
        json_of(b"{}")
        assert not gc.isenabled(), "who turned it off wants it off"
    finally:
        gc.enable()


def test_the_last_of_several_readers_lets_the_collector_go_on() -> None:
    first, second = collector_paused(), collector_paused()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled(), "the second still reads"
    second.__exit__(None, None, None)
    assert gc.isenabled()


def test_the_collector_looks_at_nothing_while_a_body_is_read() -> None:
    looks: list[str] = []

    def look(phase: str, _: dict[str, int]) -> None:
        looks.append(phase)

    gc.callbacks.append(look)
    try:
        json_of(b"[" + b"[]," * 100_000 + b"[]]")
    finally:
        gc.callbacks.remove(look)
    assert len(looks) <= 2, "one at the end at most, when it goes on"
