"""Blocks, which are values of several lines or of none: every edit mode, compared with full forwards."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import tiny
from programmable_kv import Field, Mode, Notebook, SeamRepair, Skill
from programmable_kv.cache.span import Span
from programmable_kv.errors import InvalidEditError
from programmable_kv.prompt.units import Kind
from programmable_kv.states import TokenState
from reference import assert_rows_equal, full_forward, largest_difference

TODO = "- [ ] call the customer\n- [ ] refund the order\n- [x] check the policy\n"
BLOCKS = [
    "",
    TODO,
    TODO.replace("[ ] refund", "[x] refund"),
    TODO + "- [ ] reply\n",
    "one line",
    "\n",
    "Ada Lovelace\n12 St James's Square\r\nLondon",
    "| item | price |\n| --- | --- |\n| tea | 3.20 |",
]


def build(todo: Any = TODO, model: Any = None, *, raw: bool = False) -> Notebook:
    notebook = Notebook(model or tiny())
    text = "status: {status}\ntodo:\n{todo}\npolicy: if one then deny, if two cancel. reply only."
    (notebook.text if raw else lambda t, **f: notebook.message("system", t, **f))(
        text, status="pending", todo=Field.block(todo)
    )
    if not raw:
        notebook.message("user", "the customer asks to cancel")
    notebook.prefill()
    return notebook


def exact_where_it_says_so(notebook: Notebook) -> None:
    """Every token that is called exact equals a full forward."""
    expected, _ = full_forward(notebook.model.engine.model, notebook.ids)
    exact = [slot for slot, state in enumerate(notebook.states) if state.exact]
    assert_rows_equal(notebook.cache, expected, exact, atol=1e-9)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("after", BLOCKS, ids=ascii)
@pytest.mark.parametrize(("before", "raw"), [("", True), (TODO, False)], ids=["empty, raw", "list, chat"])
def test_blocks_in_every_mode(mode: Mode, before: str, after: str, raw: bool) -> None:
    notebook = build(before, raw=raw)
    account = notebook.edit(todo=after, mode=mode, k=3)
    assert notebook.fields["todo"] == after
    exact_where_it_says_so(notebook)
    if mode in (Mode.SUFFIX, Mode.FULL):
        assert notebook.ids == build(after, raw=raw).ids
        assert account.exact
    if mode in (Mode.IN_PLACE, Mode.FIELD_ERRATUM, Mode.SELECTIVE) and before != after:
        fresh = build(after, raw=raw).ids
        assert notebook.ids[: len(fresh)] == fresh
        assert not account.exact
        expected, _ = full_forward(notebook.model.engine.model, notebook.ids)
        stale = [slot for slot, state in enumerate(notebook.states) if state is TokenState.STALE]
        assert largest_difference(notebook.cache, expected, stale) > 1e-6, "a mode that did too much would pass unseen"
    if mode in (Mode.ERRATUM, Mode.FIELD_ERRATUM) and before != after:
        told = notebook.parts[-1]
        assert told.kind is Kind.ERRATUM
        assert told.text.count("todo is now:") == 1
        assert after.strip() in told.text or "(- removed, + added)" in told.text
    notebook.edit(todo=before, mode="suffix")
    assert notebook.ids == build(before, raw=raw).ids
    assert set(notebook.states) == {TokenState.EXACT}
    exact_where_it_says_so(notebook)


@pytest.mark.parametrize("mode", [Mode.IN_PLACE, Mode.FIELD_ERRATUM, Mode.SUFFIX])
def test_a_block_that_empties_and_fills_again_is_exact_again(mode: Mode) -> None:
    notebook = build()
    ids = notebook.ids
    notebook.edit(todo="", mode=mode)
    assert not len(notebook.spans("todo")[0])
    notebook.edit(todo=TODO, mode=mode)
    notebook.edit(todo=TODO, mode="in_place")
    assert notebook.ids[: len(ids)] == ids
    assert notebook.states[: len(ids)] == [TokenState.EXACT] * len(ids)
    exact_where_it_says_so(notebook)


def test_an_edit_to_the_same_empty_block_computes_nothing() -> None:
    notebook = build("")
    for mode in (Mode.IN_PLACE, Mode.FIELD_ERRATUM, Mode.SUFFIX):
        assert notebook.edit(todo="", mode=mode).tokens_computed == 0
    assert set(notebook.states) == {TokenState.EXACT}


def test_neighbouring_empty_blocks_keep_apart() -> None:
    def made(**values: str) -> Notebook:
        notebook = Notebook(tiny()).text(
            "a{one}{two} b{three}", **{name: Field.block(it) for name, it in values.items()}
        )
        notebook.prefill()
        return notebook

    notebook = made(one="", two="", three="")
    for change in ({"two": "x"}, {"one": "- a\n"}, {"three": "end"}, {"two": ""}, {"one": "", "three": ""}):
        notebook.edit(change, mode="in_place")
        assert notebook.ids == made(**notebook.fields).ids
        exact_where_it_says_so(notebook)


def test_a_block_between_skills_can_become_empty_but_not_begin_so() -> None:
    model = tiny()
    first, second = (
        Skill.compile(model, text, name=name) for text, name in (("the order. ", "one"), ("refunds. ", "two"))
    )

    def made(note: str) -> Notebook:
        notebook = Notebook(model).text("{one}{note}{two}", one=first, two=second, note=Field.block(note))
        notebook.prefill(repair=SeamRepair(0))
        return notebook

    with pytest.raises(InvalidEditError, match="no text on either side"):
        made("")
    notebook = made("now ")
    ids = notebook.ids
    notebook.edit(note="", mode="in_place")
    assert len(notebook) == len(first) + len(second)
    assert len(notebook.parts) >= 2
    notebook.add("user", "so?")
    notebook.edit(note="now ", mode="in_place")
    assert notebook.ids[: len(ids)] == ids
    notebook.edit(note="now ", mode="full")
    exact_where_it_says_so(notebook)


def test_an_empty_block_at_a_seam_stays_in_one_part() -> None:
    """A skill is spliced at an empty value, parts are moved and cut, and the value keeps its one place."""
    notebook = Notebook(tiny()).text("the order. {note}the policy says so. ", note=Field.block(""))
    notebook.prefill()
    place = notebook.spans("note")[0]
    skill = Skill.compile(notebook.model, "refund policy. ", name="refunds")
    notebook.splice(skill, at=place.start, repair=SeamRepair(0))
    assert len(notebook.spans("note")) == 1
    notebook.edit(note="now ", mode="in_place")
    assert notebook.rendered_text.count("now ") == 1
    exact_where_it_says_so(notebook)
    notebook.edit(note="", mode="in_place")
    notebook.move("refunds")
    notebook.cut(Span(0, 2))
    notebook.edit(note="now ", mode="full")
    exact_where_it_says_so(notebook)


def test_saved_with_an_empty_block(tmp_path: Any) -> None:
    notebook = build("")
    notebook.save(tmp_path / "n")
    loaded = Notebook.load(tmp_path / "n", notebook.model)
    for each in (notebook, loaded):
        each.edit(todo=TODO)
    assert loaded.ids == notebook.ids


# -- how it is told ----------------------------------------------------------------------------------------------------

LONG = "".join(f"- [ ] task number {number} for the customer\n" for number in range(20))


def told(notebook: Notebook) -> str:
    return next(part.text for part in reversed(notebook.parts) if part.kind is Kind.ERRATUM)


def test_a_few_changed_lines_are_told_alone() -> None:
    notebook = build(LONG, tiny(max_position_embeddings=4096))
    notebook.edit(todo=LONG.replace("[ ] task number 7 ", "[x] task number 7 "), mode="field_erratum")
    assert (
        "todo is now: as above, but for these lines (- removed, + added)\n"
        " - [ ] task number 6 for the customer\n"
        "-- [ ] task number 7 for the customer\n"
        "+- [x] task number 7 for the customer\n"
        " - [ ] task number 8 for the customer"
    ) in told(notebook)


def test_a_difference_is_told_only_to_readers_who_all_know_the_same_block() -> None:
    """After an edit that is not exact, the readers have read two blocks: the erratum then states the whole block."""
    notebook = build(LONG, tiny(max_position_embeddings=4096))
    notebook.edit(todo=LONG.replace("[ ] task number 7 ", "[x] task number 7 "), mode="field_erratum")
    notebook.add("user", "so?")
    newer = LONG.replace("[ ] task number 9 ", "[x] task number 9 ")
    notebook.edit(todo=newer, mode="field_erratum")
    assert newer.strip() in told(notebook)
    notebook.edit(todo=newer, mode="suffix")
    notebook.edit(todo=LONG, mode="erratum")
    assert "as above" in told(notebook)
    assert "+- [ ] task number 9" in told(notebook)


def test_a_block_that_changes_much_is_told_whole() -> None:
    notebook = build(LONG, tiny(max_position_embeddings=4096))
    other = LONG.replace("[ ]", "[x]")
    notebook.edit(todo=other, mode="field_erratum")
    assert f"todo is now:\n{other.strip()}" in told(notebook)
    notebook.edit(todo="", mode="field_erratum")
    assert "todo is now: (empty)" in told(notebook)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("NOTICE: {name} was corrected to {value}", "NOTICE: todo was corrected to\n- a\n- b"),
        ("{value} is what {name} says now.", "\n- a\n- b\n is what todo says now."),
        ('{"update": {"{name}": "{value}"}}', '{"update": {"todo": "- a\\n- b"}}'),
    ],
)
def test_a_block_in_ones_own_template(template: str, expected: str) -> None:
    notebook = Notebook(tiny(), erratum_template=template).message("system", "todo:\n{todo}\nend", todo=Field.block(""))
    notebook.prefill()
    notebook.edit(todo="- a\n- b", mode="field_erratum")
    assert expected in told(notebook)


@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_sequence_of_block_edits_says_the_truth(data: st.DataObject) -> None:
    notebook = build(data.draw(st.sampled_from(BLOCKS)), raw=data.draw(st.booleans()))
    for _ in range(data.draw(st.integers(1, 4))):
        what = data.draw(st.sampled_from(["block", "both", "add"]))
        if what == "add":
            notebook.add("user", "and now?")
            continue
        change = {"todo": data.draw(st.sampled_from(BLOCKS))}
        if what == "both":
            change["status"] = data.draw(st.sampled_from(["shipped", "cancelled by the customer"]))
        notebook.edit(change, mode=data.draw(st.sampled_from([None, *Mode])), k=3)
        exact_where_it_says_so(notebook)
        for span in notebook.spans("todo"):
            assert span.stop <= len(notebook)
    notebook.edit(notebook.fields, mode="full")
    assert set(notebook.states) == {TokenState.EXACT}
    exact_where_it_says_so(notebook)
