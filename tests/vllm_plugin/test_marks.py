"""How a request names its skills: every accepted spelling, and every refusal."""

from __future__ import annotations

from typing import Any

import pytest

from programmable_kv.errors import InvalidRequestError
from programmable_kv.vllm_plugin.marks import Mark, Marks, parse_marks


@pytest.mark.parametrize("parameters", [None, {}, {"do_remote_prefill": True}])
def test_a_request_without_skills_has_no_marks(parameters: Any) -> None:
    assert parse_marks(parameters) is None


@pytest.mark.parametrize(
    ("skills", "expected"),
    [
        (["refunds"], (Mark("refunds"),)),
        ([{"skill": "refunds"}], (Mark("refunds"),)),
        ([{"skill": "refunds", "start": 0}, "returns"], (Mark("refunds", 0), Mark("returns"))),
        ([{"skill": "refunds", "start": None}], (Mark("refunds"),)),
    ],
)
def test_skills_are_read(skills: Any, expected: tuple[Mark, ...]) -> None:
    assert parse_marks({"skills": skills}) == Marks(expected)
    assert parse_marks({"skills": skills, "seam": 4}) == Marks(expected, 4)


def test_marks_are_written_as_they_are_read() -> None:
    marks = Marks((Mark("refunds", 24), Mark("returns")), 2)
    assert parse_marks(marks.parameters) == marks


@pytest.mark.parametrize(
    "parameters",
    [
        {"skills": []},
        {"skills": "refunds"},
        {"skills": [7]},
        {"skills": [""]},
        {"skills": [{"name": "refunds"}]},
        {"skills": [{"skill": "refunds", "tokens": 4}]},
        {"skills": [{"skill": "refunds", "start": -1}]},
        {"skills": [{"skill": "refunds", "start": True}]},
        {"skills": ["refunds"], "seam": -1},
        {"skills": ["refunds"], "seam": 1.5},
    ],
    ids=str,
)
def test_what_is_not_written_so_is_refused(parameters: Any) -> None:
    with pytest.raises(InvalidRequestError, match="kv_transfer_params="):
        parse_marks(parameters)
