"""The soak: its upstream finds prefixes and reads the last value, and a short run over a killed gateway loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from programmable_kv.bench.remembering_upstream import BLOCK, PrefixCache, answered, read_last
from programmable_kv.bench.soak import run, summarise


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


def test_what_decays_shows_in_the_summary() -> None:
    row = {"requests": 10, "wrong": 0, "repeated": 0, "kills": 0, "p50_ms": 1.0, "p99_ms": 2.0, "resident_mib": 50.0}
    rows = [{**row, "hit_rate": 1 - 0.1 * n, "resident_mib": 50.0 + 10 * n} for n in range(6)]
    summary = summarise(rows)
    assert summary["first_hit_rate"] == pytest.approx(0.95)
    assert summary["last_hit_rate"] == pytest.approx(0.55)
    assert summary["last_resident_mib"] - summary["first_resident_mib"] == pytest.approx(40)
