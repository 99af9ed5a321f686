"""What the lines of a block are about, in the formats that agents use."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from programmable_kv.prompt.lines import changed_subjects, subject_of


@pytest.mark.parametrize(
    ("line", "subject"),
    [
        ("order: shipped", "order"),
        ("- order: shipped", "order"),
        ("  * order_status: shipped: twice", "order_status"),
        ("- [ ] call the supplier", "call the supplier"),
        ("- [x] call the supplier", "call the supplier"),
        ("[X] call the supplier", "call the supplier"),
        ("1. call the supplier", "call the supplier"),
        ("2) call the supplier -> done", "call the supplier"),
        ("| order | shipped |", "order"),
        ("tier = gold", "tier"),
        ("## Goals", "Goals"),
        ('- "city": "Oslo"', "city"),
        ("**city**: Oslo", "city"),
        ("at 10:30 the train leaves", "at 10:30 the train leaves"),
        ("see https://example.org/a", "see https://example.org/a"),
        ("well-known", "well-known"),
        ("город: Осло", "город"),
        ("- 都市: 大阪", "都市"),
        ("city:", "city"),
        ("---", ""),
        ("", ""),
        ("- [ ]", ""),
    ],
)
def test_a_line_s_subject(line: str, subject: str) -> None:
    assert subject_of(line) == subject


@given(st.text())
def test_any_line_has_a_subject_that_stands_in_it(line: str) -> None:
    assert subject_of(line) in line


def test_only_lines_that_change_count() -> None:
    before = "- a: 1\n- b: 2\n- c: 3"
    assert changed_subjects(before, "- a: 1\n- b: 5\n- c: 3") == ("b",)
    assert changed_subjects(before, "- a: 1\n- c: 3\n- d: 4") == ("b", "d")
    assert changed_subjects(before, "- c: 3\n- b: 2\n- a: 1") == ()
    assert changed_subjects("", "- [ ] pay") == ("pay",)
    assert changed_subjects(before, before) == ()
