"""Mode `readers`: what it recomputes equals a forward on the mixed cache; the rest stays; the account says which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_plans import context, enacted, erratum

from conftest import tiny, tokenizer
from programmable_kv import Field, Mode, Notebook, Skill
from programmable_kv.cache.span import Span
from programmable_kv.edits.compose import plan_append
from programmable_kv.edits.edit import EditTools, plan_edit
from programmable_kv.edits.ranking import Recency
from programmable_kv.errors import CorruptFileError, InvalidArgumentError, UnknownFieldError
from programmable_kv.ledger.ledger import Ledger
from programmable_kv.ledger.run import Origin
from programmable_kv.prompt.context import Context, FieldValue
from programmable_kv.prompt.parts import unmark
from programmable_kv.prompt.units import Kind, tokenised
from programmable_kv.states import TokenState
from programmable_kv.storage.seal import opened, seal
from reference import assert_rows_equal, full_forward, largest_difference, row_forward

TOKENIZER = tokenizer("byte-level")
FIELD = "\ue000status\ue001shipped\ue002"
POLICY = (
    "reply only\nstatus: {status}\ntier: {tier}\nbe brief with the customer\nif status is shipped, deny.\n"
    "ask when the date is {status}.\npending is in the refund kind.\nin the refund kind, cancel.\nthen reply"
)


def build(model: Any = None, status: str = "shipped", policy: str = POLICY) -> Notebook:
    notebook = Notebook(model or tiny()).message("system", policy, status=status, tier="gold")
    return notebook.message("user", "the customer asks to cancel").mentions("status", "refund kind")


def prefilled(model: Any = None, **changes: Any) -> Notebook:
    notebook = build(model, **changes)
    notebook.prefill()
    return notebook


def atol(model_type: str) -> float:
    return 2e-4 if model_type == "gemma2" else 1e-9


def reread(notebook: Notebook) -> set[int]:
    """The slots of the field and of its readers."""
    spans = [*notebook.spans("status"), *(reader.span for reader in notebook.readers("status"))]
    return {slot for span in spans for slot in span.range}


@pytest.mark.parametrize("value", ["pending", "cancelled by the customer", "x"])
def test_recomputed_rows_equal_a_forward_on_the_mixed_cache(model_type: str, value: str) -> None:
    """Each recomputed row equals transformers' row on the cached rows before it, and nothing else was computed."""
    # Three layers are needed: in the second one, a refreshed row still reads only what depends on single tokens.
    window = {"sliding_window": 64} if model_type == "mistral" else {}
    notebook = prefilled(tiny(model_type, num_hidden_layers=3, **window))
    before = notebook.fork()
    account = notebook.edit(status=value, mode="readers")
    assert notebook.ids == prefilled(notebook.model, status=value).ids, "the text is the new text, and nothing else"
    slots = reread(notebook)
    for slot in slots:
        row = row_forward(notebook.model.engine.model, notebook.cache, slot, notebook.ids[slot])
        assert_rows_equal(notebook.cache, row, [slot], atol=atol(model_type), of=[0])
    full, _ = full_forward(notebook.model.engine.model, notebook.ids)
    last = notebook.spans("status")[-1].stop
    assert largest_difference(notebook.cache, full, [slot for slot in slots if slot > last]) > 1e-6
    growth = len(notebook) - len(before)
    assert abs(len(slots) - account.tokens_computed) <= 3, "around a value, a token may stay the same or change with it"
    rest = [slot for slot in range(last, len(notebook)) if slot not in slots]
    assert rest
    for index, layer in enumerate(notebook.model.engine.require_relocation().layers):
        still = "values" if layer.rotated == "keys" else "keys"
        now, then = (getattr(cache, still)(index) for cache in (notebook.cache, before.cache))
        torch.testing.assert_close(now[:, :, rest], then[:, :, [slot - growth for slot in rest]], rtol=0, atol=0)
    assert (account.tokens_relocated > 0) is (growth != 0)
    assert ("were relocated" in account.why) is (growth != 0)


def test_states_and_account_say_what_is_left() -> None:
    notebook = prefilled()
    account = notebook.edit(status="pending", mode="readers")
    assert (account.mode_asked, account.mode_used) == (Mode.READERS, Mode.READERS)
    assert account.exactness is TokenState.STALE
    first = notebook.spans("status")[0]
    slots = reread(notebook)
    stale = [slot for slot, state in enumerate(notebook.states) if state is TokenState.STALE]
    assert set(stale) == set(range(first.stop, len(notebook))) - slots
    assert account.why == (
        "recomputed with status: 2 lines (holds the field), 1 line (mentions 'status'), 2 lines (mentions 'refund "
        f"kind'), the open question; {len(stale)} later tokens are still stale"
    )
    late = [slot for slot in slots if slot > min(stale)]
    assert {notebook.states[slot] for slot in late} == {TokenState.REFRESHED}


@pytest.mark.parametrize("value", ["pending", "cancelled by the customer"])
def test_where_every_later_line_is_a_reader_it_is_the_suffix(model_type: str, value: str) -> None:
    policy = "tier: {tier}\nstatus: {status}\nstatus decides.\nwithout status reply"
    notebook = prefilled(tiny(model_type), policy=policy)
    suffix = notebook.fork()
    account = notebook.edit(status=value, mode="readers")
    suffix.edit(status=value, mode="suffix")
    assert account.exact
    assert "still stale" not in account.why
    assert set(notebook.states) == {TokenState.EXACT}
    assert notebook.ids == suffix.ids
    expected, _ = full_forward(notebook.model.engine.model, notebook.ids)
    assert_rows_equal(notebook.cache, expected, range(len(notebook)), atol=atol(model_type))


def test_where_there_is_no_reader_it_is_in_place_and_says_so() -> None:
    notebook = Notebook(tiny()).text("the tier is gold, status: {status}", status="shipped")
    notebook.prefill()
    notebook.add("user", "the customer asks")
    in_place = notebook.fork()
    assert notebook.readers("status", turns="keep") == ()
    account = notebook.edit(status="pending", mode="readers", turns="keep")
    other = in_place.edit(status="pending", mode="in_place")
    assert (account.mode_asked, account.mode_used) == (Mode.READERS, Mode.IN_PLACE)
    assert "no later line mentions status; only its own tokens are recomputed" in account.why
    assert account.tokens_computed == other.tokens_computed
    for layer in range(len(notebook.cache)):
        torch.testing.assert_close(notebook.cache.keys(layer), in_place.cache.keys(layer), rtol=0, atol=0)


def test_a_missing_mention_is_told() -> None:
    notebook = Notebook(tiny()).message("system", "status: {status}\nthen deny", status="shipped")
    notebook.message("user", "cancel?").prefill()
    assert (
        "no later line mentions status; recomputed with status: 1 line"
        in notebook.plan.edit(status="x", mode="readers").why
    )
    assert "no later line" not in notebook.mentions("status", "deny").plan.edit(status="x", mode="readers").why


@pytest.mark.parametrize("value", ["pending", "cancelled by the customer"])
def test_there_and_back_again_is_exact(value: str) -> None:
    """The tokens that were not recomputed have noted A, so readers that are recomputed under A again are exact."""
    notebook = prefilled()
    before = notebook.fork()
    notebook.edit(status=value, mode="readers")
    notebook.edit(status="shipped", mode="readers")
    assert notebook.ids == before.ids
    assert set(notebook.states) == {TokenState.EXACT}
    for layer in range(len(notebook.cache)):
        torch.testing.assert_close(notebook.cache.keys(layer), before.cache.keys(layer), rtol=0, atol=1e-9)
        torch.testing.assert_close(notebook.cache.values(layer), before.cache.values(layer), rtol=0, atol=1e-9)


@pytest.mark.parametrize("turn", [False, True])
def test_superseded_errata_are_cut(turn: bool) -> None:
    notebook = prefilled()
    notebook.edit(status="pending", mode="field_erratum")
    if turn:
        notebook.add("assistant", "ok")
    account = notebook.edit(status="returned", mode="readers")
    assert "STATE UPDATE" not in notebook.rendered_text
    assert "an earlier erratum was removed" in account.why
    assert notebook.fields["status"] == "returned"


def test_turns_are_kept_opened_or_all_computed() -> None:
    notebook = prefilled()
    notebook.add("assistant", "about the status: deny")
    notebook.add("user", "and now?")
    assert [len(notebook.readers("status", turns=turns)) for turns in ("keep", "open", "all")] == [5, 6, 6]
    texts = {turns: notebook.readers("status", turns=turns)[-1].text for turns in ("open", "all")}
    assert texts["open"] == "<|im_start|>user\nand now?<|im_end|>\n"
    assert texts["all"].startswith("<|im_start|>user\nthe customer asks")
    computed = {}
    for turns in ("keep", "open", "all"):
        mark = notebook.mark()
        decision = notebook.decide(None, ["deny", "cancel"], edits={"status": "x"}, mode="readers", turns=turns)
        computed[turns] = decision.account.tokens_computed
        planned = notebook.plan.edit(status="x", mode="readers", turns=turns)
        assert planned.after.ids == notebook.ids
        notebook.rollback(mark)
    assert computed["keep"] < computed["open"] < computed["all"]
    for operation in (notebook.edit, notebook.plan.edit):
        with pytest.raises(InvalidArgumentError, match="keep, open, all"):
            operation(status="x", mode="readers", turns="some")
    with pytest.raises(InvalidArgumentError, match="keep, open, all"):
        notebook.readers("status", turns="some")


def test_the_question_of_a_system_message_that_opens_the_users_turn() -> None:
    """If the system message is folded into the first user turn, the open question begins after it."""
    policy = "status: {status}\nbe brief\nif status is x, deny."
    model = tiny(kind="metaspace")
    notebook = Notebook(model, fold_system=True).message("system", policy, status="shipped").message("user", "cancel?")
    notebook.prefill()
    assert [reader.text for reader in notebook.readers("status")] == [
        "\n", "if status is x, deny.\n", "cancel?</turn>\n",
    ]  # fmt: skip
    notebook.add("assistant", "ok")
    notebook.add("user", "and now?")
    assert notebook.readers("status")[-1].text == "<turn>user\nand now?</turn>\n"
    notebook.decide("so?", ["a", "b"], keep=True)
    assert notebook.readers("status")[-1].text == "if status is x, deny.\n", "all is answered"


def test_lines_of_a_spliced_skill_are_readers_too() -> None:
    model = tiny()
    notebook = prefilled(model)
    notebook.splice(Skill.compile(model, "dates.\nthe status decides.\n", name="dates"))
    spliced = notebook.part("dates").span
    (line,) = [reader for reader in notebook.readers("status", turns="keep") if reader.span.start >= spliced.start]
    assert line.text == "the status decides.\n"
    notebook.edit(status="pending", mode="readers", turns="keep")
    spliced = notebook.part("dates").span  # the value's length changed
    (line,) = [reader for reader in notebook.readers("status", turns="keep") if reader.span.start >= spliced.start]
    assert notebook.states[line.span.start] is TokenState.REFRESHED
    assert notebook.states[line.span.start - 1] is TokenState.RELOCATED, "it was compiled alone and has read no value"


def test_two_fields_in_one_edit() -> None:
    notebook = prefilled()
    account = notebook.edit(status="cancelled by the customer", tier="silver", mode="readers")
    assert "recomputed with tier" in account.why
    tier = {slot for reader in notebook.readers("tier") for slot in reader.span.range}
    for slot in reread(notebook) | tier | set(notebook.spans("tier")[0].range):
        row = row_forward(notebook.model.engine.model, notebook.cache, slot, notebook.ids[slot])
        assert_rows_equal(notebook.cache, row, [slot], atol=1e-9, of=[0])


def test_a_plan_without_a_model_shows_the_lines() -> None:
    before, ledger = context(".\nbe brief.\nif status is it, deny.\n")
    tools = EditTools(TOKENIZER, erratum, bool, Recency())
    plan = plan_edit(before, ledger, {"status": "shipped"}, Mode.READERS, tools)
    assert [one.origin for one in plan.compute] == [Origin.REFRESHED] * len(plan.compute)
    texts = [TOKENIZER.decode(plan.after.ids_in(one.span)) for one in plan.compute]
    assert [text.strip() for text in texts] == ["shipped.", "if status is it, deny.", "if status is it, deny."]
    assert [text for text in str(plan).splitlines() if "compute slots" in text and "(refreshed)" in text] != []
    assert "1 line (mentions 'status'), the open question" in str(plan)
    assert plan == plan_edit(before, ledger, {"status": "shipped"}, Mode.READERS, tools)


def test_readers_between_two_places_are_planned_in_order() -> None:
    """Each reader is computed on what precedes it, so the ledger has to enter the readers in slot order."""
    unit = tokenised(TOKENIZER, unmark(f"a {FIELD}\nstatus?\nagain {FIELD}\nstatus!\n"), Kind.PREFILL)
    empty = Context((), {"status": FieldValue("shipped", "shipped")})
    before, ledger = enacted(plan_append(empty, unit), Ledger())
    tools = EditTools(TOKENIZER, erratum, bool, Recency())
    plan = plan_edit(before, ledger, {"status": "pending"}, Mode.READERS, tools)
    assert [one.span for one in plan.compute] == [Span(plan.after.spans("status")[0].start, len(plan.after))]
    after, entered = enacted(plan, ledger)
    assert entered.weakest(after.values, after.first_places) is TokenState.EXACT
    assert "keep" not in plan.why


# -- declared words ----------------------------------------------------------------------------------------------------


def test_words_are_declared_before_and_after_prefill() -> None:
    notebook = build()
    assert notebook.mentions("status", "brief") is notebook
    notebook.prefill()
    assert [reader.word for reader in notebook.readers("status") if reader.word] == [
        "brief", "status", "refund kind", "refund kind",
    ]  # fmt: skip
    with pytest.raises(UnknownFieldError, match="status, tier"):
        notebook.mentions("colour", "red")
    with pytest.raises(UnknownFieldError, match="status, tier"):
        notebook.readers("colour")
    with pytest.raises(InvalidArgumentError, match="letters or digits"):
        notebook.mentions("status", "--")


def test_words_go_with_a_fork_and_a_saved_notebook(tmp_path: Path) -> None:
    notebook = prefilled()
    readers = notebook.readers("status")
    fork = notebook.fork()
    assert fork.readers("status") == readers
    fork.mentions("status", "brief")
    assert notebook.readers("status") == readers, "a fork's words are its own"
    notebook.save(tmp_path / "saved")
    assert Notebook.load(tmp_path / "saved", notebook.model).readers("status") == readers


def test_damaged_words_are_refused(tmp_path: Path) -> None:
    notebook = prefilled()
    notebook.save(tmp_path / "saved")
    path = tmp_path / "saved" / "notebook.json"
    body = opened(path.read_bytes())
    assert body is not None
    path.write_bytes(seal(body.replace(b'"refund kind"', b'"---"')))
    with pytest.raises(CorruptFileError, match="invalid words for 'status'"):
        Notebook.load(tmp_path / "saved", notebook.model)
    path.write_bytes(seal(body.replace(b',"mentions":{"status":["refund kind"]}', b"")))
    older = Notebook.load(tmp_path / "saved", notebook.model)
    assert len(older.readers("status")) == len(notebook.readers("status")) - 2, "notebooks saved before have no words"


class TestBlocks:
    """The readers of a block are the lines that mention what its changed lines are about, without a declaration."""

    POLICY = "todo:\n{todo}\nif pay Ann is done, ship.\nif call Bo is done, wait.\nbe polite.\n"

    def plan(self, new: str, old: str = "- [ ] pay Ann\n- [ ] call Bo") -> tuple[str, str]:
        notebook = Notebook(tiny()).text(self.POLICY, todo=Field.block(old))
        notebook.prefill()
        plan = notebook.plan.edit({"todo": new}, mode="readers")
        ids = [token for one in plan.compute for token in plan.after.ids_in(one.span)]
        return notebook.model.tokenizer.decode(ids), plan.why

    def test_only_the_changed_line_s_readers_are_computed(self) -> None:
        again, why = self.plan("- [x] pay Ann\n- [ ] call Bo")
        assert "ship" in again
        assert "wait" not in again
        assert "mentions 'pay Ann'" in why

    def test_a_line_that_is_gone_has_readers_too(self) -> None:
        again, _ = self.plan("- [ ] pay Ann")
        assert "wait" in again
        assert "ship" not in again

    def test_a_text_of_one_line_has_no_such_readers(self) -> None:
        notebook = Notebook(tiny()).text(self.POLICY, todo="pay Ann: open")
        notebook.prefill()
        why = notebook.plan.edit({"todo": "pay Ann: done"}, mode="readers").why
        assert "no later line mentions todo" in why


class TestDefault:
    """An edit without a mode recomputes the readers if they were declared, and otherwise states the value."""

    def used(self, notebook: Notebook, **changes: str) -> str | None:
        return notebook.plan.edit(changes).used

    def test_declared_fields_are_edited_by_their_readers(self) -> None:
        text = "a: {a}\nb: {b}\n" + "be polite and brief.\n" * 20 + "if a is x, go.\n" + "then wait a while.\n" * 20
        notebook = Notebook(tiny()).text(text, a="x", b="y")
        notebook.prefill()
        assert self.used(notebook, a="z") == "field_erratum"
        assert notebook.mentions("a") is notebook
        plan = notebook.plan.edit(a="z")
        assert (plan.used, plan.asked) == ("readers", None)
        assert "mentions 'a'" in plan.why
        assert self.used(notebook, b="z") == "field_erratum"
        assert self.used(notebook, a="z", b="z") == "field_erratum", "one of them is not declared"
        notebook.mentions("b", "go")
        assert self.used(notebook, a="z", b="z") == "readers"
        assert notebook.plan.edit(a="z", mode="erratum").used == "erratum"
        assert notebook.edit(a="z").mode_used == "readers"
        assert "STATE UPDATE" not in notebook.rendered_text

    def test_it_is_never_dearer_than_exactness(self) -> None:
        notebook = Notebook(tiny()).text("a: {a}\nif a is x, go.\n", a="x").mentions("a")
        notebook.prefill()
        account = notebook.edit(a="z")
        assert account.mode_used == "suffix"
        assert account.exact
        assert "readers" in account.why

    def test_a_declaration_without_words_is_saved_and_forked(self, tmp_path: Path) -> None:
        notebook = Notebook(tiny()).text("a: {a}\n" + "be polite.\n" * 20 + "if a is x, go.\n" + "wait.\n" * 20, a="x")
        notebook.mentions("a").prefill()
        notebook.save(tmp_path / "saved")
        for other in (notebook.fork(), Notebook.load(tmp_path / "saved", tiny())):
            assert self.used(other, a="z") == "readers"
