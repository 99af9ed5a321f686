"""Misses that the texts do not explain: the upstream's numbers, the time and the settings explain them."""

from __future__ import annotations

from typing import Any

import pytest

from explain.corpus import ANSWERED, ASKED, ASKED_NEXT, RULES, chat, claude, marked
from programmable_kv import explain_miss


def anthropic(read: int, written: int, fresh: int = 0) -> dict[str, int]:
    return {"input_tokens": fresh, "cache_read_input_tokens": read, "cache_creation_input_tokens": written}


def log(
    *usages: dict[str, int], gap: float = 10, mark: bool = True, model: str = "claude-sonnet-5-5", **later: Any
) -> list[dict[str, Any]]:
    asked = marked(ASKED) if mark else ASKED
    bodies = [
        claude([RULES], asked),
        claude([RULES], asked, ANSWERED, marked(ASKED_NEXT) if mark else ASKED_NEXT, **later),
    ]
    return [
        {"request": {**body, "model": model}, "response": {"usage": usage}, "time": number * gap}
        for number, (body, usage) in enumerate(zip(bodies, usages, strict=True))
    ]


COLD, COLD_AGAIN = anthropic(0, 5000), anthropic(0, 5100)


@pytest.mark.parametrize(
    ("entries", "cause", "lost"),
    [
        (log(COLD, anthropic(5000, 100)), "appended", 0),
        (log(COLD, anthropic(2600, 2500)), "appended", 0),
        (log(COLD, COLD_AGAIN), "likely the server", 5000),
        (log(COLD, COLD_AGAIN, gap=301), "expired", 5000),
        (log(COLD, COLD_AGAIN, gap=301, model="some-model"), "likely the server", 5000),
        (log(COLD, COLD_AGAIN, tool_choice={"type": "any"}), "settings changed", 5000),
        (log(anthropic(0, 0, 5000), anthropic(0, 0, 5100), mark=False), "no cache_control", 5000),
        (log(anthropic(0, 0, 900), anthropic(0, 0, 1000)), "below the minimum", 0),
    ],
)
def test_what_the_text_does_not_explain(entries: list[dict[str, Any]], cause: str, lost: int) -> None:
    report = explain_miss(*entries)
    assert report.basis == "the upstream's own usage numbers"
    found = report.findings[1]
    assert (found.cause, found.lost) == (cause, lost)
    assert found.missed == (lost > 0)
    if lost:
        assert report.causes[0].place == "the whole request"


def test_the_upstream_has_the_last_word() -> None:
    """A difference without effect on the upstream's cache is no miss; a miss costs what the upstream did not read."""
    for cached, lost in ((5000, 0), (1000, 4000)):
        bodies = [claude([f"Time: 15:0{n}", RULES], ASKED) for n in range(2)]
        usages = (anthropic(0, 5000), anthropic(cached, 5000 - cached))
        report = explain_miss(*({"request": b, "usage": u} for b, u in zip(bodies, usages, strict=True)))
        assert report.findings[1].cause == "clock"
        assert report.findings[1].lost == lost
        assert report.findings[1].missed == (lost > 0)
        assert bool(report.causes) == (lost > 0)


def test_requests_without_usage_are_left_out_of_the_sums_and_told() -> None:
    counted = {
        "request": chat(RULES, ASKED),
        "usage": {"prompt_tokens": 50, "prompt_tokens_details": {"cached_tokens": 0}},
    }
    report = explain_miss(counted, chat(RULES, ASKED))
    assert report.unit == "tokens"
    assert report.total == 50
    assert report.findings[1].total is None
    assert any("1 of 2 requests have no usage numbers" in note for note in report.notes)
    few = explain_miss(counted, chat(RULES, ASKED), chat(RULES, ASKED))
    assert few.unit == "bytes"
    assert any("1 of 3 requests have" in note for note in few.notes)
    silent = explain_miss({"request": chat(RULES, ASKED), "usage": {"prompt_tokens": 50}})
    assert silent.unit == "bytes", "a count without cached tokens says nothing about a cache"
