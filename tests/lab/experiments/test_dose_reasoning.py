"""Injected notes and blocked thoughts on a tiny random model in float64: what must be equal is."""

from __future__ import annotations

import pytest
import torch

from conftest import tiny
from programmable_kv.edits.modes import Mode
from programmable_kv.engine import Rows
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.lab.experiments import dose, reasoning
from programmable_kv.lab.experiments.cases import cases
from programmable_kv.lab.experiments.pair import Pair, pair_of
from programmable_kv.lab.experiments.written import RULES
from programmable_kv.lab.published import as_published
from programmable_kv.lab.tools.knockout import Knockout, blinded, knocked_out
from programmable_kv.lab.tools.kv import injected, rows_from
from programmable_kv.notebook.notebook import Notebook

CLOSE = {"rel": 1e-9, "abs": 1e-9}


@pytest.fixture(scope="module")
def pair() -> Pair:
    model = tiny(max_position_embeddings=8192)
    found = (pair_of(model, case) for case in cases(64, values=3))
    return next(pair for pair in found if isinstance(pair, Pair))


def test_every_policy_has_a_third_value() -> None:
    assert {len(case.gate.actions) for case in cases(32, values=3)} == {3}
    assert [case.text() for case in cases(8, values=3)] == [case.text() for case in cases(32, values=3)][:8]


def test_no_dose_is_the_cached_context_and_all_of_it_with_the_field_the_other_one(pair: Pair) -> None:
    row = dose.measure(pair, [dose.rank(pair)])
    assert row["turned"]["0"]["gap"] == pytest.approx(pair.scale.old, abs=1e-4)
    assert row["strength"]["1"]["gap"] == pytest.approx(row["turned"][str(dose.STRONG)]["gap"], abs=1e-4)
    everything = (*pair.text.field.range, *pair.text.later)
    assert dose._strongly(pair, everything, 1)["gap"] == pytest.approx(pair.scale.new, abs=1e-4)
    assert dose._strongly(pair, everything, 0)["gap"] == pytest.approx(pair.scale.old, abs=1e-4)
    assert dose._strongly(pair, everything, 2)["gap"] != pytest.approx(pair.scale.new, abs=1e-4)


def test_a_cache_poisoned_everywhere_is_repaired_as_the_context_that_the_poison_is_from(pair: Pair) -> None:
    third = dose.third_value(pair)
    assert third is not None
    notebook = dose.cached(pair)
    before = [tensor.clone() for tensor in notebook.cache.tensors().values()]
    donor = as_published(Notebook(pair.model)).message(
        "system", pair.case.scenario.prompt, **pair.case.values(pair.change[1])
    )
    donor.message("user", pair.case.asked).prefill()
    everything = [slot for slot in (*pair.text.field.range, *pair.text.later) if slot < len(notebook)]
    found = dose._repairs(pair, notebook, third, everything)
    clean = dose._repairs(pair, notebook, third, ())
    for mode in dose.REPAIRS:
        wanted = dose.repaired(pair, donor, third, mode)
        assert found[str(mode)]["lead"] == pytest.approx(wanted["lead"], abs=1e-4), mode
        assert clean[str(mode)] == dose.repaired(pair, notebook, third, mode)
    assert found["erratum"]["lead"] != pytest.approx(clean["erratum"]["lead"], abs=1e-4)
    full = dose.repaired(pair, notebook, third, Mode.FULL)
    with injected(notebook.cache, everything, rows_from(pair.fresh, everything)):
        assert dose.repaired(pair, notebook, third, Mode.FULL) == full, "nothing of the poison outlives a full prefill"
    assert all(torch.equal(a, b) for a, b in zip(before, notebook.cache.tensors().values(), strict=True))


def test_what_is_computed_again_is_not_poisoned_any_more(pair: Pair) -> None:
    third = dose.third_value(pair)
    assert third is not None
    notebook = dose.cached(pair)
    poisoned = dose._repairs(pair, notebook, third, pair.text.of(*RULES), 4.0)
    clean = dose._repairs(pair, notebook, third, ())
    assert poisoned["readers"]["lead"] == pytest.approx(clean["readers"]["lead"], abs=1e-4)
    assert poisoned["erratum"]["lead"] != pytest.approx(clean["erratum"]["lead"], abs=1e-4)


def test_a_blinded_row_is_a_knock_out_of_it_and_one_that_may_read_all_is_unchanged(pair: Pair) -> None:
    engine, last, field = pair.engine, pair.text.last, tuple(pair.text.field.range)
    rows = Rows((pair.token,), (last,), (last,))
    with knocked_out(engine, pair.old, Knockout((last,), field)):
        wanted = engine.compute(pair.old, rows)
    length = pair.old.length
    with blinded(engine, pair.old, lambda slot: field if slot == last else range(slot)):
        found = engine.compute(pair.old, rows)
    with blinded(engine, pair.old, lambda _: ()):
        clean = engine.compute(pair.old, rows)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)
    assert float(pair.gap_in(clean[-1])) == pytest.approx(pair.scale.old, **CLOSE)
    assert not torch.allclose(found, clean, rtol=1e-6, atol=1e-6)
    assert pair.old.length == length
    with (
        pytest.raises(InvalidArgumentError, match="attend to nothing"),
        blinded(engine, pair.old, lambda s: range(s + 1)),
    ):
        engine.compute(pair.old, rows)


def thinking_of(pair: Pair, value: str) -> reasoning.Thinking:
    asked = f"{pair.case.asked} {reasoning.THINK_INSTRUCTION}"
    notebook = Notebook(pair.model).message("system", pair.case.scenario.prompt, **pair.case.values(value))
    notebook.message("user", asked).prefill()
    opening = pair.text.ids[len(dose.cached(pair)) :]
    return reasoning.Thinking(notebook, opening, list(pair.first_tokens))


def test_a_thought_that_reads_everything_is_that_of_a_decision_with_a_thought(pair: Pair) -> None:
    thinking = thinking_of(pair, pair.change[0])
    length = thinking.notebook.cache.length
    text, scores = thinking.decided((), {"nothing": lambda _: (), "thought": lambda slots: slots})
    decision = thinking.notebook.decide(None, thinking.options, think=True)
    assert text == decision.thought
    again, same = thinking.decided((), {"nothing": lambda _: ()})
    assert (again, len(thinking.drawn)) == (text, 1), "what was thought before is guessed, and is the same"
    assert same["nothing"] == pytest.approx(scores["nothing"], **CLOSE)
    assert scores["thought"] != pytest.approx(scores["nothing"], **CLOSE)
    assert thinking.notebook.cache.length == length


def test_a_thought_and_a_decision_that_read_nothing_of_the_policy_do_not_depend_on_it(pair: Pair) -> None:
    found = []
    for value in pair.change:
        thinking = thinking_of(pair, value)
        policy = range(len(thinking.notebook))
        found.append(thinking.decided(policy, {"nothing": lambda _, policy=policy: policy}))
    (first, scores), (second, others) = found
    assert first == second
    assert scores["nothing"] == pytest.approx(others["nothing"], **CLOSE)


def test_random_sets_stand_outside_field_and_rules(pair: Pair) -> None:
    sets = reasoning.blocked(pair.text, 0)
    own = {*pair.text.field.range, *pair.text.of(*RULES)}
    for name in ("random_as_field", "random_as_rules", reasoning.AS_THOUGHT):
        assert not own & set(sets[name]), name
    assert len(sets["random_as_field"]) == len(sets["field"])
    row = reasoning.measure(pair, [])
    assert set(row["fresh"]) == set(row["in_place"]) == set(reasoning.BLIND_THOUGHTS)
    assert set(row["fresh"]["field"]["decided"]) == {"nothing", "field", "thought"}
