"""Skills compiled together, each after those before it, are exact in that order and in no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import tiny, with_beginning
from programmable_kv import Agent, Notebook, SeamRepair, Skill
from programmable_kv.errors import ContextOverflowError, InvalidValueError, UnknownFieldError
from programmable_kv.skills.store import SkillStore
from programmable_kv.states import TokenState
from reference import assert_rows_equal, full_forward, largest_difference

TEXTS = {
    "policy": "you are an agent. status: {status}.",
    "refunds": "refund policy: if the tier is gold refund, if silver deny.",
    "dates": "date policy: orders delivered before 2026 are returned.",
}
OPENING = [("system", "")]
NONE = SeamRepair(seam=0)


def together(model: Any = None, **changes: Any) -> list[Skill]:
    options: dict[str, Any] = {"preface": OPENING, "between": "\n\n", "status": "pending"} | changes
    return Skill.compile_together(model or tiny(), TEXTS, **options)


def is_exact(notebook: Notebook) -> bool:
    """Whether every cached row equals that of a full prefill of the same tokens."""
    expected, _ = full_forward(notebook.model.engine.model, notebook.ids)
    return largest_difference(notebook.cache, expected, range(len(notebook))) < 1e-9


def test_in_their_order_they_are_exact(model_type: str) -> None:
    model = tiny(model_type)
    skills = together(model)
    notebook = Notebook(model).message("system", "{policy}\n\n{refunds}\n\n{dates}", **{s.name: s for s in skills})
    account = notebook.prefill()
    assert account.tokens_computed == len(notebook) - sum(map(len, skills))
    assert set(notebook.states) == {TokenState.EXACT}
    expected, _ = full_forward(model.engine.model, notebook.ids)
    assert_rows_equal(notebook.cache, expected, range(len(notebook)), atol=2e-4 if model_type == "gemma2" else 1e-9)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(list(TEXTS)), count=st.integers(1, 3), between=st.sampled_from(["\n\n", "\n", " and "]))
def test_what_is_called_exact_is(order: list[str], count: int, between: str) -> None:
    """Any skills in any order with any text between them are exact as long as they stand as they were compiled."""
    chosen = order[:count]
    skills = {skill.name: skill for skill in together()}
    content = between.join("{" + name + "}" for name in chosen)
    notebook = Notebook(tiny()).message("system", content, **{name: skills[name] for name in chosen})
    notebook.prefill(repair=NONE)
    in_order = 0
    while in_order < count and chosen[in_order] == list(TEXTS)[in_order] and (in_order == 0 or between == "\n\n"):
        in_order += 1
    called = [set(notebook.states[part.span.start : part.span.stop]) for part in notebook.parts if part.name]
    assert called == [{TokenState.EXACT}] * in_order + [{TokenState.RELOCATED}] * (count - in_order)
    assert is_exact(notebook) == (in_order == count)


def test_the_last_alone_differs_from_the_last_behind_the_others() -> None:
    """The texts that a skill was compiled after matter to it; the tests above rely on that."""
    model = tiny()
    last, alone = together(model)[-1], Skill.compile(model, TEXTS["dates"])
    assert last.unit.ids == alone.unit.ids
    layer = len(last.segment.values) - 1
    assert not (last.segment.values[layer] - alone.segment.values[layer]).abs().max() < 1e-6


def test_they_cost_one_prefill() -> None:
    model = tiny()
    before = model.engine.meter.tokens_computed
    skills = together(model)
    end = len(skills[-1].preface_ids) + len(skills[-1])
    assert model.engine.meter.tokens_computed - before == end
    assert sum(skill.account.tokens_computed for skill in skills) == end


def test_a_change_of_a_value_that_the_others_read() -> None:
    """They were computed under it, so an edit states the new value, and a `suffix` edit leaves nothing stale."""
    notebook = Notebook(tiny()).message(
        "system", "{policy}\n\n{refunds}\n\n{dates}", **{skill.name: skill for skill in together()}
    )
    notebook.prefill()
    mark = notebook.mark()
    notebook.edit(status="shipped")
    assert "shipped" in notebook.rendered_text[-60:]
    refunds = notebook.part("refunds").span
    assert TokenState.STALE in notebook.states[refunds.start : refunds.stop]
    notebook.rollback(mark)
    notebook.edit(status="shipped", mode="suffix")
    assert set(notebook.states) == {TokenState.EXACT}
    assert is_exact(notebook)


def test_an_agent_composed_of_them_is_exact() -> None:
    model = tiny()
    policy, *skills = together(model)
    agent = Agent(model, policy, skills=skills)
    assert set(agent.notebook.states) == {TokenState.EXACT}
    assert is_exact(agent.notebook)
    assert agent.state == {"status": "pending"}
    apart = Agent(model, policy, skills=[Skill.compile(model, TEXTS["refunds"], name="refunds")])
    assert not is_exact(apart.notebook)


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ({}, {}, InvalidValueError, "no text to compile"),
        ({"one": ""}, {}, InvalidValueError, "is empty"),
        ({"one": "a"}, {"status": "pending"}, UnknownFieldError, "no text has a placeholder {status}"),
        ({"one": "a", "two words": "b"}, {}, InvalidValueError, "two words"),
        ({"one": "a", "two": "b"}, {"between": "\ue00a"}, InvalidValueError, "the text between skills"),
        ({"one": "a {between}"}, {"between": "\n"}, InvalidValueError, "in a mapping"),
        (["one", "two"], {}, InvalidValueError, "name -> text"),
        ({"one": 1}, {}, InvalidValueError, "name -> text"),
        ({"one": "a"}, {"between": None}, InvalidValueError, "name -> text"),
        ({"status": "a {status}"}, {"status": "pending"}, InvalidValueError, "of both a text and a field"),
        (
            {"one": "tier {tier}", "two": "note {note}"},
            {"tier": "gold", "note": "tier is silver"},
            InvalidValueError,
            "states a value of the field tier",
        ),
        ({"one": "orders " * 300, "two": "dates " * 300}, {}, ContextOverflowError, "positions"),
    ],
)
def test_what_cannot_be_compiled_together(texts: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Skill.compile_together(tiny(), texts, **options)


def test_a_store_keeps_them(tmp_path: Path) -> None:
    model, store = tiny(), SkillStore(tmp_path)
    first = store.compile_together(model, TEXTS, preface=OPENING, between="\n\n", status="pending")
    again = store.compile_together(model, TEXTS, preface=OPENING, between="\n\n", status="pending")
    assert sum(skill.account.tokens_computed for skill in first) > 0
    assert sum(skill.account.tokens_computed for skill in again) == 0
    assert [skill.name for skill in again] == list(TEXTS)
    assert set(Agent(model, again[0], skills=again[1:]).notebook.states) == {TokenState.EXACT}
    assert is_exact(Agent(model, again[0], skills=again[1:]).notebook)
    store.remove(store.entries()[0].key)
    mended = store.compile_together(model, TEXTS, preface=OPENING, between="\n\n", status="pending")
    assert sum(skill.account.tokens_computed for skill in mended) > 0
    assert len(store.entries()) == len(TEXTS)
    other = store.compile_together(model, TEXTS, preface=OPENING, between="\n", status="pending")
    assert [skill.account.tokens_computed > 0 for skill in other] == [True] * 3
    assert len(store.entries()) == 2 * len(TEXTS) - 1  # the first skill has read the same in both


def test_a_value_that_the_others_read_stays_theirs() -> None:
    """After the same text with another value they are not exact, because that is not the policy that they read."""
    model = tiny()
    shipped = together(model, status="shipped")[0]
    refunds = together(model)[1]
    notebook = Notebook(model).message("system", "{policy}\n\n{refunds}", policy=shipped, refunds=refunds)
    notebook.prefill(repair=NONE)
    span = notebook.part("refunds").span
    assert set(notebook.states[span.start : span.stop]) == {TokenState.RELOCATED}
    assert not is_exact(notebook)


def test_behind_the_token_that_begins_every_text() -> None:
    """Raw text begins with the beginning-of-text token, even if a skill comes first."""
    model = with_beginning(tiny())
    first, second = Skill.compile_together(model, {"first": "dates.", "second": "refunds."}, between="\n")
    assert first.preface_ids == (model.tokenizer.bos_token_id,)
    notebook = Notebook(model).text("{first}\n{second}", first=first, second=second)
    notebook.prefill()
    assert notebook.ids == model.tokenizer.encode("dates.\nrefunds.")
    assert set(notebook.states) == {TokenState.EXACT}
    assert is_exact(notebook)


def test_in_eight_bits_nothing_is_exact(tmp_path: Path) -> None:
    model, store = tiny(), SkillStore(tmp_path, int8=True)
    for _ in range(2):
        policy, *skills = store.compile_together(model, TEXTS, preface=OPENING, between="\n\n", status="pending")
        notebook = Agent(model, policy, skills=skills).notebook
        assert TokenState.RELOCATED in notebook.states
        assert not is_exact(notebook)


def test_a_store_that_is_too_small_keeps_all_of_them(tmp_path: Path) -> None:
    """Skills compiled together are of no use in part, so the limit evicts none of them."""
    model = tiny()
    alone = SkillStore(tmp_path / "other").compile_together(model, TEXTS, status="pending")
    store = SkillStore(tmp_path / "small", limit=max(skill.segment.nbytes for skill in alone))
    older = store.put(Skill.compile(model, "older", name="older"))
    for computes in (True, False):
        skills = store.compile_together(model, TEXTS, status="pending")
        assert [skill.account.tokens_computed > 0 for skill in skills] == [computes] * 3
    assert older.key not in {entry.key for entry in store.entries()}


def test_a_value_that_was_cut_out_is_remembered_by_its_readers() -> None:
    """A field is cut with its policy and comes back with another value: its readers do not count as up to date.

    This holds whatever was spliced in between.
    """
    model = tiny()
    policy, refunds, _ = together(model)
    notebook = Notebook(model).message("system", "{policy}\n\n{refunds}", policy=policy, refunds=refunds)
    notebook.prefill()
    at = notebook.part("policy").span.start
    notebook.cut("policy")
    notebook.splice(Skill.compile(model, "tier: {tier}.", name="tiers", tier="gold"))
    notebook.add("user", "cancel the order")
    notebook.splice(Skill.compile(model, TEXTS["policy"], name="policy", status="shipped"), at=at)
    span = notebook.part("refunds").span
    assert set(notebook.states[span.start : span.stop]) == {TokenState.STALE}
    mark = notebook.mark()
    assert notebook.edit(status="shipped", mode="erratum").tokens_computed > 0
    notebook.rollback(mark)
    notebook.edit(status="shipped", mode="suffix")
    assert not {TokenState.STALE} & set(notebook.states)
    notebook.recompute()
    assert all(state.exact for state in notebook.states)
    assert is_exact(notebook)
