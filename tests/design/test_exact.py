"""Under `visibility="design"` every token called exact equals one dense forward by transformers under the same mask.

This is checked in float64, in every layer, on every family, and after programs of operations. Negative: a token called
stale differs, the mask matters, and an edit computes only what read the change.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import dense_mask, masked_forward, tokens_of

from conftest import tiny
from programmable_kv import Field, Notebook, Skill
from programmable_kv.states import TokenState
from reference import Layers, assert_rows_equal, full_forward, largest_difference

POLICY = (
    "order status: {status}\ntier: {tier}\nbe polite.\nif the status is one then deny,\nif two cancel.\n"
    "the tier gold may refund.\nof status and tier, the tier decides.\n"
    "notes:\n{notes}\nreply only.\n"
)
WORDS = {"status": ["status"], "tier": ["tier"], "notes": ["notes"]}
VALUES = {
    "status": ["shipped", "pending", "x", "cancelled by the customer"],
    "tier": ["gold", "silver", "guest of the gold tier"],
    "notes": ["", "- refund: asked\n- date: 2026", "- refund: asked"],
}
SKILLS = {
    "refunds": "refund policy:\nif returned then refund.\n",
    "dates": "the date is 2026-11-24.\nask when delivered.\n",
}


def build(model: Any, **values: str) -> Notebook:
    notebook = Notebook(model, visibility="design")
    first = {name: values.get(name, known[0]) for name, known in VALUES.items()}
    notes = Field(first["notes"], kind="block")
    notebook.message("system", POLICY, status=first["status"], tier=first["tier"], notes=notes)
    notebook.message("user", "the customer asks to cancel")
    notebook.prefill()
    return notebook


def expected(notebook: Notebook) -> Layers:
    mask = dense_mask(tokens_of(notebook, {name: WORDS[name] for name in WORDS if name in notebook.fields}))
    model = notebook.model.engine.model
    return masked_forward(model, notebook.ids, notebook.cache.positions.tolist(), mask)[0]


def exact_slots(notebook: Notebook) -> list[int]:
    return [slot for slot, state in enumerate(notebook.states) if state is TokenState.EXACT]


def atol(model_type: str, moved: bool) -> float:
    """transformers computes rotary angles in float32, so a relocated key differs in the seventh digit."""
    return 2e-4 if model_type == "gemma2" else 1e-5 if moved else 1e-9


def assert_truthful(notebook: Notebook, model_type: str = "llama", moved: bool = True) -> None:
    """Exact tokens equal the forward, and stale tokens, if there are any, do not."""
    layers = expected(notebook)
    assert_rows_equal(notebook.cache, layers, exact_slots(notebook), atol=atol(model_type, moved))
    stale = [slot for slot, state in enumerate(notebook.states) if state is TokenState.STALE]
    if stale:
        assert largest_difference(notebook.cache, layers, stale) > 1e-6


def test_prefill_equals_one_masked_forward(model_type: str) -> None:
    notebook = build(tiny(model_type))
    assert set(notebook.states) == {TokenState.EXACT}
    assert_truthful(notebook, model_type, moved=False)
    causal, _ = full_forward(notebook.model.engine.model, notebook.ids)
    assert largest_difference(notebook.cache, causal, range(len(notebook))) > 1e-3, "the mask must matter"


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, known in VALUES.items() for value in known[1:]])
def test_an_edit_equals_a_prefill_of_the_new_text(model_type: str, name: str, value: str) -> None:
    notebook = build(tiny(model_type))
    account = notebook.edit({name: value})
    assert set(notebook.states) == {TokenState.EXACT}
    assert notebook.fields[name] == value
    assert_truthful(notebook, model_type)
    assert account.exactness is TokenState.EXACT


def test_an_edit_within_its_place_computes_what_read_the_field_and_nothing_else() -> None:
    notebook = build(tiny())
    before = notebook.fork()
    account = notebook.edit(status="pending")
    tokens = tokens_of(notebook, WORDS)
    readers = [t for t in tokens if t.kind == "turn" or "status" in t.fields]
    # The line about both fields reads the status; no later line reads only the tier.
    assert account.tokens_computed == len(readers) < len(notebook) / 2
    untouched = [s for s, t in enumerate(tokens) if t.kind == "text" or t.fields == {"tier"}]
    for layer in range(len(notebook.cache)):
        old, new = (cache.keys(layer)[:, :, untouched] for cache in (before.cache, notebook.cache))
        if len(before) == len(notebook):
            assert (old == new).all()


def test_readers_of_readers_are_built_again() -> None:
    """The tier's later lines read the line about both fields, and so they depend on the status."""
    notebook = Notebook(tiny(), visibility="design")
    text = "status: {status}\ntier: {tier}\nthe status decides the tier.\nthe tier gold may refund.\n"
    notebook.message("system", text, status="shipped", tier="gold").message("user", "refund?").prefill()
    computed = [one.span for one in notebook.plan.edit(status="pending").compute]
    line = notebook.rendered_text.index("the tier gold")
    slot = next(s for s in range(len(notebook)) if _character(notebook, s) >= line)
    assert any(slot in span.range for span in computed)
    notebook.edit(status="pending")
    assert set(notebook.states) == {TokenState.EXACT}
    assert_truthful(notebook)


def _character(notebook: Notebook, slot: int) -> int:
    context = notebook._state.context
    unit = context.unit_at(slot)
    before = sum(len(each.text) for each in context.units[:unit])
    return before + int(context.units[unit].offsets[slot - context.starts[unit], 0])


def test_a_value_that_outgrows_its_place_moves_and_rebuilds_what_follows() -> None:
    notebook = build(tiny())
    account = notebook.edit(status="cancelled by the customer")
    assert account.tokens_relocated
    assert "grew" in account.why
    again = notebook.edit(status="x")
    assert "grew" not in again.why
    assert again.tokens_computed < account.tokens_computed
    assert_truthful(notebook)


def test_a_skill_compiled_alone_is_the_one_prefilled_in_place(model_type: str) -> None:
    model = tiny(model_type)
    skill = Skill.compile(model, SKILLS["refunds"], name="refunds")
    inside = Notebook(model, visibility="design")
    inside.message("system", "be polite.\n{refunds}\nreply only.\n", refunds=skill).message("user", "refund?").prefill()
    assert set(inside.states) == {TokenState.EXACT}
    assert_truthful(inside, model_type)


def test_skills_in_another_order_cost_no_forward_of_theirs() -> None:
    model = tiny()
    skills = [Skill.compile(model, text, name=name) for name, text in SKILLS.items()]
    notebook = Notebook(model, visibility="design")
    notebook.message("system", "be polite.\n{refunds}{dates}", **{skill.name: skill for skill in skills})
    notebook.prefill()
    account = notebook.move("dates", to=notebook.part("refunds"))
    assert account.tokens_computed <= 3, "the text behind them stands where it stood"
    assert set(notebook.states) == {TokenState.EXACT}
    assert_truthful(notebook)
    moved = notebook.fork()
    notebook.cut("refunds")
    assert set(notebook.states) == {TokenState.EXACT}
    assert_truthful(notebook)
    notebook.splice(skills[0], at=moved.part("refunds").span.start)
    assert notebook.ids == moved.ids
    assert_truthful(notebook)


@pytest.mark.parametrize(("turns", "kept"), [("open", True), ("keep", True), ("all", False)])
def test_earlier_turns_are_history_unless_they_are_asked_for(turns: str, kept: bool) -> None:
    notebook = build(tiny())
    notebook.decide(options=["deny", "cancel"], keep=True)
    notebook.add("user", "and the tier?")
    account = notebook.edit(status="pending", turns=turns)
    assert ("history" in account.why) is kept
    assert (TokenState.STALE in notebook.states) is kept
    assert (TokenState.AFTER_EDIT in notebook.states) is (turns == "open")
    assert_truthful(notebook)
    notebook.recompute()
    assert set(notebook.states) == {TokenState.EXACT}
    assert_truthful(notebook)


def test_a_value_that_changes_back_leaves_the_kept_turns_exact() -> None:
    notebook = build(tiny())
    notebook.decide(options=["deny", "cancel"], keep=True)
    notebook.edit(status="pending")
    assert TokenState.STALE in notebook.states
    notebook.edit(status="shipped")
    assert set(notebook.states) == {TokenState.EXACT}
    assert_truthful(notebook)


def test_words_declared_later_make_their_lines_stale_and_an_edit_mends_them() -> None:
    notebook = build(tiny())
    notebook.mentions("status", "polite")
    assert TokenState.STALE in notebook.states
    notebook.edit(status="pending")
    assert set(notebook.states) == {TokenState.EXACT}
    mask = dense_mask(tokens_of(notebook, {**WORDS, "status": ["status", "polite"]}))
    layers, _ = masked_forward(notebook.model.engine.model, notebook.ids, notebook.cache.positions.tolist(), mask)
    assert_rows_equal(notebook.cache, layers, range(len(notebook)), atol=1e-5)


def test_an_edit_and_a_question_go_into_one_forward() -> None:
    notebook, other = build(tiny()), build(tiny())
    asked = notebook.decide("what now?", ["deny", "cancel"], edits={"status": "pending"})
    other.edit(status="pending")
    assert asked.log_probabilities == pytest.approx(other.decide("what now?", ["deny", "cancel"]).log_probabilities)


OPERATIONS = st.one_of(
    st.tuples(
        st.just("edit"), st.sampled_from(sorted(VALUES)), st.integers(0, 4), st.sampled_from(["open", "keep", "all"])
    ),
    st.tuples(st.just("splice"), st.sampled_from(sorted(SKILLS)), st.integers(0, 20)),
    st.tuples(st.just("cut"), st.integers(0, 20)),
    st.tuples(st.just("move"), st.integers(0, 20), st.integers(0, 20)),
    st.tuples(st.just("add"), st.sampled_from(["and now?", "it was returned"])),
    st.tuples(st.just("keep"), st.sampled_from(["deny or cancel?", "refund?"])),
    st.tuples(st.just("recompute")),
    st.tuples(st.just("mention"), st.sampled_from(["status", "tier"]), st.sampled_from(["refund", "reply", "one"])),
    st.tuples(st.just("fork")),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(program=st.lists(OPERATIONS, max_size=7), model_type=st.sampled_from(["llama", "mistral", "gemma3_text"]))
def test_whatever_is_done_what_is_called_exact_is(program: list[tuple[Any, ...]], model_type: str) -> None:
    model = tiny(model_type)
    skills = {name: Skill.compile(model, text, name=name) for name, text in SKILLS.items()}
    notebook = build(model)
    words = {name: list(known) for name, known in WORDS.items()}
    for operation, *arguments in program:
        parts = notebook.parts
        match operation:
            case "edit":
                name, number, turns = arguments
                if name in notebook.fields:
                    notebook.edit({name: VALUES[name][number % len(VALUES[name])]}, turns=turns)
            case "splice":
                name, number = arguments
                if not any(part.name == name for part in parts):
                    notebook.splice(
                        skills[name],
                        at=[*(part.span.start for part in parts), len(notebook)][number % (len(parts) + 1)],
                    )
            case "cut":
                part = parts[arguments[0] % len(parts)]
                if part.kind == "skill":
                    notebook.cut(part)
            case "move":
                part = parts[arguments[0] % len(parts)]
                target = [*(each.span.start for each in parts), len(notebook)][arguments[1] % (len(parts) + 1)]
                if part.kind == "skill":
                    notebook.move(part, to=target)
            case "add":
                notebook.add("user", arguments[0])
            case "keep":
                notebook.decide(arguments[0], ["deny", "cancel"], keep=True)
            case "recompute":
                notebook.recompute()
                assert set(notebook.states) == {TokenState.EXACT}
            case "mention":
                name, word = arguments
                notebook.mentions(name, word)
                words[name].append(word)
            case "fork":
                notebook = notebook.fork()
        positions = notebook.cache.positions.tolist()
        mask = dense_mask(tokens_of(notebook, words))
        layers, _ = masked_forward(model.engine.model, notebook.ids, positions, mask)
        assert_rows_equal(notebook.cache, layers, exact_slots(notebook), atol=1e-5)
    notebook.recompute()
    assert set(notebook.states) == {TokenState.EXACT}
    layers, _ = masked_forward(
        model.engine.model, notebook.ids, notebook.cache.positions.tolist(), dense_mask(tokens_of(notebook, words))
    )
    assert_rows_equal(notebook.cache, layers, range(len(notebook)), atol=1e-5)
