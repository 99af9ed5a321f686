"""Regression tests for the faults that a review found, each with the smallest program that shows the fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny
from programmable_kv import Notebook, SeamRepair, Skill
from programmable_kv.cache.buffer import KVBuffer, Mark
from programmable_kv.errors import InputError, InvalidEditError, OutOfStepError, StateError
from programmable_kv.ledger.ledger import Ledger
from programmable_kv.notebook import streaming
from programmable_kv.states import weakest
from reference import assert_rows_equal, full_forward


@pytest.mark.parametrize("first", ["skill", "field"])
def test_a_prompt_and_a_skill_in_it_agree_on_a_field(first: str) -> None:
    """Two values of one field were accepted: the text had one, `fields` the other, and every token was called exact."""
    skill = Skill.compile(tiny(), "status: {status}.", name="policy", status="pending")
    notebook = Notebook(tiny())
    turns = {"skill": ("{policy}", {"policy": skill}), "field": ("now {status}.", {"status": "shipped"})}
    content, given = turns.pop(first)
    notebook.message("system", content, **given)
    fields = notebook.fields
    (content, given), *_ = turns.values()
    with pytest.raises(InvalidEditError, match="status is already declared as"):
        notebook.message("user", content, **given)
    assert notebook.fields == fields
    notebook.prefill()


def test_a_message_agrees_with_the_skills_in_it() -> None:
    one = Skill.compile(tiny(), "status: {status}.", name="one", status="pending")
    other = Skill.compile(tiny(), "the status is {status}.", name="other", status="shipped")
    for content, given in (
        ("{one} {other}", {"one": one, "other": other}),
        ("{one} {status}", {"one": one, "status": "x"}),
    ):
        with pytest.raises(InvalidEditError, match="status is already declared as"):
            Notebook(tiny()).message("system", content, **given)


def test_a_plan_counts_no_gap_that_it_opens_at_the_end() -> None:
    """With a value at the end of a part and one in the last part, slots yet to be computed counted as relocated."""
    text = "tier {tier}" + " and then" * 30 + " status {status}"
    notebook = Notebook(tiny()).text(text, tier="a", status="x")
    notebook.skill(Skill.compile(tiny(), "{date}", name="last", date="2026"))
    notebook.prefill()
    changes = {"tier": "gold and silver", "status": "cancelled by the customer", "date": "delivered and returned"}
    plan = notebook.plan.edit(changes, mode="in_place")
    account = notebook.edit(changes, mode="in_place")
    assert plan.tokens_relocated == account.tokens_relocated > 0


def test_an_interrupt_while_the_account_is_made_undoes_the_edit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache was changed but the state was not: with a value of the same length, all tokens were called exact."""
    notebook = Notebook(tiny()).message("system", "status: {status}. policy", status="shipped")
    notebook.prefill()
    values = [notebook.cache.values(layer).clone() for layer in range(len(notebook.cache))]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "weakest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            notebook.edit(status="pending", mode="in_place")
    assert notebook.fields == {"status": "shipped"}
    assert all(torch.equal(notebook.cache.values(layer), before) for layer, before in enumerate(values))


def test_an_interrupt_between_the_cache_and_the_state_undoes_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan's mark was released before the notebook had the new state: an interrupt left the two out of step."""
    notebook = Notebook(tiny()).message("system", "status: {status}. policy", status="shipped")
    notebook.prefill()
    ids, length = notebook.ids, notebook.cache.length
    release = KVBuffer.release

    def released_and_interrupted(buffer: KVBuffer, mark: Mark) -> None:
        release(buffer, mark)
        raise KeyboardInterrupt

    for operation in (
        lambda: notebook.edit(status="pending", mode="in_place"),
        lambda: notebook.add("user", "so?"),
        lambda: notebook.decide("so?", ["yes", "no"], edits={"status": "pending"}, keep=True),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(KVBuffer, "release", released_and_interrupted)
            with pytest.raises(KeyboardInterrupt):
                operation()
        assert (notebook.ids, notebook.cache.length) == (ids, length)
        expected, _ = full_forward(notebook.model.engine.model, notebook.ids)
        assert_rows_equal(notebook.cache, expected, range(length), atol=1e-9)


def test_an_interrupt_while_an_answer_is_kept_takes_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = Notebook(tiny()).message("system", "status: {status}. policy", status="shipped")
    notebook.prefill()
    ids = notebook.ids
    kept = streaming.keep_drawn

    def kept_and_interrupted(*given: Any) -> str:
        kept(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(streaming, "keep_drawn", kept_and_interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(notebook.generate("so?", max_new_tokens=3, keep=True))
    assert (notebook.ids, notebook.cache.length) == (ids, len(ids))
    notebook.add("user", "so?")


def test_a_reason_does_not_call_an_inexact_context_exact() -> None:
    """`suffix` was chosen because it "is exact", even after a spliced skill that is not exact."""
    skill = Skill.compile(tiny(), "refund policy: if the tier is gold refund.", name="refunds")
    notebook = Notebook(tiny()).message("system", "{refunds} status: {status}", refunds=skill, status="x")
    notebook.prefill(repair=SeamRepair(0))
    account = notebook.edit(status="pending")
    assert account.mode_used == "suffix"
    assert not account.exact
    assert "exact" not in account.why


def test_what_others_put_in_the_place_of_cached_tokens_is_not_called_exact() -> None:
    """After `cache.crop` and a forward of as many other tokens, the length is right but the tokens are not."""
    notebook = Notebook(tiny()).text("the order status is pending and the account role is guest.")
    notebook.prefill()
    notebook.cache.crop(-3)
    with torch.no_grad():
        notebook.model.engine.model(input_ids=torch.tensor([[7, 8, 9]]), past_key_values=notebook.cache, use_cache=True)
    with pytest.raises(OutOfStepError, match="from slot"):
        notebook.add("user", "so?")


def test_a_turn_that_was_cut_is_not_saved(tmp_path: Path) -> None:
    notebook = Notebook(tiny()).message("system", "status: {status}.", status="shipped")
    notebook.prefill()
    notebook.add("user", "the password is swordfish")
    notebook.cut(notebook.parts[-1])
    notebook.save(tmp_path / "saved")
    assert "swordfish" not in (tmp_path / "saved" / "notebook.json").read_text()


def test_a_loaded_notebook_does_not_render_an_empty_prompt(tmp_path: Path) -> None:
    notebook = Notebook(tiny()).text("status: {status}.", status="shipped")
    notebook.prefill()
    notebook.save(tmp_path / "saved")
    assert Notebook.load(tmp_path / "saved", notebook.model).rendered() == notebook.rendered()


def test_a_decision_that_is_kept_counts_in_its_own_account() -> None:
    """The account said 'relocated', although the kept turns are 'after edit', which is weaker."""
    notebook = Notebook(tiny()).text("so,")
    notebook.skill(Skill.compile(notebook.model, "refund policy: if gold refund.", name="refunds"))
    notebook.prefill(repair=SeamRepair(0))
    decision = notebook.decide("so?", ["yes", "no"], keep=True)
    assert decision.account.exactness is notebook.last_account.exactness is weakest(notebook.states)


def test_a_mode_that_was_not_asked_for_is_not_in_the_account() -> None:
    """The account promises None if the default chose the mode, but had the mode that was chosen."""
    notebook = Notebook(tiny()).message("system", "status: {status}. policy", status="shipped")
    notebook.prefill()
    account = notebook.edit(status="pending")
    assert (account.mode_asked, account.mode_used) == (None, "suffix")
    assert "mode suffix" in str(notebook.plan.edit(status="shipped"))
    assert notebook.edit(status="shipped", mode="suffix").mode_asked == "suffix"


@pytest.mark.parametrize("mode", ["in_place", "field_erratum", "selective"])
def test_a_value_that_was_edited_away_is_not_saved_with_what_has_read_it(tmp_path: Path, mode: str) -> None:
    """Stale tokens stay in the cache, and their bookkeeping still had the value that they had read."""
    notebook = Notebook(tiny()).message("system", "address: {address}. agent, so reply.", address="elm street nine")
    notebook.prefill()
    notebook.edit(address="removed", mode=mode)
    notebook.save(tmp_path / "saved")
    assert "elm street" not in (tmp_path / "saved" / "notebook.json").read_text(encoding="utf-8")
    loaded = Notebook.load(tmp_path / "saved", notebook.model)
    assert loaded.states == notebook.states
    for each in (loaded, notebook):
        each.add("user", "so?")
    assert loaded.states == notebook.states


@pytest.mark.parametrize(
    "operation",
    [
        lambda n: n.edit(["status"]),
        lambda n: n.decide(5, ["a", "b"]),
        lambda n: n.decide("so?", None),
        lambda n: n.add("user", 5),
        lambda n: n.splice(Skill.compile(n.model, "dates."), repair=3),
        lambda n: n.rollback("yesterday"),
        lambda n: n.release(None),
        lambda n: n.generate("so?", seed="a"),
        lambda n: n.generate("so?", temperature=True),
        lambda n: n.generate(7),
        lambda n: n.rebase(limit=-3),
        lambda n: n.rebase(limit="all"),
        lambda n: Notebook("embedded"),
        lambda n: Notebook(n.model).text(None),
        lambda n: Notebook(n.model).message("user", 5),
        lambda n: Notebook(n.model, erratum_template=5),
        lambda n: SeamRepair("x"),
    ],
)
def test_arguments_of_another_type_are_typed_errors(operation: Any) -> None:
    notebook = Notebook(tiny()).message("system", "status: {status}. policy", status="shipped")
    notebook.prefill()
    ids = notebook.ids
    with pytest.raises((InputError, StateError)):
        operation(notebook)
    assert notebook.ids == ids
