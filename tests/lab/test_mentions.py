"""The experiments on how a field is mentioned, on stock models, and in long contexts. On a tiny random model."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny
from programmable_kv import Notebook, wrap_model
from programmable_kv.lab import long_readers, mentions, readers, same_budget, stock_readers, visibilities
from programmable_kv.scenarios.everyday import EVERYDAY, FIELDS, everyday
from programmable_kv.scenarios.mentioned import IDLE, WAYS, Mentioned, mentioned


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(max_position_embeddings=8192)


def without_template(model: Any) -> Any:
    """The same model as a base model: its prompts are raw text."""
    bare = copy.deepcopy(model.tokenizer)
    bare.chat_template = None
    return wrap_model(model.engine.model, bare)


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


def test_a_record_of_visibilities(model: Any, tmp_path: Path) -> None:
    record = visibilities.run(model, 2, tmp_path / "visibilities.json")
    assert record.complete
    assert len(record.rows) == 2 * len(EVERYDAY)
    for row in record.rows:
        for arm in visibilities.ARMS:
            assert row[arm]["solved"] == (row[arm]["right"] == 2)
            assert row[arm]["flips"] == (row[arm]["right"] != 1), "two values, two actions"
    part: Any = record.summary["all"]
    assert part["mentions"]["right"]["n"] == 2 * len(record.rows)
    assert part["mentions"]["kept"]["n"] == part["solved_causally"]


@pytest.mark.parametrize("template", [True, False])
def test_each_visibility_reads_what_it_says(model: Any, template: bool) -> None:
    """What the field's value can change of the cache: all that follows, its readers, or the turns."""
    sizes = {value: len(model.tokenizer.encode(value)) for values in FIELDS.values() for value in values}
    alike = (case for _, case in stock_readers.cases(20) if len({sizes[value] for value in case.actions}) == 1)
    case = next(case for case in alike if case.way.name == "rules")  # then nothing stands elsewhere
    asked = model if template else without_template(model)
    moved = {}
    for arm in visibilities.ARMS:
        books = [visibilities.notebook_under(asked, case, arm, value) for value in case.actions]
        first, second = (book.cache.keys(len(book.cache) - 1)[0] for book in books)
        moved[arm] = (first - second).abs().amax(dim=(0, 2)) > 1e-9
    everywhere, mentioned, turns = (moved[arm] for arm in visibilities.ARMS)
    assert bool(everywhere.any())
    assert int(turns.sum()) < int(mentioned.sum()) < int(everywhere.sum())
    assert bool((turns <= mentioned).all())
