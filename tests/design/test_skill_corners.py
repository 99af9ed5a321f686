"""Regression tests for faults in skills with fields that a review with hostile programs found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import layers_of

from conftest import tiny, with_beginning
from programmable_kv import Field, Notebook, Skill, SkillStore
from programmable_kv.cache.span import Span
from programmable_kv.errors import (
    CorruptFileError,
    InvalidArgumentError,
    InvalidValueError,
    UnknownFieldError,
    UnknownPartError,
)
from programmable_kv.states import TokenState
from reference import assert_rows_equal

ZONE = "the zone is {zone}.\nfor zone two ask.\nof two none.\n"


def block(value: str) -> Any:
    return Field(value, kind="block")


def compiled(model: Any, text: str, **fields: Any) -> Skill:
    return Skill.compile(model, text, name="s", visibility="design", **fields)


def prefilled(model: Any, text: str, **fields: Any) -> Notebook:
    notebook = Notebook(model, visibility="design")
    notebook.message("system", text, **fields).message("user", "refund?").prefill()
    return notebook


def assert_all_exact(notebook: Notebook, **words: list[str]) -> None:
    assert set(notebook.states) == {TokenState.EXACT}
    known = {name: words.get(name, [name]) for name in notebook.fields}
    assert_rows_equal(notebook.cache, layers_of(notebook, known), range(len(notebook)), atol=1e-5)


@pytest.mark.parametrize("text", ["policy.\nnotes: {notes}", "{notes}\npolicy notes.\n", "{notes}\nnotes.\n{notes}"])
def test_a_skill_that_begins_or_ends_with_an_empty_value_stays_whole(text: str) -> None:
    model = tiny()
    skill = compiled(model, text, notes=block(""))
    notebook = prefilled(model, "be polite.\n{s}reply only.\n", s=skill)
    notebook.move("s", to=0)
    notebook.edit(notes="- a")
    assert notebook.part("s").text == text.format(notes="- a")
    assert notebook.rendered_text.startswith(text.format(notes="- a"))
    assert_all_exact(notebook)
    notebook.edit(notes="")
    notebook.splice(Skill.compile(model, "hello.\n", name="t"), at=notebook.part("s"))
    assert [part.name for part in notebook.parts if part.name] == ["t", "s"]
    notebook.replace("s", compiled(model, text, notes=block("")))
    assert_all_exact(notebook)
    notebook.cut("s")
    assert notebook.fields == {}
    assert [part.name for part in notebook.parts if part.name] == ["t"]
    assert_all_exact(notebook)


def test_a_skill_without_tokens_is_not_doubled() -> None:
    model = tiny()
    notebook = prefilled(model, "be polite.\n{s}reply only.\n", s=compiled(model, "{notes}", notes=block("- a")))
    notebook.edit(notes="")
    for operation in (lambda: notebook.cut("s"), lambda: notebook.move("s", to=0)):
        with pytest.raises(UnknownPartError, match="no tokens now"):
            operation()
    notebook.edit(notes="- b")
    assert notebook.rendered_text.count("- b") == 1
    notebook.cut("s")
    assert_all_exact(notebook)


@pytest.mark.parametrize(
    "change", [{"piece": 7}, {"piece": 0}, {"kind": "turn"}, {"special": True}, {"corrects": (("zone", "x"),)}], ids=str
)
@pytest.mark.parametrize("which", [0, 1])
def test_pieces_that_are_none_are_refused(tmp_path: Path, change: dict[str, Any], which: int) -> None:
    model = tiny()
    store = SkillStore(tmp_path)
    store.compile(model, ZONE, name="s", visibility="design", zone="one")
    (entry,) = store.entries()
    entry.check(model, "here")
    pieces = tuple(
        piece.model_copy(update=change) if number == which else piece for number, piece in enumerate(entry.pieces)
    )
    with pytest.raises(CorruptFileError, match="piece"):
        entry.model_copy(update={"pieces": pieces}).check(model, "here")


def test_a_rollback_and_a_cut_take_back_the_words_that_a_skill_brought() -> None:
    model = tiny()
    skill = Skill.compile(model, ZONE, name="s", visibility="design", mentions={"zone": ["two"]}, zone="one")
    notebook = prefilled(model, "the zone is {zone}.\nof two none.\n", zone="one")
    before = notebook.states, notebook.readers("zone")
    mark = notebook.mark()
    notebook.splice(skill, at=0)
    assert any("of two" in reader.text for reader in notebook.readers("zone"))
    assert_all_exact(notebook, zone=["zone", "two"])
    notebook.rollback(mark)
    assert (notebook.states, notebook.readers("zone")) == before
    notebook.splice(skill, at=0)
    notebook.cut("s")
    assert notebook.readers("zone") == before[1]
    assert_all_exact(notebook)


def test_a_skill_that_had_read_a_beginning_is_compiled_anew_with_the_words_of_here() -> None:
    """The skill's keys and values depend on a token that does not precede it in this context."""
    model = with_beginning(tiny())
    skill = compiled(model, ZONE, zone="one")
    notebook = prefilled(model, "be polite. {status}\n{s}reply only.\n", s=skill, status="x")
    assert_all_exact(notebook)
    notebook.mentions("zone", "two")
    assert TokenState.STALE in notebook.states
    planned = notebook.plan.edit(status="yy")
    account = notebook.edit(status="yy")
    assert "recompiled after the token before it" in account.why
    assert (account.tokens_computed, account.tokens_relocated) == (planned.tokens_computed, planned.tokens_relocated)
    assert_all_exact(notebook, zone=["zone", "two"])
    notebook.edit(zone="two")
    assert_all_exact(notebook, zone=["zone", "two"])
    words = {"zone": ["two"]}
    fresh = Skill.compile(model, ZONE, name="s", visibility="design", mentions=words, zone="two")
    before = notebook.cache.segment(notebook.part("s").span, fresh.unit.ids)
    for old, new in zip(before.keys, fresh.segment.keys, strict=True):
        torch.testing.assert_close(old, new, atol=1e-6, rtol=0)


def test_a_saved_notebook_of_an_earlier_scheme_is_refused(tmp_path: Path) -> None:
    model = tiny()
    prefilled(model, "be polite. {status}\n", status="x").save(tmp_path)
    from programmable_kv.storage.notebooks import MANIFEST, NotebookManifest

    path = tmp_path / MANIFEST
    manifest = NotebookManifest.read(path.read_bytes(), "here")
    assert manifest.build is not None
    old = manifest.model_copy(update={"build": manifest.build.model_copy(update={"scheme": 1})})
    path.write_bytes(old.sealed())
    with pytest.raises(CorruptFileError, match="earlier version"):
        Notebook.load(tmp_path, model)


@pytest.mark.parametrize("mentions", [{"zone": "two"}, {"zone": 5}, ["zone"]])
def test_mentions_of_another_shape_are_refused(mentions: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="a mapping, field -> list of words"):
        Skill.compile(tiny(), ZONE, visibility="design", mentions=mentions, zone="one")


def test_words_that_lead_to_no_field_and_texts_without_tokens_are_refused() -> None:
    with pytest.raises(UnknownFieldError, match="not a field of this skill"):
        Skill.compile(tiny(), "plain.\n", visibility="design", mentions={"a": ["b"], "b": ["a"]})
    with pytest.raises(InvalidValueError, match="no tokens"):
        compiled(tiny(), "{notes}", notes=block(""))


def test_readers_of_an_empty_value_are_listed() -> None:
    notebook = prefilled(tiny(), "notes: {notes}\nsee the notes.\n", notes=block(""))
    listed = {slot for reader in notebook.readers("notes") for slot in reader.span.range}
    computed = {slot for one in notebook.plan.edit(notes="- a").compute for slot in one.span.range}
    assert len(listed) == len(computed) - len(notebook.model.tokenizer.encode("- a", add_special_tokens=False))
    assert any("see the notes" in reader.text for reader in notebook.readers("notes"))


def test_a_skill_whose_first_line_is_cut_is_one_part_still() -> None:
    model = tiny()
    skill = compiled(model, "policy.\nthe zone is {zone}.\nfor zone two ask.\n", zone="one")
    notebook = prefilled(model, "be.\n{s}reply.\n", s=skill)
    part, first = notebook.part("s"), skill.pieces[0]
    tokens = next(token for token, (start, _) in enumerate(first.offsets.tolist()) if start >= len("policy.\n"))
    notebook.cut(Span(part.span.start, part.span.start + tokens))
    assert notebook.part("s").text == "the zone is one.\nfor zone two ask.\n"
    notebook.edit(zone="two")
    assert_all_exact(notebook)
    notebook.cut("s")
    assert_all_exact(notebook)


@pytest.mark.parametrize("text", ["the zone is {zone}.\nfor zone two ask.\n", "the zone is {zone}", "{zone}"])
@pytest.mark.parametrize("at_end", [False, True])
def test_a_skill_that_had_read_a_preface_grows_and_shrinks_where_it_stands(text: str, at_end: bool) -> None:
    """This holds even if it is the last unit, after which nothing can be moved."""
    model = tiny()
    skill = Skill.compile(
        model, text, name="s", visibility="design", preface="be kind.\n", zone=Field("one", kind="block")
    )
    notebook = Notebook(model, visibility="design")
    if at_end:
        notebook.message("system", "be polite.\n").prefill()
        notebook.splice(skill)
    else:
        notebook.message("system", "be polite.\n{s}reply only.\n", s=skill).message("user", "refund?").prefill()
    for zone in ("two three four five six, and more of them than there was room for", "", "seven"):
        planned = notebook.plan.edit(zone=zone)
        assert notebook.edit(zone=zone).tokens_computed == planned.tokens_computed
        assert_all_exact(notebook)
