"""What a correcting line reads, on a tiny random model in float64."""

from __future__ import annotations

import pytest

from conftest import tiny
from programmable_kv.edits.modes import Mode
from programmable_kv.lab.experiments import errata, line_reads
from programmable_kv.lab.experiments.cases import cases
from programmable_kv.lab.experiments.line_reads import READS_NEITHER, READS_NEW, READS_OLD
from programmable_kv.lab.experiments.pair import Pair, pair_of
from programmable_kv.notebook.notebook import Notebook


@pytest.fixture(scope="module")
def pair() -> Pair:
    model = tiny(max_position_embeddings=8192)
    found = (pair_of(model, case) for case in cases(64, sets=2))
    return next(pair for pair in found if isinstance(pair, Pair))


def after(pair: Pair, line: str) -> Notebook:
    notebook = errata.prefilled(pair.model, pair, errata.DEFAULT_TEMPLATE)
    line_reads.edited(notebook, pair, line)
    return notebook


def gap(pair: Pair, notebook: Notebook) -> float:
    return notebook.decide(pair.case.asked, list(pair.first_tokens)).gap(*pair.actions)


def test_two_of_the_lines_are_the_product_and_the_published_method(pair: Pair) -> None:
    edit = {pair.case.gate.field: pair.change[1]}
    published = errata.prefilled(pair.model, pair, errata.DEFAULT_TEMPLATE)
    published.edit(edit, mode=Mode.FIELD_ERRATUM)
    product = errata.prefilled(pair.model, pair, errata.DEFAULT_TEMPLATE)
    product._lines_read_fields = False
    product.edit(edit, mode=Mode.FIELD_ERRATUM)
    gaps = {line: gap(pair, after(pair, line)) for line in (READS_OLD, READS_NEW, READS_NEITHER)}
    assert gaps[READS_NEW] == pytest.approx(gap(pair, published), abs=1e-9)
    assert gaps[READS_NEITHER] == pytest.approx(gap(pair, product), abs=1e-9)
    assert len({round(each, 7) for each in gaps.values()}) == 3, "what the line reads changes the decision's gap"


def test_every_edit_is_asked_about_both_rules(pair: Pair) -> None:
    row = line_reads.measure(pair, [])
    assert set(row["asked"]) == {Mode.STALE, *line_reads.LINES, Mode.FULL}
    assert set(row["added"]) == set(line_reads.ADDED)
    expected = -gap(pair, after(pair, READS_NEITHER))  # the new action over the old one
    assert row["asked"][READS_NEITHER]["gap"] == pytest.approx(expected, abs=1e-3)
    exact = [row["added"][arm]["gap"] for arm in (Mode.FULL, Mode.STALE)]
    assert exact[0] != pytest.approx(exact[1], abs=1e-6)
    summary = line_reads.summarise([{**row, "domain": pair.case.domain}])
    assert summary["asked"]["solved"]["n"] == 1


def test_only_policies_that_are_decided_right_both_ways_count() -> None:
    arms = {arm: {"choice": "new", "gap": 1.0} for arm in (*line_reads.LINES, *line_reads.ADDED)}
    wrong = {"choice": "old", "gap": -1.0}
    asked = {**arms, Mode.STALE: wrong, READS_NEW: wrong}
    solved = {"right": ["old", "new"], "asked": asked, "added_right": ["old", "new"], "added": asked, "domain": "a"}
    unsolved = {**solved, "asked": arms}
    part = line_reads.summarise([solved, unsolved, solved])["asked"]
    assert part["solved"]["value"] == pytest.approx(2 / 3)
    assert part[READS_NEW]["right"]["value"] == 0
    assert part[READS_NEITHER]["right"] == {**part[READS_NEITHER]["right"], "value": 1, "n": 2}
    assert part["p_reads_new_reads_neither"] == pytest.approx(0.5)
