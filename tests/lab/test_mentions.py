"""The experiments on how a field is mentioned, on stock models, and in long contexts. On a tiny random model."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny
from programmable_kv import Notebook
from programmable_kv.lab import long_readers, mentions, readers, same_budget, stock_readers
from programmable_kv.scenarios.everyday import EVERYDAY, everyday
from programmable_kv.scenarios.mentioned import IDLE, WAYS, Mentioned, mentioned


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(max_position_embeddings=8192)


def drawn(count: int = 3) -> list[Mentioned]:
    ways = [mentioned(random.Random(f"{way.name}/{n}"), way, n) for n in range(count) for way in WAYS]
    return ways + [everyday(random.Random(f"{way.name}/{n}"), way) for n in range(count) for way in EVERYDAY]


def read(notebook: Notebook, name: str) -> str:
    return "".join(reader.text for reader in notebook.readers(name) if reader.word)


NAMED = {"by_name", "often", "every_other", "rules"}
"""where a rule names the field"""


@pytest.mark.parametrize("case", drawn(), ids=lambda case: case.way.name)
def test_what_an_author_declares_marks_every_line_that_decides(model: Any, case: Mentioned) -> None:
    assert case.old != case.new
    assert case.actions[case.old] != case.actions[case.new]
    notebook = mentions.notebook_of(model, case)
    found = read(notebook, case.field)
    named = [action in found for action in case.options]
    if case.way.name == "every_other":
        assert named == [True, False], "the name marks one of two rules"
    else:
        assert set(named) == {case.way.name in NAMED}
    declared = mentions.declaring(notebook, case.field, case.declared)
    assert all(action in read(declared, case.field) for action in case.options)
    assert read(notebook, case.field) == found, "the copy alone has the words"


def test_often_means_in_lines_that_decide_nothing() -> None:
    case = mentioned(random.Random(1), next(way for way in WAYS if way.name == "often"), 0)
    assert sum(line.format(field=case.field) in case.prompt for line in IDLE) == len(IDLE)


def test_longer_draws_begin_with_shorter_ones() -> None:
    for draw in (mentions.cases, stock_readers.cases):
        assert list(draw(2))[: len(list(draw(1)))] == list(draw(1))
    long = list(readers.cases(1, long_readers.KINDS))
    assert [case.kind for case in long] == list(long_readers.KINDS)


def test_a_record_of_mentions(model: Any, tmp_path: Path) -> None:
    record = mentions.run(model, 1, tmp_path / "mentions.json")
    assert record.complete
    assert [row["way"] for row in record.rows] == [way.name for way in WAYS]
    for row in record.rows:
        lines = row["suggesting"]["lines"]
        assert sum(line["decides"] for line in lines) == 2, "the two rules are among the lines"
        assert row["in_place"]["tokens_computed"] < row[mentions.BY_NAME]["tokens_computed"]
        assert row[mentions.BY_NAME]["tokens_computed"] <= row[mentions.DECLARED]["tokens_computed"]
    assert record.figure("all.drawn") == len(WAYS)


def test_a_record_of_a_stock_model_goes_no_further_where_nothing_is_solved(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mentions, "solved", lambda row: row["way"] == "program")
    record = stock_readers.run(model, 1, tmp_path / "stock.json")
    rules, program = record.rows
    assert not set(stock_readers.ARMS) & set(rules)
    assert set(stock_readers.ARMS) < set(program)
    assert program["suffix"]["choice"] == program["full"]["choice"], "suffix is exact"
    assert program[same_budget.DEVIATION]["tokens_computed"] <= program[mentions.DECLARED]["tokens_computed"]
    assert record.figure("all.solved.value") == 0.5
    assert record.name == "stock-readers-tiny-llama"


def test_a_record_of_long_contexts(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_readers, "KINDS", (readers.Kind("one_set_long", 1, False, 20),))
    first = next(readers.cases(1, long_readers.KINDS))
    right = iter([first.gate.actions[first.old], first.gate.actions[first.new]])

    class Right(Notebook):
        """Decides as is right, the first two times it is asked: before, and by full prefill."""

        def decide(self, *args: Any, **options: Any) -> Any:
            decision = super().decide(*args, **options)
            return replace(decision, choice=next(right, decision.choice))

    monkeypatch.setattr(readers, "Notebook", Right)
    record = long_readers.run(model, 1, tmp_path / "long.json")
    (row,) = record.rows
    assert set(long_readers.ARMS) < set(row)
    part: Any = record.summary["all"]
    assert part["counted"] == 1
    share = row["readers"]["tokens_computed"] / row["full"]["tokens_computed"]
    assert part["readers"]["share_of_tokens"] == pytest.approx(share, abs=1e-5)
