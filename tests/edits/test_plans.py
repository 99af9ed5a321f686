"""Plans are values: they are made from text and a tokenizer, printed and compared without a model."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import tiny, tokenizer
from programmable_kv import Mode, Notebook, SeamRepair, Skill
from programmable_kv.cache.span import Span
from programmable_kv.edits.compose import plan_append, plan_cut, plan_move
from programmable_kv.edits.edit import EditTools, plan_edit, plan_rebase, plan_recompute
from programmable_kv.edits.entries import computed, on_ledger
from programmable_kv.edits.modes import STRATEGIES, mode_of, parse_mode
from programmable_kv.edits.plan import Exchange, Plan, Shift, Truncate
from programmable_kv.edits.ranking import Recency
from programmable_kv.errors import InvalidEditError, UnknownPartError
from programmable_kv.ledger.ledger import Ledger
from programmable_kv.ledger.run import Origin
from programmable_kv.prompt.context import Context, FieldValue
from programmable_kv.prompt.parts import Rendered, unmark
from programmable_kv.prompt.units import Kind, tokenised
from programmable_kv.states import TokenState

TOKENIZER = tokenizer("byte-level")


def erratum(context: Context, name: str, value: str, known: str | None = None) -> Any:
    return tokenised(TOKENIZER, Rendered(f"\n{name} is now {value}.\n"), Kind.ERRATUM, corrects=((name, value),))


def tools(*, relocate: bool = True, k: int = 3) -> EditTools:
    return EditTools(TOKENIZER, erratum, lambda: relocate, Recency(), k, bytes_per_token=100)


def context(after: str = ". then the policy says what to do. ", **values: str) -> tuple[Context, Ledger]:
    """A prefilled context (only text and ledger) with at least two fields, each followed by some text."""
    values = {"status": "pending", "tier": "gold", **values}
    marked = "".join(f"{name}: \ue000{name}\ue001{value}\ue002{after}" for name, value in values.items())
    unit = tokenised(TOKENIZER, unmark(marked), Kind.PREFILL)
    empty = Context((), {name: FieldValue(value, value) for name, value in values.items()})
    return enacted(plan_append(empty, unit), Ledger())


def enacted(plan: Plan, ledger: Ledger) -> tuple[Context, Ledger]:
    """The context and ledger after a plan without selections is carried out."""
    for step in plan.steps:
        ledger = on_ledger(step, ledger)
    return plan.after, computed(ledger, plan.after, plan.compute)


def turn(context: Context, ledger: Ledger, text: str = "and now? ") -> tuple[Context, Ledger]:
    return enacted(plan_append(context, tokenised(TOKENIZER, Rendered(text), Kind.TURN)), ledger)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("value", ["shipped", "cancelled by the customer", "x"])
def test_every_mode_computes_what_it_says(mode: Mode, value: str) -> None:
    before, ledger = context(".\nthen the policy says what to do.\n")
    plan = plan_edit(before, ledger, {"status": value}, mode, tools())
    place = plan.after.spans("status")[0]
    slots = {slot for one in plan.compute for slot in one.span.range}
    if mode is Mode.STALE:
        assert not plan.steps
        assert not slots
        return
    assert STRATEGIES[mode].writes is (value in plan.after.units[0].text)
    if STRATEGIES[mode].writes:
        assert set(place.range) <= slots
    if mode in (Mode.ERRATUM, Mode.FIELD_ERRATUM):
        assert plan.after.units[-1].kind is Kind.ERRATUM
        assert set(range(plan.after.starts[-2], len(plan.after))) <= slots
    if mode is Mode.SELECTIVE:
        (select,) = plan.selects
        assert select.selection.count == 3
    if STRATEGIES[mode].recomputes:
        assert slots == set(range(0 if mode is Mode.FULL else min(slots), len(plan.after)))
    else:
        assert plan.relocates is (len(plan.after.units[0]) != len(before.units[0]) and STRATEGIES[mode].writes)
    after, entered = enacted(plan, ledger)
    assert len(entered) == len(after)
    assert all(run.origin is not Origin.PENDING for run in entered.runs)
    assert (entered.weakest(after.values, after.first_places) is TokenState.EXACT) is STRATEGIES[mode].recomputes
    assert before.values["status"] == "pending", "a plan changes nothing"


def test_a_plan_prints_its_steps_tokens_and_bytes() -> None:
    before, ledger = context()
    plan = plan_edit(before, ledger, {"status": "cancelled by the customer"}, Mode.FIELD_ERRATUM, tools())
    text = str(plan)
    assert "mode field_erratum" in text
    assert f"{plan.tokens_computed} tokens computed, {plan.tokens_relocated} relocated" in text
    assert plan.bytes_moved == 100 * plan.tokens_relocated > 0
    assert "move the tail" in text
    assert plan == plan_edit(before, ledger, {"status": "cancelled by the customer"}, Mode.FIELD_ERRATUM, tools())


def test_no_erratum_where_everything_was_computed_with_the_value() -> None:
    before, ledger = context()
    there = plan_edit(before, ledger, {"status": "shipped"}, Mode.IN_PLACE, tools())
    back = plan_edit(*enacted(there, ledger), {"status": "pending"}, Mode.FIELD_ERRATUM, tools())
    assert back.used is Mode.IN_PLACE
    assert "no erratum" in back.why
    with_turn = plan_edit(*turn(*enacted(there, ledger)), {"status": "pending"}, Mode.FIELD_ERRATUM, tools())
    assert with_turn.used is Mode.FIELD_ERRATUM, "the turn has read both values"


@pytest.mark.parametrize("relocate", [True, False])
def test_superseded_errata_are_cut_or_overridden(relocate: bool) -> None:
    """An erratum at the end is dropped. One before a turn is cut out if keys can be relocated, else overridden."""
    now = enacted(plan_edit(*context(), {"status": "shipped"}, Mode.ERRATUM, tools()), context()[1])
    last = plan_edit(*now, {"status": "returned"}, Mode.ERRATUM, tools(relocate=relocate))
    assert isinstance(last.steps[0], Truncate)
    inside = turn(*now)
    plan = plan_edit(*inside, {"status": "returned"}, Mode.ERRATUM, tools(relocate=relocate))
    errata = [unit.corrects for unit in plan.after.units if unit.kind is Kind.ERRATUM]
    if relocate:
        assert [type(step) for step in plan.steps] == [Shift]
        assert errata == [(("status", "returned"),)]
    else:
        assert not plan.steps
        assert errata == [(("status", "shipped"),), (("status", "returned"),)]
        assert plan.after.superseded(1)
        assert not plan.after.superseded(3)
        silent = plan_edit(*inside, {"status": "pending"}, Mode.IN_PLACE, tools(relocate=False))
        assert silent.used is Mode.FIELD_ERRATUM
        assert "cannot be cut out" in silent.why


def test_two_hundred_edits_of_five_fields_leave_five_errata() -> None:
    names = [f"field_{number}" for number in range(5)]
    now = context(**dict.fromkeys(names, "new"))
    lengths = []
    for number in range(200):
        plan = plan_edit(*now, {names[number % 5]: f"value {number % 7}"}, Mode.FIELD_ERRATUM, tools())
        now = enacted(plan, now[1])
        lengths.append(len(now[0]))
    assert len(now[0].errata) <= 5
    assert max(lengths[20:]) <= 1.2 * min(lengths[5:20])
    assert len(now[1].runs) < 60, "the ledger does not grow either"


def test_the_default_is_never_dearer_than_what_is_exact() -> None:
    names = [f"field_{number}" for number in range(12)]
    now = context(", ", **dict.fromkeys(names, "new"))
    plan = plan_edit(*now, dict.fromkeys(names, "old"), None, tools())
    errata = plan_edit(*now, dict.fromkeys(names, "old"), Mode.FIELD_ERRATUM, tools())
    assert plan.used is Mode.SUFFIX
    assert plan.asked is None
    assert plan.tokens_computed <= errata.tokens_computed
    assert "leaves no token that has read another value" in plan.why
    assert plan_edit(*turn(*now, "so? " * 200), {"status": "old"}, None, tools()).used is Mode.FIELD_ERRATUM


def test_rebase_writes_what_errata_state_as_far_as_it_may() -> None:
    now = enacted(plan_edit(*context(), {"status": "shipped", "tier": "silver"}, Mode.ERRATUM, tools()), context()[1])
    now = turn(*now)
    plan = plan_rebase(*now, tools(), None)
    assert not plan.after.errata
    assert "status: shipped" in plan.after.text
    after, ledger = enacted(plan, now[1])
    assert ledger.weakest(after.values, after.first_places) is TokenState.EXACT
    near = plan_rebase(*now, tools(), plan.tokens_computed - 1)
    assert "tier: silver" in near.after.text, "the later field is the cheaper one"
    assert "status: pending" in near.after.text
    assert "more than" in near.why
    assert plan_rebase(*context(), tools(), None).tokens_computed == 0


def test_recompute_begins_at_the_first_inexact_token() -> None:
    before, ledger = context()
    assert plan_recompute(before, ledger, None).tokens_computed == 0
    changed, entered = enacted(plan_edit(before, ledger, {"tier": "silver"}, Mode.IN_PLACE, tools()), ledger)
    plan = plan_recompute(changed, entered, None)
    assert plan.compute[0].span == Span(changed.spans("tier")[0].stop, len(changed))


def test_compositions_are_plans_too() -> None:
    before, ledger = context()
    now = turn(before, ledger)
    end, middle = len(now[0]), len(before)
    assert plan_cut(now[0], Span(middle, end)).steps == (Truncate(middle),)
    assert plan_cut(now[0], Span(0, middle)).steps == (Shift(middle, 0),)
    assert not plan_cut(now[0], Span(0, middle)).after.fields, "the fields have no place any more"
    move = plan_move(now[0], Span(middle, end), 0)
    assert move.steps == (Exchange(0, middle, end),)
    assert move.after.text == "and now? " + before.text
    assert not plan_move(now[0], Span(middle, end), end).steps
    with pytest.raises(InvalidEditError, match="into themselves"):
        plan_move(now[0], Span(0, middle), 1)
    long, _ = context(status="cancelled by the customer")
    inside = Span(0, long.spans("status")[0].start + 1)
    with pytest.raises(InvalidEditError, match="inside the value"):
        plan_cut(long, inside)
    with pytest.raises(UnknownPartError):
        before.split_at(10_000)


def test_the_table_of_modes() -> None:
    assert set(STRATEGIES) == set(Mode)
    assert mode_of(writes=True, states=False) is Mode.IN_PLACE
    assert mode_of(writes=False, states=False) is Mode.STALE
    with pytest.raises(InvalidEditError, match="field_erratum"):
        parse_mode("magic")


def test_a_notebooks_plan_is_what_its_account_says_and_touches_nothing() -> None:
    model = tiny()
    notebook = Notebook(model).message("system", "status: {status}. policy: reply only.", status="pending")
    notebook.message("user", "the customer asks to cancel").prefill()
    skill = Skill.compile(model, "date policy: orders are returned.\n", name="dates")
    for make in (
        lambda n: n.edit(status="cancelled by the customer", mode="field_erratum"),
        lambda n: n.edit(status="shipped", mode="selective", k=2),
        lambda n: n.splice(skill, at=0),
        lambda n: n.splice(skill, repair=SeamRepair(2, "influence:3")),
        lambda n: n.cut(Span(0, 3)),
        lambda n: n.move(Span(0, 3)),
        lambda n: n.recompute(2),
        lambda n: n.rebase(),
    ):
        ids, states, length = notebook.ids, notebook.states, notebook.cache.length
        plan = make(notebook.plan)
        assert (notebook.ids, notebook.states, notebook.cache.length) == (ids, states, length)
        mark = notebook.mark()
        account = make(notebook)
        if plan.selects:  # a selection may choose tokens that are computed anyway
            assert plan.tokens_computed - 2 <= account.tokens_computed <= plan.tokens_computed
        else:
            assert account.tokens_computed == plan.tokens_computed
        assert account.tokens_relocated == plan.tokens_relocated
        assert account.why == plan.why
        assert (account.operation, account.mode_asked, account.mode_used) == (plan.operation, plan.asked, plan.used)
        assert len(notebook) == len(plan.after)
        assert account.exactness is max(notebook.states, key=lambda state: state.rank, default=TokenState.EXACT)
        notebook.rollback(mark)
