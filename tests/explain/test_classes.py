"""Every class of causes is recognised in the shapes that clients really send, and quiet logs stay quiet."""

from __future__ import annotations

from typing import Any

import pytest

from explain.corpus import ASKED, QUIET, RULES, SHAPES, Shape, chat
from programmable_kv import explain_miss
from programmable_kv.explain.classes import CLASSES

WITHOUT_SHAPE = {
    "unknown (hashes only)": "test_traces.py",
    "message inserted": "below",
    "history compacted": "below",
}
"""classes whose witness is not a row of the corpus, and where it is"""


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_shape_is_recognised(shape: Shape) -> None:
    report = explain_miss(*shape.log)
    found = report.findings[-1]
    assert found.cause == shape.cause, f"{found.before!r} -> {found.after!r}"
    assert found.place == shape.place
    assert found.missed, "each shape costs something"
    assert found.compared_with == len(shape.log) - 1
    assert found.lost is not None
    assert found.hit is not None
    assert found.total is not None
    assert 0 < found.lost <= found.total - found.hit
    [cause] = report.causes
    assert cause.fix, "a cause without a fix helps nobody"
    if shape.behind:
        assert any(each.startswith(shape.behind) for each in found.behind), found.behind


@pytest.mark.parametrize(("log", "cause"), [row[1:] for row in QUIET], ids=[row[0] for row in QUIET])
def test_a_quiet_log_stays_quiet(log: tuple[dict[str, Any], ...], cause: str) -> None:
    report = explain_miss(*log)
    assert report.findings[-1].cause == cause
    assert report.lost == 0
    assert not report.causes


def test_all_seventeen_shapes_are_there() -> None:
    assert {shape.number for shape in SHAPES} - {0} == set(range(1, 18))


def test_every_class_has_a_witness() -> None:
    witnessed = {shape.cause for shape in SHAPES} | {row[2] for row in QUIET} | set(WITHOUT_SHAPE)
    assert {row.name for row in CLASSES} == witnessed
    assert len({row.name for row in CLASSES}) == len(CLASSES)


def test_an_inserted_message_and_a_compacted_history() -> None:
    turns = [f"Turn {n}: {chr(97 + n) * 40}" for n in range(9)]
    inserted = chat(RULES, *turns[:4])
    inserted["messages"].insert(2, {"role": "user", "content": "Something put in between."})
    assert explain_miss(chat(RULES, *turns[:4]), inserted).findings[1].cause == "message inserted"
    compacted = chat(RULES, turns[0], "Summary of the conversation so far.", "Go on.")
    found = explain_miss(chat(RULES, *turns), compacted).findings[1]
    assert found.cause == "history compacted"
    assert found.lost == 0, "nothing behind the summary was sent before"


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("Look at commit a1b2c3d first.", "Look at commit f00dba5 first."),
        ("Give me 3 ideas.", "Give me 5 ideas."),
        ("Was it on 2026-06-09?", "Was it on 2026-06-10?"),
        ("Read src/a.py", "Write src/b.py"),
    ],
)
def test_what_a_user_edits_is_no_volatile_text(earlier: str, later: str) -> None:
    found = explain_miss(chat(RULES, earlier, "Yes.", ASKED), chat(RULES, later, "Yes.", ASKED)).findings[1]
    assert found.cause == "rewritten message"


def test_one_line_that_changes_each_turn_is_one_cause() -> None:
    days = [
        chat(f"{RULES}\nTime: 2026-06-09T15:0{n}:00\n{RULES}", *(["Go on.", "Yes."] * n), "Go on.") for n in range(6)
    ]
    report = explain_miss(*days)
    [cause] = report.causes
    assert cause.requests == (2, 3, 4, 5, 6)
    assert cause.line == "Time: …"
    assert cause.lost == report.lost
    assert cause.share == pytest.approx(report.lost / report.total)


def test_interleaved_conversations_are_told_apart() -> None:
    """Each request is compared with the conversation that it continues, not with the line before it."""
    log = []
    for n in range(4):
        for who in ("first", "second", "third"):
            log.append(
                chat(RULES, *[turn for k in range(n) for turn in (f"{who} {k}", f"answer {k} to {who}")], f"{who} {n}")
            )
    report = explain_miss(*log)
    assert report.lost == 0
    assert [finding.compared_with for finding in report.findings[3:]] == list(range(1, 10))


def test_a_subagent_between_two_turns_does_not_hide_what_they_share() -> None:
    clock = [f"Now: 2026-06-09 15:0{n}\n{RULES}" for n in range(2)]
    between = chat("You search files. Answer with paths only.", "Where is bound?")
    report = explain_miss(chat(clock[0], ASKED), between, chat(clock[1], ASKED, "Yes.", "Go on."))
    assert [finding.cause for finding in report.findings] == ["first request", "new conversation", "clock"]
    assert report.findings[2].compared_with == 1
