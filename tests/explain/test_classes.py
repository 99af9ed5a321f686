"""Every class of causes is recognised in the shapes that real clients send, and logs without misses report none."""

from __future__ import annotations

import time
from typing import Any

import pytest

from explain.corpus import ASKED, QUIET, RULES, SHAPES, Shape, chat
from programmable_kv import explain_miss
from programmable_kv.explain.classes import CLASSES
from programmable_kv.explain.difference import common_length
from programmable_kv.explain.volatile import labels_before, volatile_at

WITHOUT_SHAPE = {
    "unknown (hashes only)": "test_traces.py",
    "message inserted": "below",
    "history compacted": "below",
}
"""classes that no row of the corpus tests, and where they are tested"""


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
    """Each request is compared with the conversation that it continues, not with the previous line of the log."""
    log = []
    for n in range(4):
        for who in ("first", "second", "third"):
            log.append(
                chat(RULES, *[turn for k in range(n) for turn in (f"{who} {k}", f"answer {k} to {who}")], f"{who} {n}")
            )
    report = explain_miss(*log)
    assert report.lost == 0
    assert [finding.compared_with for finding in report.findings[3:]] == list(range(1, 10))


def test_a_subagent_of_the_same_session_is_no_turn_of_it() -> None:
    """Claude Code sends the same session id for its main agent and its sub-agents."""
    tools = [{"type": "function", "function": {"name": "read", "description": "x" * 500}}]
    main = [chat(RULES, *[ASKED, "Yes."] * n, ASKED, tools=tools) for n in range(2)]
    between = chat("You search files. Answer with paths only.", "Where is bound?", tools=tools)
    log = [
        {"request": {"body": body, "headers": {"x-claude-code-session-id": "s"}}}
        for body in (main[0], between, main[1])
    ]
    report = explain_miss(*log)
    assert [finding.cause for finding in report.findings] == ["first request", "new conversation", "appended"]
    assert report.findings[2].compared_with == 1


def test_behind_a_clock_the_conversation_that_is_continued_is_found_by_what_it_says() -> None:
    log = []
    for n in range(3):
        for who in ("first", "second"):
            turns = [turn for k in range(n) for turn in (f"{who} {k}", f"answer {k} to {who}")]
            log.append(chat(f"Now: 15:{len(log):02}\n{RULES}", *turns, f"{who} {n}"))
    report = explain_miss(*log)
    assert [finding.compared_with for finding in report.findings[2:]] == [1, 2, 3, 4]
    assert {finding.cause for finding in report.findings[2:]} == {"clock"}


def test_a_session_that_was_compacted_is_compared_with_itself() -> None:
    """Only the system prompt is left, which every session has, so the client's name of the session decides."""
    log = [
        {"session_id": name, "request": chat(RULES, *turns)}
        for name, turns in (("s", ["One."]), ("t", ["Two."]), ("s", ["Summary of what was said.", "Yes.", "Go on."]))
    ]
    found = explain_miss(*log).findings[2]
    assert found.compared_with == 1
    assert found.cause == "rewritten message"


def test_of_two_models_in_one_conversation_the_same_one_is_compared() -> None:
    system = "Now: 15:0{}\n" + RULES
    one, other = ({**chat(system.format(0), ASKED), "model": name} for name in ("m", "n"))
    later = {**chat(system.format(1), ASKED, "Yes.", "Go on."), "model": "m"}
    found = explain_miss(one, other, later).findings[2]
    assert (found.cause, found.compared_with) == ("clock", 1)


def test_a_subagent_between_two_turns_does_not_hide_what_they_share() -> None:
    clock = [f"Now: 2026-06-09 15:0{n}\n{RULES}" for n in range(2)]
    between = chat("You search files. Answer with paths only.", "Where is bound?")
    report = explain_miss(chat(clock[0], ASKED), between, chat(clock[1], ASKED, "Yes.", "Go on."))
    assert [finding.cause for finding in report.findings] == ["first request", "new conversation", "clock"]
    assert report.findings[2].compared_with == 1


@pytest.mark.parametrize(
    ("one", "other", "name"),
    [
        ("2026-06-09T12:00:00.123456+00:00", "2026-06-10T12:00:07+00:00", "clock"),
        ("Thu Nov 26 2026", "Fri Nov 27 2026", "clock"),
        ("11/26/2026 9:05 PM", "11/27/2026 9:05 PM", "clock"),
        ("26.11.2026, 21:05", "27.11.2026, 21:05", "clock"),
        ("epoch 1780000000", "epoch 1780000100", "clock"),
        ("Thu Nov 26 23:59:58 UTC 2026", "Thu Nov 26 23:59:59 UTC 2026", "clock"),
        ("order 1234-56-78", "order 9876-54-32", "counter"),
        ("order 12/34/5678", "order 98/76/5432", "counter"),
        ("part 65:43:21", "part 12:34:56", "counter"),
        ("3f2b8c1e-9a44-4c1b-8f21-0c2de1a5b7f0", "81d7c0aa-1b7e-4d55-9c00-aa12cd34ef56", "id"),
        ("req_01AbCdEf23", "req_77zYxWvU99", "id"),
        ("cch=1a2b3", "cch=9f8e7", "id"),
        ("1,234 left", "987 left", "counter"),
        ("turn 9", "turn 10", "counter"),
        ("decade", "facade", None),
        ("I like cats", "I like dogs", None),
        ("May I go", "Can I go", None),
        ("Julia Roberts", "Martin Roberts", None),
        ("Maria", "Augusto", None),
        ("Sunny", "Monty", None),
        ("version", "version 2", None),
        ("1", "1:", None),
    ],
)
def test_a_volatile_value_is_told_by_its_form(one: str, other: str, name: str | None) -> None:
    found = volatile_at(one, other, common_length(one, other))
    assert (found and found.name) == name


def test_hostile_texts_take_no_long_time() -> None:
    """The text is one long line, full of what the patterns look for."""
    for filler in ("12:30 Mon Jun 9, ", "a/b.c/", "<think>", "<a ", "# x\n", "1 1 1 1 ", "<a></b>"):
        text = filler * (200_000 // len(filler))
        started = time.perf_counter()
        explain_miss(chat(f"{text}x{text}", ASKED), chat(f"{text}y{text}", ASKED))
        explain_miss(chat(RULES, f"{text}x{text}", ASKED), chat(RULES, f"{text}y{text}", ASKED))
        assert time.perf_counter() - started < 5, filler


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("<a><b></b><c>", ("a", "c")),
        ("<a><a></a>", ("a",)),
        ("</b></b><b><b></a><c>", ("b", "b", "c")),
        ("<a></b></b></a>\n# Status\n", ("Status",)),
    ],
)
def test_the_tags_that_are_open_at_a_place(text: str, labels: tuple[str, ...]) -> None:
    assert labels_before(f"{text}x", len(text)) == labels
