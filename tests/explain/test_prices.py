"""Prices are data: every row has a source and a date, a user's own table replaces them, and nothing is guessed."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from explain.corpus import ASKED, RULES, chat
from programmable_kv import InvalidRequestError, explain_miss
from programmable_kv.explain.prices import read_prices

OWN: dict[str, Any] = {
    "model": "some-model",
    "input": 4.0,
    "read": 1.0,
    "write": 5.0,
    "source": "ours",
    "date": "2026-11-01",
}


def table(tmp_path: Path, *rows: dict[str, Any], **other: Any) -> Path:
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({"currency": "EUR", "rows": list(rows), **other}))
    return path


def test_every_row_that_ships_is_dated_and_sourced() -> None:
    prices = read_prices()
    assert len(prices.rows) >= 8
    for row in prices.rows:
        assert date.fromisoformat(row.date) <= date(2026, 12, 31)
        assert "pric" in row.source
        assert 0.025 - 1e-9 <= row.read / row.input <= 0.1 + 1e-9, "a cached token costs a fortieth to a tenth"


@pytest.mark.parametrize(
    ("model", "tokens", "price"),
    [
        ("claude-sonnet-5-5", 10, 2),
        ("anthropic/claude-sonnet-5.5", 10, 2),
        ("claude-sonnet-5-5-20261007", 10, 2),
        ("claude-sonnet-4-5", 10, None),
        ("claude-haiku-5-5", 100_000, 0.10),
        ("claude-haiku-5-5", 100_001, 0.50),
        ("gpt-6.1-sol", 10, 2),
        ("gpt-6-sol", 300_000, None),
        ("gpt-6-solar", 10, None),
        ("", 10, None),
    ],
)
def test_a_model_finds_its_row_or_none(model: str, tokens: int, price: float | None) -> None:
    row = read_prices().price_of(model, tokens)
    assert (row.input if row else None) == price


def test_the_gpt_6_rows_are_told_apart() -> None:
    rows = [read_prices().price_of(name, 10) for name in ("gpt-6-sol", "gpt-6.1-sol")]
    assert [row.read for row in rows if row] == [0.20, 0.10]


def test_what_was_lost_is_what_was_paid_beyond_reading(tmp_path: Path) -> None:
    prices = read_prices(table(tmp_path, OWN))
    row = prices.price_of("some-model", 1)
    assert row is not None
    assert prices.lost(row, 1_000_000, 0) == pytest.approx(4 - 1)
    assert prices.lost(row, 1_000_000, 1_000_000) == pytest.approx(5 - 1), (
        "tokens that were written again cost the write"
    )
    assert prices.lost(row, 1_000_000, 400_000) == pytest.approx(0.4 * 5 + 0.6 * 4 - 1)


def usage(total: int, cached: int) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": total, "prompt_tokens_details": {"cached_tokens": cached}}}


def test_a_report_has_money_only_where_tokens_and_a_price_are_known(tmp_path: Path) -> None:
    bodies = [chat(f"Now: 2026-06-09 15:0{n}\n{RULES}", ASKED) for n in range(2)]
    counted = [{"request": body, "response": usage(1000, 0)} for body in bodies]
    own = table(tmp_path, OWN)
    report = explain_miss(*counted, prices=own)
    assert report.lost == 1000
    assert report.money == pytest.approx(1000 * 3 / 1e6)
    assert report.currency == "EUR"
    assert "EUR" in report.headline
    assert any("ours, 2026-11-01" in note for note in report.notes)
    without = explain_miss(*counted)
    assert without.money is None
    assert any("No price is known for some-model" in note for note in without.notes)
    assert explain_miss(*bodies, prices=own).money is None, "bytes have no price"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"date": "soon"}, "date is 'soon'"),
        ({"date": None}, "has no date"),
        ({"source": ""}, "has no source"),
        ({"input": "4"}, "input is '4'"),
        ({"read": None}, "read is None"),
        ({"write": -1}, "write is -1"),
        ({"cost": 1}, "has 'cost'; a row takes above_tokens"),
    ],
)
def test_a_table_that_lacks_something_is_refused(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match):
        read_prices(table(tmp_path, {**OWN, **change}))


def test_files_that_are_no_table_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    for text, match in (("{", "is not JSON"), ("[]", "no list of rows"), ('{"rows": [1]}', "row 1 has 'int'")):
        path.write_text(text)
        with pytest.raises(InvalidRequestError, match=match):
            read_prices(path)
    with pytest.raises(InvalidRequestError, match="cannot read"):
        read_prices(tmp_path / "none.json")
    with pytest.raises(InvalidRequestError, match="per_tokens is 0"):
        read_prices(table(tmp_path, OWN, per_tokens=0))
