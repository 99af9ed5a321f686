"""The experiment on readers: what its arms compute, and that a record of it is complete. On a tiny random model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny
from programmable_kv import Decision, Mode, Notebook
from programmable_kv.edits.ranking import AttentionInfluence
from programmable_kv.lab import edit_modes, readers, same_budget
from programmable_kv.scenarios.held_out import held_out_scenarios
from programmable_kv.states import TokenState

OPTIONS = ["deny", "cancel"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(max_position_embeddings=8192)


def test_a_longer_draw_begins_with_a_shorter_one() -> None:
    two, one = list(readers.cases(2)), list(readers.cases(1))
    assert two[: len(one)] == one
    assert len(one) == len(readers.KINDS)
    assert {(case.kind.name, len(case.scenario.gates)) for case in one} >= {("one_set", 1), ("two_sets", 2)}
    for case in two:
        assert case.gate.actions[case.old] != case.gate.actions[case.new]
        assert (case.gate.kind is not None) or case.kind.name.removesuffix("_among_30_rules") != "two_hops"


def test_the_words_that_a_policy_needs_are_declared(model: Any) -> None:
    """Every rule of the gate that changes is a reader, be it by the field or by the group that it is looked up in."""
    for case in readers.cases(1):
        notebook = readers.notebook_of(model, case, asked=False)
        read = "".join(reader.text for reader in notebook.readers(case.gate.field))
        assert all(action in read for action in case.gate.actions.values()), case.kind.name
        asked = readers.notebook_of(model, case, asked=True)
        assert case.asked in asked.readers(case.gate.field)[-1].text


def test_the_null_computes_the_question_and_other_lines(model: Any) -> None:
    policy = "status: {status}\n" + "be polite\n" * 12 + "if status is gold, deny.\n" + "then ask\n" * 12
    notebook = Notebook(model).message("system", policy, status="gold").message("user", "cancel?")
    notebook.prefill()
    budget = sum(len(reader.span) for reader in notebook.readers("status"))
    lines = {slot for reader in notebook.readers("status")[:-1] for slot in reader.span.range}
    question = notebook.readers("status")[-1].span
    seen: dict[int, tuple[Mode, list[TokenState]]] = {}

    def ask(mode: Mode, k: int) -> Decision:
        decision = notebook.decide(None, OPTIONS, edits={"status": "tier"}, mode=mode, k=k)
        seen[len(seen)] = mode, notebook.states
        return decision

    before = notebook.ids, notebook.states
    arms = dict(same_budget.decisions(notebook, {"status": "tier"}, random.Random(0), ask))
    assert list(arms) == list(same_budget.ARMS)
    assert (notebook.ids, notebook.states) == before
    assert isinstance(notebook.ranking, AttentionInfluence)
    mode, states = seen[list(arms).index(same_budget.RANDOM_LINES)]
    growth = len(states) - len(before[1])
    refreshed = {slot for slot, state in enumerate(states) if state is TokenState.REFRESHED}
    assert mode is Mode.SELECTIVE
    assert {slot + growth for slot in question.range} <= refreshed
    assert not {slot + growth for slot in lines} & refreshed
    own = len(notebook.spans("status")[0])
    assert len([slot for slot in refreshed if slot >= notebook.spans("status")[0].stop]) in range(
        budget - own, budget + 1
    )


def test_where_there_is_no_other_text_the_null_is_the_field_alone(model: Any) -> None:
    notebook = Notebook(model).message("system", "status: {status}\nif status is gold, deny.", status="gold")
    notebook.prefill()
    modes = []

    def ask(mode: Mode, k: int) -> Decision:
        modes.append(mode)
        return notebook.decide("cancel?", OPTIONS, edits={"status": "tier"}, mode=mode, k=k)

    list(same_budget.decisions(notebook, {"status": "tier"}, random.Random(0), ask))
    assert modes == [Mode.SELECTIVE, Mode.SELECTIVE, Mode.IN_PLACE]


def test_a_record_of_it(model: Any, tmp_path: Path) -> None:
    record = readers.run(model, 1, tmp_path / "readers.json")
    assert record.complete
    assert [row["kind"] for row in record.rows] == [kind.name for kind in readers.KINDS]
    for row in record.rows:
        for layout in readers.LAYOUTS:
            assert set(row[layout]) == set(readers.ARMS[layout])
            budget = row[layout][same_budget.RANDOM_LINES]["tokens_computed"]
            assert budget <= row[layout]["readers"]["tokens_computed"] + 4
        asked = row["asked before"]
        assert asked["suffix"]["choice"] == row["full"]["choice"], "suffix is exact"
        assert asked["in_place"]["tokens_computed"] < asked["readers"]["tokens_computed"]
        assert asked[same_budget.DEVIATION]["tokens_computed"] <= asked["readers"]["tokens_computed"]
    again = readers.summarise(record.rows)
    assert again["all"]["asked_before"]["counted"] == record.figure("all.asked_before.counted")


def test_the_record_of_all_modes_holds_the_same_arms(model: Any, tmp_path: Path) -> None:
    record = edit_modes.run(model, 1, tmp_path / "edit-modes.json")
    (row,) = record.rows
    for layout in (*edit_modes.LAYOUTS, edit_modes.THINK):
        assert [*row[layout]] == [edit_modes.BEFORE, *edit_modes.ARMS]
    part: Any = record.summary["asked_before"]
    assert set(same_budget.ARMS) < set(part)


def test_modes_whose_rows_are_computed_together_decide_as_on_a_notebook(model: Any) -> None:
    scenario = held_out_scenarios(1, edit_modes.SEED)[0]
    row, case = edit_modes._one(model, scenario, 0), edit_modes._Case.of(0, scenario)
    notebook = edit_modes._prefilled(model, scenario, None)
    for mode in Mode:
        mark = notebook.mark()
        decision = notebook.decide(case.asked, scenario.options, edits={case.gate.field: case.new}, mode=mode)
        notebook.rollback(mark)
        found = row["asked after"][mode]
        assert found["choice"] == decision.choice, mode
        assert found["gap"] == pytest.approx(decision.gap(row["new"], row["old"]), abs=1e-4), mode
        assert found["tokens_computed"] == decision.account.tokens_computed, mode


def test_agreement_counts_where_full_prefill_is_right_on_both_sides() -> None:
    def row(before: str, full: str, chosen: str) -> dict[str, Any]:
        arms = {arm: {"choice": chosen, "tokens_computed": 10} for arm in readers.ARMS["asked before"]}
        return {
            "kind": "one_set", "domain": "d", "old": "a", "new": "b", "before": before,
            "full": {"choice": full, "tokens_computed": 50},
            "asked before": arms, "asked after": arms,
        }  # fmt: skip

    summary = readers.summarise([row("a", "b", "b"), row("a", "b", "a"), row("x", "b", "b"), row("a", "x", "x")])
    part = summary["one_set"]["asked_before"]
    assert (part["drawn"], part["counted"]) == (4, 2)
    assert part["readers"]["agreement"]["value"] == 0.5
    assert summary["two_sets"]["asked_after"]["counted"] == 0
    assert summary["among_30_rules"]["asked_before"]["drawn"] == 0
