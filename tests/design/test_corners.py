"""Regression tests of `visibility="design"`: empty values, room at the end, rounded skills, words and marks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import dense_mask, masked_forward, tokens_of
from test_exact import atol, exact_slots

from conftest import tiny, with_beginning
from programmable_kv import Field, Notebook, Skill
from programmable_kv.errors import CacheBufferError, OutOfStepError, UnknownPartError
from programmable_kv.prompt.units import Kind
from programmable_kv.states import TokenState
from reference import assert_rows_equal, assert_same

REFUNDS = "refund policy:\nif returned then refund.\n"


def block(value: str) -> Field:
    return Field(value, kind="block")


def design(model: Any = None) -> Notebook:
    return Notebook(model or tiny(), visibility="design")


def assert_true(notebook: Notebook, **words: list[str]) -> None:
    names = {name: [name, *words.get(name, [])] for name in notebook.fields}
    positions = notebook.cache.positions.tolist()
    layers, _ = masked_forward(
        notebook.model.engine.model, notebook.ids, positions, dense_mask(tokens_of(notebook, names))
    )
    assert_rows_equal(notebook.cache, layers, exact_slots(notebook), atol=atol("llama", moved=True))


def test_what_is_cut_or_moved_takes_no_empty_neighbour_along() -> None:
    model = tiny()
    skill = Skill.compile(model, REFUNDS, name="refunds")
    text = "be polite.\n{refunds}{notes}reply only.\n"
    notebook = design(model).message("system", text, refunds=skill, notes=block("")).message("user", "ask")
    notebook.prefill()
    moved = notebook.fork()
    notebook.cut("refunds")
    notebook.edit(notes="- a")
    assert "be polite.\n- areply only." in notebook.rendered_text
    assert_true(notebook)
    moved.move("refunds", to=0)
    moved.edit(notes="- a")
    assert "be polite.\n- areply only." in moved.rendered_text
    assert_true(moved)


def test_an_empty_part_can_be_named_and_not_cut() -> None:
    notebook = design().message("system", "be polite.\n{notes}reply only.\n", notes=block("")).message("user", "ask")
    notebook.prefill()
    empty = next(part for part in notebook.parts if not len(part.span))
    with pytest.raises(UnknownPartError, match="has no tokens"):
        notebook.cut(empty)
    notebook.splice(Skill.compile(notebook.model, REFUNDS, name="refunds"), at=empty)
    assert notebook.fields == {"notes": ""}
    assert_true(notebook)


def test_room_at_the_end_is_given_back(tmp_path: Path) -> None:
    notebook = design().text(
        "hello.\nif alpha is x then y.\nalpha: {alpha}{beta}", alpha="x", beta=block("one\ntwo\nthree")
    )
    notebook.prefill()
    notebook.edit(beta="")
    notebook.decide(" what now?", ["deny", "cancel"], keep=True)
    assert notebook.cache.next_position == notebook._state.context.begins[-1]
    notebook.save(tmp_path / "saved")
    assert_same(Notebook.load(tmp_path / "saved", notebook.model), notebook)


@pytest.mark.parametrize("beginning", [False, True])
def test_a_skill_in_fewer_bits_is_relocated_and_stays(beginning: bool) -> None:
    model = with_beginning(tiny()) if beginning else tiny()
    skill = Skill.compile(model, "the date is {date}.\nask when near.\n", date="2026", name="dates")
    notebook = design(model).message("system", "be polite.\n{dates}", dates=replace(skill, rounded=True))
    account = notebook.message("user", "ask").prefill()
    assert account.tokens_computed == len(notebook) - len(skill)
    assert notebook.part("dates").state is TokenState.RELOCATED
    assert notebook.states[0] is TokenState.EXACT
    assert notebook.states[-1] is TokenState.AFTER_EDIT, "the turn has read rounded numbers"


def test_what_a_part_is_does_not_depend_on_values() -> None:
    first = design().text("hello.\nnotes\n{alpha}\n", alpha=block(""))
    first.prefill()
    first.edit(alpha="one\ntwo")
    second = design().text("hello.\nnotes\n{alpha}\n", alpha=block("one\ntwo"))
    second.prefill()
    assert [part.kind for part in first.parts] == [part.kind for part in second.parts]


def test_values_side_by_side_make_their_line_a_reader_of_both() -> None:
    notebook = design().message(
        "system", "x {alpha}{beta} one two\nalpha says hi.\nbe polite.\n", alpha=block(""), beta="y"
    )
    notebook.message("user", "ask").prefill()
    assert_true(notebook)
    notebook.edit(alpha="- a", beta="z")
    assert set(notebook.states) == {TokenState.EXACT}
    assert_true(notebook)


def test_words_outlive_a_rollback_and_wait_for_a_stream() -> None:
    notebook = design().message("system", "be polite.\nstatus: {status}\nbe kind.\n", status="x").message("user", "ask")
    notebook.prefill()
    mark = notebook.mark()
    notebook.mentions("status", "kind")
    notebook.rollback(mark)
    assert TokenState.STALE in notebook.states, "the line was built without the field"
    notebook.edit(status="y")
    assert set(notebook.states) == {TokenState.EXACT}
    assert_true(notebook, status=["kind"])
    stream = notebook.generate(max_new_tokens=2)
    next(stream, None)
    with pytest.raises(OutOfStepError):
        notebook.mentions("status", "polite")
    stream.close()


def test_readers_are_what_an_edit_computes_in_turns_and_skills_too() -> None:
    model = tiny()
    skill = Skill.compile(model, "first part.\nsecond {v} end.\n", v="x", name="dates")
    notebook = design(model).message("system", "be polite.\n{dates}", dates=skill).message("user", "hello")
    notebook.message("assistant", "status: {status}", status="x").message("user", "what now?").prefill()
    for name, value in (("status", "y"), ("v", "y")):
        listed = {slot for reader in notebook.readers(name) for slot in reader.span.range}
        own = {slot for span in notebook.spans(name) for slot in span.range}
        computed = {slot for one in notebook.plan.edit({name: value}).compute for slot in one.span.range}
        assert listed | own == computed


def test_the_reason_says_which_field_and_which_way() -> None:
    notebook = design().message("system", "status: {status}\nbe kind.\n", status="x").message("user", "ask")
    notebook.prefill()
    assert "the text with status grew by" in notebook.edit(status="cancelled by the customer").why
    assert "grew" not in notebook.edit(status="cancelled by the customer and the shop").why, "there is room now"


def test_recompute_from_a_slot_begins_with_the_part_that_holds_it() -> None:
    model = tiny()
    skill = Skill.compile(model, REFUNDS, name="refunds")
    notebook = design(model).message("system", "be polite.\n{refunds}", refunds=skill).message("user", "ask")
    notebook.prefill()
    plan = notebook.plan.recompute(1)
    assert plan.compute[0].span.start == 0
    assert "skills are not recomputed" in plan.why


def test_exchanged_runs_are_given_positions_that_fit() -> None:
    model = tiny()
    buffer = model.engine.new_buffer()
    model.engine.append(buffer, [5, 6, 7, 8, 9, 10])
    layout = model.engine.require_relocation()
    for positions in ([0], [9, 8, 7, 6], [0, 1, 2, 4]):
        with pytest.raises(CacheBufferError, match="ascending"):
            buffer.exchange(0, 2, 4, layout, positions)
    buffer.exchange(0, 2, 4, layout, [0, 1, 2, 3])


def test_no_special_token_is_cut_where_the_turns_begin() -> None:
    """Phi-3's template ends a message with a token that begins like the next message's first token."""
    text = (Path(__file__).parents[1] / "templates" / "phi3.jinja").read_text(encoding="utf-8")
    import copy

    model = tiny()
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = text
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]})
    model = replace(model, tokenizer=tokenizer)
    made = {}
    for visibility in ("causal", "design"):
        notebook = Notebook(model, visibility=visibility)
        notebook.message("system", "be polite.\n").message("user", "hello").message("assistant", "hello")
        made[visibility] = notebook.message("user", "what now?")
    from programmable_kv.design.units import designed_pieces

    special = set(tokenizer.all_special_ids)
    units = [unit for piece in designed_pieces(made["design"].prompt, tokenizer) for unit in piece]  # type: ignore[union-attr]
    found = [token for unit in units for token in unit.ids if token in special]  # type: ignore[union-attr]
    whole = tokenizer(made["causal"].rendered().text, add_special_tokens=False)["input_ids"]
    assert found == [token for token in whole if token in special]
    assert {unit.kind for unit in units} >= {Kind.PREFILL, Kind.TURN}  # type: ignore[union-attr]


def test_the_room_of_an_earlier_value_stays_and_that_of_an_enum_is_always_the_same() -> None:
    def written(value: str | Field) -> Notebook:
        notebook = design().message("system", "status: {status}\nif x deny.\n", status=value).message("user", "ask")
        notebook.prefill()
        return notebook

    long = "waiting for a second signature"
    edited, fresh = written(long), written("x")
    account = edited.edit(status="x")
    assert account.exact
    assert edited.ids == fresh.ids
    assert edited.cache.positions.tolist() != fresh.cache.positions.tolist()
    assert_true(edited)
    written_anew = edited.edit(status="x", mode="full")
    assert written_anew.tokens_computed == len(edited)
    assert edited.cache.positions.tolist() == fresh.cache.positions.tolist(), "full is a new prefill, its room included"
    for layer in range(len(edited.cache)):
        torch.testing.assert_close(edited.cache.keys(layer), fresh.cache.keys(layer), rtol=0, atol=1e-9)
    roomy = [written(Field(value, room=40)) for value in (long, "x")]
    roomy[0].edit(status="x")
    assert roomy[0].cache.positions.tolist() == roomy[1].cache.positions.tolist()
    assert "grew" in written(Field("x", room=1)).edit(status=long).why, "a longer value than was expected still fits"
    of_two = [written(Field.enum(value, among=("x", long))) for value in (long, "x")]
    of_two[0].edit(status="x")
    assert of_two[0].cache.positions.tolist() == of_two[1].cache.positions.tolist()
