"""Visibility declared for single parts: `readable` says what may read a field or a skill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import dense_mask, masked_forward, tokens_of

from conftest import tiny
from programmable_kv import Notebook, Skill
from programmable_kv.errors import InvalidArgumentError, UnknownFieldError
from programmable_kv.states import TokenState
from reference import assert_rows_equal

POLICY = "status: {status}\nbe polite.\nif the status is one then deny.\ntier: {tier}\n{refunds}the tier may refund.\nreply.\n"
WORDS = {"status": ["status"], "tier": ["tier"]}


def build(model: Any, **read_by: str) -> Notebook:
    refunds = Skill.compile(model, "refund policy:\nrefund when late.\n", name="refunds")
    notebook = Notebook(model, visibility="design")
    notebook.message("system", POLICY, status="shipped", tier="gold", refunds=refunds).message("user", "refund?")
    for name, by in read_by.items():
        notebook.readable(name, by=by)
    notebook.prefill()
    return notebook


def assert_truthful(notebook: Notebook, read_by: dict[str, str], *, all_exact: bool = True) -> None:
    words = {name: said for name, said in WORDS.items() if name in notebook.fields}
    mask = dense_mask(tokens_of(notebook, words, read_by))
    layers, _ = masked_forward(notebook.model.engine.model, notebook.ids, notebook.cache.positions.tolist(), mask)
    exact = [slot for slot, state in enumerate(notebook.states) if state is TokenState.EXACT]
    assert_rows_equal(notebook.cache, layers, exact, atol=1e-5)
    assert not all_exact or len(exact) == len(notebook)


CHOICES = [
    {"status": "turns"}, {"status": "all"}, {"status": "all", "tier": "turns"}, {"refunds": "all"},
    {"refunds": "all", "status": "all"}, {"status": "mentions", "refunds": "turns"},
]  # fmt: skip


@pytest.mark.parametrize("read_by", CHOICES, ids=str)
def test_prefill_edit_and_composition_equal_the_mask(read_by: dict[str, str]) -> None:
    notebook = build(tiny(), **read_by)
    assert_truthful(notebook, read_by)
    notebook.edit(status="pending", tier="none of them")
    assert_truthful(notebook, read_by)
    notebook.move("refunds", to=0)
    assert_truthful(notebook, read_by)
    notebook.cut("refunds")
    assert_truthful(notebook, read_by)


def test_nobody_but_turns_reads_the_field() -> None:
    notebook = build(tiny(), status="turns")
    (value,) = notebook.spans("status")
    turns = sum(len(part.span) for part in notebook.parts if part.kind == "turn")
    account = notebook.edit(status="x")
    assert len(notebook.spans("status")[0]) <= len(value)
    assert account.tokens_computed == len(notebook.spans("status")[0]) + turns
    assert all(reader.why == "the open question" for reader in notebook.readers("status"))


def test_all_text_behind_the_field_reads_it() -> None:
    notebook = build(tiny(), status="all")
    before = notebook.spans("status")[0].start
    skill = len(notebook.part("refunds").span)
    account = notebook.edit(status="x")
    value = notebook.spans("tier")[0]
    # A value reads text but no readers, and a skill reads only itself.
    assert account.tokens_computed == len(notebook) - before - skill - len(value)


def test_text_behind_an_open_skill_reads_it_and_another_skill_there_costs_that_text() -> None:
    model = tiny()
    closed, opened = build(model), build(model, refunds="all")
    behind = opened.part("refunds").span.stop
    before = opened.part("refunds").span.start
    for layer in range(len(closed.cache)):
        one, other = closed.cache.keys(layer), opened.cache.keys(layer)
        assert (one[:, :, :before] == other[:, :, :before]).all()
    last = len(closed.cache) - 1
    assert (closed.cache.keys(last)[:, :, behind + 2] != opened.cache.keys(last)[:, :, behind + 2]).any()
    another = Skill.compile(model, "refund policy:\nrefund late when.\n", name="refunds")
    assert len(another) == behind - before, "what follows stays where it stands"
    turns = sum(len(part.span) for part in closed.parts if part.kind == "turn")
    assert closed.replace("refunds", another).tokens_computed == turns
    assert opened.replace("refunds", another).tokens_computed == len(opened) - behind > turns
    assert_truthful(opened, {"refunds": "all"})


def test_declared_after_prefill_what_is_read_differently_is_stale_until_built_again() -> None:
    notebook = build(tiny())
    notebook.readable("status", by="all")
    assert TokenState.STALE in notebook.states
    assert_truthful(notebook, {"status": "all"}, all_exact=False)
    notebook.recompute()
    assert_truthful(notebook, {"status": "all"})
    notebook.readable("status", by="mentions").readable("refunds", by="all")
    notebook.edit(status="pending")
    assert_truthful(notebook, {"refunds": "all"})


def test_kept_by_save_fork_and_rollback(tmp_path: Path) -> None:
    notebook = build(tiny(), status="all", refunds="all")
    read_by = {"status": "all", "refunds": "all"}
    notebook.save(tmp_path)
    loaded = Notebook.load(tmp_path, notebook.model)
    for each in (loaded, notebook.fork()):
        each.edit(status="pending")
        assert_truthful(each, read_by)
    mark = notebook.mark()
    notebook.edit(tier="x")
    notebook.rollback(mark)
    assert_truthful(notebook, read_by)


def test_refused_where_it_has_no_meaning() -> None:
    notebook = build(tiny())
    states = notebook.states
    with pytest.raises(InvalidArgumentError, match="by is one of mentions, all, turns"):
        notebook.readable("status", by="everyone")
    with pytest.raises(UnknownFieldError):
        notebook.readable("state", by="all")
    with pytest.raises(InvalidArgumentError, match="is a skill"):
        notebook.readable("refunds", by="mentions")
    with pytest.raises(InvalidArgumentError, match="visibility='design'"):
        Notebook(tiny()).message("system", "a {status}", status="x").readable("status", by="all")
    assert notebook.states == states


PROGRAMS = st.lists(
    st.one_of(
        st.tuples(
            st.just("readable"), st.sampled_from(["status", "tier", "refunds"]), st.sampled_from(["all", "turns"])
        ),
        st.tuples(
            st.just("edit"), st.sampled_from(["status", "tier"]), st.sampled_from(["x", "gold", "one of the tier"])
        ),
        st.tuples(st.just("move"), st.integers(0, 9)),
        st.tuples(st.just("keep"), st.just("")),
        st.tuples(st.just("recompute"), st.just("")),
    ),
    max_size=6,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(program=PROGRAMS, model_type=st.sampled_from(["llama", "gemma3_text"]))
def test_whatever_is_done_what_is_called_exact_is(program: list[tuple[Any, ...]], model_type: str) -> None:
    notebook, read_by = build(tiny(model_type)), {}
    for operation, *arguments in program:
        match operation:
            case "readable":
                notebook.readable(arguments[0], by=arguments[1])
                read_by[arguments[0]] = arguments[1]
            case "edit":
                notebook.edit({arguments[0]: arguments[1]})
            case "move":
                places = [*(part.span.start for part in notebook.parts), len(notebook)]
                notebook.move("refunds", to=places[arguments[0] % len(places)])
            case "keep":
                notebook.decide("refund?", ["deny", "cancel"], keep=True)
            case "recompute":
                notebook.recompute()
        assert_truthful(notebook, read_by, all_exact=operation == "recompute")
