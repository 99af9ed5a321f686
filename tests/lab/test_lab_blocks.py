"""The experiment on blocks: what its cases are, and that a record of it is complete. On a tiny random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import tiny
from programmable_kv import Mode
from programmable_kv.lab import blocks


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(max_position_embeddings=8192)


def test_a_longer_draw_begins_with_a_shorter_one() -> None:
    two, one = list(blocks.cases(2)), list(blocks.cases(1))
    assert two[: len(one)] == one
    assert [case.kind for case in one] == list(blocks.KINDS)


@pytest.mark.parametrize("everyday", [False, True])
@pytest.mark.parametrize("kind", blocks.KINDS)
def test_one_line_changes_and_the_rules_name_what_it_is_about(kind: str, everyday: bool) -> None:
    for case in blocks.cases(8, everyday=everyday):
        if case.kind != kind:
            continue
        old, new = case.old.split("\n"), case.new.split("\n")
        changed = [line for line in new if line not in old]
        assert len(changed) == 1
        assert case.subject in changed[0]
        assert len(new) - len(old) == (1 if kind == "line_added" else 0)
        assert sum(case.subject in line for line in case.prompt.split("\n")) == 2
        assert case.right_before != case.right_after
        assert all(f" {action}." in case.prompt for action in case.options)
        assert everyday == (case.subject in case.asked)


def test_the_rules_about_the_changed_line_are_computed_again_and_no_other(model: Any) -> None:
    for case in blocks.cases(1):
        notebook = blocks.notebook_of(model, case, asked=True)
        plan = notebook.plan.edit({blocks.NAME: case.new}, mode="readers")
        again = notebook.model.tokenizer.decode([id for one in plan.compute for id in plan.after.ids_in(one.span)])
        assert all(f"choose {action}." in again for action in case.options)
        assert case.asked in again
        assert "Answer with one action" not in again
        assert f"mentions '{case.subject}'" in plan.why


def test_a_record_is_complete_and_resumes(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "blocks.json"
    record = blocks.run(model, 1, path)
    assert len(record.rows) == len(blocks.KINDS)
    for row in record.rows:
        for layout in blocks.LAYOUTS:
            assert row[layout]["stale"]["tokens_computed"] < row[layout]["in_place"]["tokens_computed"]
            assert row[layout]["readers"]["tokens_computed"] < row[layout]["full"]["tokens_computed"]
            assert row[layout]["suffix"]["choice"] == row[layout]["full"]["choice"]
    again = blocks.run(model, 1, path)
    assert again.rows == record.rows
    counted = record.summary["all"]["asked_before"]["counted"]
    assert 0 <= counted <= 4
    assert set(record.summary["all"]["asked_before"]) >= set(Mode)


def test_only_cases_that_full_prefill_decides_rightly_count() -> None:
    modes = {str(mode): {"choice": "a", "tokens_computed": 1} for mode in Mode}
    right = {"before": "b", **modes, "in_place": {"choice": "b", "tokens_computed": 3}}
    wrong = {"before": "a", **modes}
    rows = [
        {"kind": "item_done", "old": "b", "new": "a", **dict.fromkeys(blocks.LAYOUTS, layout)}
        for layout in (right, wrong)
    ]
    part = blocks.summarise(rows)["item_done"]["asked_after"]
    assert (part["drawn"], part["counted"]) == (2, 1)
    assert part["in_place"]["agreement"]["value"] == 0
    assert part["in_place"]["mean_tokens_computed"] == 3
    assert part["readers"]["agreement"]["value"] == 1
