"""Where the field stands, and what an appended line does, on a tiny random model in float64: what must be equal is."""

from __future__ import annotations

from functools import partial

import pytest

from conftest import tiny
from programmable_kv.edits.modes import Mode
from programmable_kv.lab.experiments import boundary, errata, prediction
from programmable_kv.lab.experiments.cases import cases
from programmable_kv.lab.experiments.pair import Pair, Texts, both_prefilled, pair_of
from programmable_kv.lab.experiments.prevention import tail_of
from programmable_kv.lab.experiments.written import RULES, Text


@pytest.fixture(scope="module")
def pair() -> Pair:
    model = tiny(max_position_embeddings=8192)
    found = (pair_of(model, case) for case in cases(64))
    return next(pair for pair in found if isinstance(pair, Pair))


def in_settings(pair: Pair) -> dict[str, Texts]:
    found = {each.name: boundary.in_setting(pair, each) for each in boundary.settings(pair.case)}
    return {name: each for name, each in found.items() if isinstance(each, Texts)}


def test_the_field_stands_where_the_setting_says(pair: Pair) -> None:
    written = in_settings(pair)
    assert set(written) == {each.name for each in boundary.settings(pair.case)}
    between = {name: each.text.last - each.text.field.stop for name, each in written.items()}
    assert between["in_question"] < between["below"] < min(between["below_far"], between["among"])
    assert between["among"] < between["above"]
    for name in ("below", "below_far", "in_question"):
        assert written[name].text.of(*RULES) == (), "no rule stands behind the field"
    assert 0 < len(written["among"].text.of(*RULES)) < len(written["above"].text.of(*RULES))
    for name, each in written.items():
        text = "".join(each.text.tokens)
        assert text.count(pair.case.gate.field) == "".join(pair.text.tokens).count(pair.case.gate.field) + (
            "lookup" in name
        )
        asked = "".join(each.text.tokens[slot] for slot in each.text.of(Text.QUESTION))
        assert (boundary.GO_ON in asked) == (name == "asked_first")
    assert set(written["lookup"].actions) == set(pair.change)


def test_the_last_texts_computed_again_are_a_prefill_where_nothing_else_is_behind_the_field(pair: Pair) -> None:
    written = in_settings(pair)["in_question"]
    assert tail_of(written.text)[0] == written.text.field.stop
    row = boundary.measure(pair, [])["settings"]
    found, above = row["in_question"], row["above"]
    assert found["new_gap"] == pytest.approx(both_prefilled(written).scale.new, abs=1e-4)
    assert found["asked_again"] == pytest.approx(found["new_gap"], abs=1e-4)
    assert above["asked_again"] != pytest.approx(above["new_gap"], abs=1e-3)
    assert above["patched"]["field"] != pytest.approx(above["old_gap"], abs=1e-6)


def test_a_way_back_in_place_leaves_no_trace_and_a_stale_cache_decides_as_before(pair: Pair) -> None:
    notebook = errata.prefilled(pair.model, pair, errata.DEFAULT_TEMPLATE)
    gaps = {}
    for mode, asked in ((Mode.IN_PLACE, False), (Mode.ERRATUM, False), (Mode.ERRATUM, True)):
        mark = notebook.mark()
        gaps[mode, asked] = errata.back(pair, notebook, mode, asked=asked).gap(*pair.actions)
        notebook.rollback(mark)
    before = notebook.decide(pair.case.asked, list(pair.first_tokens)).gap(*pair.actions)
    stale = errata.chosen(notebook, partial(errata.edited, pair, notebook, Mode.STALE))
    assert gaps[Mode.IN_PLACE, False] == pytest.approx(before, abs=1e-9)
    assert gaps[Mode.ERRATUM, False] == pytest.approx(before, abs=1e-9), "nothing was said behind it: it is taken back"
    assert gaps[Mode.ERRATUM, True] != pytest.approx(before, abs=1e-6)
    assert stale == notebook.decide(pair.case.asked, list(pair.first_tokens)).choice
    assert len({tuple(template) for template in errata.WORDINGS.values()}) == len(errata.WORDINGS)


def test_features_are_measured_before_the_edit_and_an_edit_is_really_made(pair: Pair) -> None:
    row = prediction.measure(pair, [])
    assert row["notes"]["rules"] == pytest.approx(
        (pair.gaps([prediction.Probe(pair.text.of(Text.OLD_RULE, Text.NEW_RULE))])[0] - pair.scale.old)
        / (pair.scale.new - pair.scale.old),
        abs=1e-4,
    )
    edits = ("erratum", "field_erratum")
    assert set(row["failed"]) == {*edits, *(f"{edit}{prediction.ASKED_AFTER}" for edit in edits)}
    assert row["before"]["entropy"] > 0
    assert all(isinstance(value, float | int) for kind in prediction.KINDS for value in row[kind].values())
