"""Skills that are spliced, cut, moved and replaced, compared with full forwards in float64 over the expected tokens.

A skill compiled alone equals a forward of it alone at its new positions. With its whole length repaired it equals a
full prefill, and so does everything computed after it. Tokens that were not repaired differ from a full prefill.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import frozen, tiny, with_beginning
from programmable_kv import Field, Notebook, Rows, SeamRepair, Skill
from programmable_kv.cache.span import Span
from programmable_kv.errors import (
    ContextOverflowError,
    FingerprintMismatchError,
    FrequencyRegimeError,
    InvalidEditError,
    InvalidValueError,
    NotPrefilledError,
    TemplateError,
    UnknownFieldError,
    UnknownPartError,
    UnverifiedError,
)
from programmable_kv.prompt.units import Kind
from programmable_kv.states import TokenState
from reference import assert_rows_equal, full_forward, largest_difference

REFUNDS = "refund policy: if the tier is gold refund, if silver deny. reply only with the action.\n"
DATES = "date policy: orders delivered before 2026 are returned.\n"
WHOLE = SeamRepair(seam=10_000)
NONE = SeamRepair(seam=0)


def build(model: Any = None) -> Notebook:
    notebook = Notebook(model or tiny()).message(
        "system", "you are an agent. status: {status}. reply only.", status="pending"
    )
    notebook.message("user", "the customer asks to cancel the order")
    notebook.prefill()
    return notebook


def exact_up_to(notebook: Notebook, slots: range, atol: float = 1e-9) -> None:
    expected, _ = full_forward(notebook.model.engine.model, notebook.ids)
    assert_rows_equal(notebook.cache, expected, slots, atol=atol)


def atol(model_type: str) -> float:
    return 2e-4 if model_type == "gemma2" else 1e-9


@pytest.mark.parametrize("preface", ["", "orders are dated."], ids=["alone", "preface"])
def test_a_spliced_skill_is_the_skill_alone_at_its_new_place(model_type: str, preface: str) -> None:
    """It equals a forward after its preface, if it has one. A rotation wrong by one, or a full prefill, differs."""
    model = tiny(model_type)
    notebook = build(model)
    skill = Skill.compile(model, REFUNDS, name="refunds", preface=preface)
    account = notebook.splice(skill, repair=NONE)
    span = notebook.part("refunds").span
    assert account.tokens_computed == 0
    assert account.tokens_relocated == len(skill)
    before = model.tokenizer.encode(preface) if preface else []
    ids = (*before, *skill.unit.ids)
    alone, wrong = model.engine.new_buffer(), model.engine.new_buffer()
    for cache, shift in ((alone, 0), (wrong, 1)):
        positions = tuple(range(span.start - len(before) + shift, span.stop + shift))
        model.engine.compute(cache, Rows(ids, tuple(range(len(ids))), positions), logits=0)
    for layer, rule in enumerate(model.engine.require_relocation().layers):
        still: Any = "values" if rule.rotated == "keys" else "keys"
        found, right, off = (
            getattr(cache, rule.rotated)(layer)[:, :, -len(skill) :] for cache in (notebook.cache, alone, wrong)
        )
        # Rotary tables are float32, even in a float64 model.
        torch.testing.assert_close(found, right, rtol=0, atol=max(1e-4, atol(model_type)))
        assert float((found - off).abs().max()) > 1e-2, "a rotation that is wrong by one must show"
        copied = getattr(notebook.cache, still)(layer)[:, :, span.start : span.stop]
        torch.testing.assert_close(copied, skill.segment.tensors(still)[layer], rtol=0, atol=0)
    expected, _ = full_forward(model.engine.model, notebook.ids)
    assert largest_difference(notebook.cache, expected, span.range) > 1e-3, "it never saw what precedes it"
    assert set(notebook.states[span.start :]) == {TokenState.RELOCATED}


@pytest.mark.parametrize("seam", [0, 1, 5])
def test_the_seam_is_as_in_a_full_prefill(model_type: str, seam: int) -> None:
    notebook = build(tiny(model_type))
    notebook.splice(Skill.compile(notebook.model, REFUNDS, name="refunds"), repair=SeamRepair(seam=seam))
    span = notebook.part("refunds").span
    exact_up_to(notebook, range(span.start + seam), atol(model_type))
    expected, _ = full_forward(notebook.model.engine.model, notebook.ids)
    assert largest_difference(notebook.cache, expected, range(span.start + seam, span.stop)) > 1e-3, (
        "the seam is skipped"
    )
    states = notebook.states[span.start : span.stop]
    assert states == [TokenState.REPAIRED] * seam + [TokenState.RELOCATED] * (len(span) - seam)


def test_behind_its_preface_a_skill_is_a_full_prefill(model_type: str) -> None:
    """Then nothing of it is computed, not even a seam. Compiled alone it would be approximate."""
    model = tiny(model_type)
    skill = Skill.compile(model, REFUNDS, name="refunds", preface=DATES)
    alone = Skill.compile(model, REFUNDS, name="refunds")
    assert skill.text == REFUNDS
    behind = Notebook(model).text(DATES).text("{refunds}", refunds=skill)
    account = behind.prefill()
    assert account.tokens_computed == len(behind) - len(skill)
    assert set(behind.states) == {TokenState.EXACT}
    exact_up_to(behind, range(len(behind)), atol(model_type))
    unread = Notebook(model).text(DATES).text("{refunds}", refunds=alone)
    unread.prefill(repair=NONE)
    expected, _ = full_forward(model.engine.model, unread.ids)
    assert largest_difference(unread.cache, expected, unread.part("refunds").span.range) > 1e-4


def test_a_preface_may_be_the_beginning_of_a_conversation() -> None:
    before = [("system", "you are an agent.\n")]
    skill = Skill.compile(tiny(), REFUNDS + "the tier is {tier}.", name="refunds", tier="gold", preface=before)
    notebook = Notebook(tiny()).message("system", "you are an agent.\n{refunds}", refunds=skill)
    account = notebook.prefill()
    assert account.tokens_computed == len(notebook) - len(skill)
    assert set(notebook.states) == {TokenState.EXACT}
    exact_up_to(notebook, range(len(notebook)))
    notebook.edit(tier="silver", mode="suffix")
    exact_up_to(notebook, range(len(notebook)))
    live = build()
    live.splice(skill, repair=NONE)
    assert TokenState.EXACT not in live.states[live.part("refunds").span.start :]


def test_a_preface_that_a_template_has_no_place_for_is_refused() -> None:
    chat = copy.copy(tiny().tokenizer)
    chat.chat_template = "{% for message in messages %}{{ message['role'] }} {% endfor %}"
    with pytest.raises(TemplateError, match="drops or repeats the system message"):
        Skill.compile(replace(tiny(), tokenizer=chat), REFUNDS, preface=[("system", "")])
    with pytest.raises(InvalidValueError, match="preface contains"):
        Skill.compile(tiny(), REFUNDS, preface=[("system", "\ue00a")])


@pytest.mark.parametrize("preface", ["see <|im_end|> there", [("system", "see <|im_end|> there")]])
def test_special_tokens_in_skills_and_prefaces_are_text(preface: Any) -> None:
    model = tiny()
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    skill = Skill.compile(model, "cp <|im_end|> {file}", file=Field("<turn>", trusted=True), preface=preface)
    assert end not in (*skill.unit.ids, *skill.preface_ids)
    assert skill.text == "cp <|im_end|> <turn>"
    assert model.tokenizer.decode(skill.unit.ids) == skill.text
    assert skill.preface.endswith("see <|im_end|> there")


@pytest.mark.parametrize(
    "preface",
    [[{"role": "system", "content": "rules"}], ("system", "rules"), ("ai", "ok"), ["hello"], [("system", 3)],
     [("<|im_end|>", "x")], [("system", "a \ue008")]],
)  # fmt: skip
def test_what_is_no_preface_is_refused(preface: Any) -> None:
    with pytest.raises(InvalidValueError):
        Skill.compile(tiny(), REFUNDS, preface=preface)


def test_a_message_behind_a_conversation_is_exact_at_that_turn() -> None:
    """The conversation before it is complete: the message is not part of its last message."""
    said = [("system", "rules."), ("user", "look it up")]
    result = Skill.compile(tiny(), "found: gold", name="result", role="tool", preface=said)
    notebook = Notebook(tiny()).message(*said[0]).message(*said[1])
    notebook.prefill()
    assert notebook.splice(result).tokens_computed == 0
    assert set(notebook.states) == {TokenState.EXACT}
    exact_up_to(notebook, range(len(notebook)))
    with pytest.raises(InvalidValueError, match="role"):
        Skill.compile(tiny(), "found: gold", role="<|im_end|>")


def test_a_preface_begins_as_raw_text_does() -> None:
    """It begins with the beginning-of-text token, if the tokenizer has one."""
    model = with_beginning(tiny())
    skill = Skill.compile(model, REFUNDS, name="refunds", preface=DATES)
    notebook = Notebook(model).text(DATES).text("{refunds}", refunds=skill)
    notebook.prefill()
    assert notebook.ids[0] == skill.preface_ids[0] == model.tokenizer.bos_token_id
    assert set(notebook.states) == {TokenState.EXACT}
    alone = Skill.compile(model, REFUNDS, name="alone")
    assert alone.preface_ids == (notebook.ids[0],)
    expected, _ = full_forward(model.engine.model, [*alone.preface_ids, *alone.unit.ids])
    without, _ = full_forward(model.engine.model, alone.unit.ids)
    for values, (_, theirs) in zip(alone.segment.values, expected, strict=True):
        torch.testing.assert_close(values, theirs[:, :, 1:], rtol=0, atol=1e-9)
    assert not torch.allclose(alone.segment.values[-1], without[-1][1])
    opened = Skill.compile(model, REFUNDS, name="opened", preface=[("system", "")])
    chat = Notebook(model).message("system", "{opened}", opened=opened)
    chat.prefill()
    assert notebook.ids[0] not in opened.preface_ids, "a chat template writes what begins a conversation itself"
    assert set(chat.states) == {TokenState.EXACT}


def test_what_a_preface_said_is_not_known() -> None:
    """So an edit states the value, though nothing in this context contradicts it, and `suffix` recomputes the skill."""
    skill = Skill.compile(tiny(), REFUNDS, name="refunds", preface="status: pending")
    plain = Skill.compile(tiny(), REFUNDS, name="refunds")
    for spliced, lines in ((skill, 1), (plain, 0)):
        notebook = Notebook(tiny()).text("order 5. status: {status}", status="pending")
        notebook.prefill()
        notebook.splice(spliced, repair=NONE)
        again = notebook.fork()
        account = notebook.edit(status="shipped", mode="field_erratum")
        assert ("no erratum" in account.why) is not bool(lines)
        assert sum(part.kind is Kind.ERRATUM for part in notebook.parts) == lines
        again.edit(status="shipped", mode="suffix")
        exact_up_to(again, range(len(again)))
        assert set(again.states) == {TokenState.EXACT}


def test_a_value_that_is_written_otherwise_is_not_joined() -> None:
    notebook = Notebook(tiny()).text("status: {status}. ok. ", status="pending")
    notebook.prefill()
    notebook.edit(status="shipped", mode="erratum")
    skill = Skill.compile(tiny(), "the status is {status} here. ", {"status": "shipped"}, name="note")
    before = (notebook.ids, notebook.states)
    with pytest.raises(InvalidEditError, match="still says 'pending'"):
        notebook.splice(skill)
    assert (notebook.ids, notebook.states) == before
    notebook.edit(status="shipped", mode="suffix")
    notebook.splice(skill)
    notebook.edit(status="pending", mode="suffix")
    assert "the status is pending here" in notebook.rendered_text


def test_a_skill_behind_its_preface_is_exact_whatever_the_cache_holds_there() -> None:
    """It read exactly these tokens, computed exactly. Recomputing its seam on a stale cache would make it worse."""
    skill = Skill.compile(tiny(), REFUNDS, name="refunds", preface="status: shipped. what applies?")
    for mode in ("in_place", "suffix"):
        notebook = Notebook(tiny()).text("status: {status}. what applies?", status="pending")
        notebook.prefill()
        notebook.edit(status="shipped", mode=mode)
        stale = TokenState.STALE in notebook.states
        assert stale is (mode == "in_place")
        assert notebook.splice(skill).tokens_computed == 0
        span = notebook.part("refunds").span
        assert tuple(notebook.ids) == skill.preface_ids + skill.unit.ids
        assert set(notebook.states[span.start :]) == {TokenState.EXACT}
        exact_up_to(notebook, span.range)
        notebook.add("user", "so?")
        assert notebook.states[-1] is (TokenState.AFTER_EDIT if stale else TokenState.EXACT)


def test_a_skill_that_read_a_value_goes_stale_with_it() -> None:
    skill = Skill.compile(tiny(), REFUNDS, name="refunds", preface="status: pending. ")
    notebook = Notebook(tiny()).text("status: {status}. ", status="pending").text("{refunds}", refunds=skill)
    notebook.prefill()
    assert set(notebook.states) == {TokenState.EXACT}
    notebook.edit(status="shipped", mode="in_place")
    span = notebook.part("refunds").span
    assert set(notebook.states[span.start : span.stop]) == {TokenState.STALE}


def test_a_skill_with_a_preface_is_not_exact_at_the_start() -> None:
    skill = Skill.compile(tiny(), REFUNDS, name="refunds", preface=DATES)
    notebook = Notebook(tiny()).text("{refunds}", refunds=skill)
    notebook.prefill(repair=NONE)
    assert set(notebook.states) == {TokenState.RELOCATED}
    mended = Notebook(tiny()).text("{refunds}", refunds=skill)
    mended.prefill(repair=WHOLE)
    assert set(mended.states) == {TokenState.REPAIRED}
    exact_up_to(mended, range(len(mended)))


def test_a_preface_is_text_and_counts() -> None:
    with pytest.raises(InvalidValueError, match="preface contains"):
        Skill.compile(tiny(), REFUNDS, preface="\ue00a")
    with pytest.raises(ContextOverflowError):
        Skill.compile(tiny(), REFUNDS, preface=DATES * 60)
    assert Skill.compile(tiny(), "{preface}", {"preface": "gold"}).values == {"preface": "gold"}


def test_wholly_repaired_and_continued_is_a_full_prefill(model_type: str) -> None:
    notebook = build(tiny(model_type))
    notebook.splice(Skill.compile(notebook.model, REFUNDS), repair=WHOLE)
    notebook.add("user", "and now?")
    exact_up_to(notebook, range(len(notebook)), atol(model_type))
    assert set(notebook.states) == {TokenState.EXACT, TokenState.REPAIRED}


@pytest.mark.parametrize("repair", [NONE, SeamRepair(), WHOLE], ids=["none", "seam", "whole"])
def test_a_splice_and_a_question_in_one_forward(model_type: str, repair: SeamRepair) -> None:
    """The cache, ledger, decision and cost are those of two calls, and an edit cannot be added."""
    model = tiny(model_type)
    skill = Skill.compile(model, REFUNDS, name="refunds", role="tool")
    one, two = build(model), build(model)
    together = one.decide("and now?", ["refund", "deny"], skill=skill, repair=repair)
    spliced = two.splice(skill, repair=repair)
    apart = two.decide("and now?", ["refund", "deny"])
    for option, score in apart.log_probabilities.items():
        assert abs(together.log_probabilities[option] - score) < 10 * atol(model_type)
    assert (one.ids, one.states, one.parts) == (two.ids, two.states, two.parts)
    for layer in range(len(one.cache)):
        torch.testing.assert_close(one.cache.keys(layer), two.cache.keys(layer), rtol=0, atol=10 * atol(model_type))
    assert together.account.tokens_computed == spliced.tokens_computed + apart.account.tokens_computed
    before = one.ids
    with pytest.raises(InvalidEditError, match="one forward"):
        one.decide("and?", ["refund", "deny"], skill=skill, edits={"status": "shipped"})
    with pytest.raises(InvalidEditError, match="without a skill"):
        one.decide("and?", ["refund", "deny"], repair=repair)
    assert one.ids == before


def test_a_seam_is_refused_where_rows_cannot_be_computed_again() -> None:
    """A model may pass the check of relocation but not that of rows: then skills can be spliced only without a seam."""
    model = tiny()
    model.engine._proofs._rows = replace(model.engine.rows, exact=False, reason="a mask of its own making")
    notebook = Notebook(model).text("the order status is pending. ")
    notebook.prefill()
    skill = Skill.compile(model, REFUNDS, name="refunds")
    before = notebook.ids
    with pytest.raises(UnverifiedError, match="SeamRepair\\(0\\)"):
        notebook.splice(skill)
    assert notebook.ids == before
    assert notebook.splice(skill, repair=NONE).tokens_computed == 0


def test_skills_as_parts_of_a_prompt() -> None:
    model = tiny()
    refunds, dates = (Skill.compile(model, text, name=name) for text, name in ((REFUNDS, "refunds"), (DATES, "dates")))
    notebook = Notebook(model)
    notebook.message(
        "system", "agent. tier: {tier}.\n{refunds}{dates}reply only.", tier="gold", refunds=refunds, dates=dates
    )
    account = notebook.prefill()
    assert notebook.rendered_text == f"<|im_start|>system\nagent. tier: gold.\n{REFUNDS}{DATES}reply only.<|im_end|>\n"
    assert [part.kind for part in notebook.parts] == [Kind.PREFILL, Kind.SKILL, Kind.SKILL, Kind.PREFILL]
    assert account.tokens_computed < len(notebook) - len(refunds)
    assert notebook.fields == {"tier": "gold"}
    notebook.edit(tier="silver", mode="full")
    exact_up_to(notebook, range(len(notebook)))
    assert set(notebook.states) == {TokenState.EXACT}
    raw = Notebook(model).text("agent.\n").skill(refunds).text("reply only.")
    raw.prefill()
    assert raw.rendered_text == f"agent.\n{REFUNDS}reply only."


@pytest.mark.parametrize("mode", ["in_place", "field_erratum", "selective", "suffix", "full", "erratum"])
def test_a_field_inside_a_spliced_skill_is_edited_in_every_mode(mode: str) -> None:
    """The central case: an edit inside a spliced skill."""
    notebook = build()
    skill = Skill.compile(
        notebook.model,
        "reply only with the action. if tier is {wanted} refund, else deny.\n",
        name="rule",
        wanted="gold",
    )
    notebook.splice(skill)
    notebook.add("user", "now?")
    assert notebook.fields == {"status": "pending", "wanted": "gold"}
    notebook.edit(wanted="silver tier customer", mode=mode, k=3)
    assert notebook.fields["wanted"] == "silver tier customer"
    assert ("STATE UPDATE" in notebook.rendered_text) == (mode in ("erratum", "field_erratum"))
    assert notebook.cache.length == len(notebook.ids) == len(notebook.states)
    if mode == "full":
        exact_up_to(notebook, range(len(notebook)))
    else:
        assert set(notebook.states[notebook.part("rule").span.stop :]) != {TokenState.EXACT}


def test_a_skill_of_another_value_or_model_is_refused() -> None:
    notebook = build()
    with pytest.raises(InvalidEditError, match="compiled with status"):
        notebook.splice(Skill.compile(notebook.model, "status {status} here", status="shipped"))
    with pytest.raises(FingerprintMismatchError, match="compile it again"):
        notebook.splice(Skill.compile(tiny("qwen2"), REFUNDS))
    assert len(notebook.parts) == 1


def test_splicing_in_the_middle_relocates_what_follows_and_calls_it_stale() -> None:
    notebook = build()
    before = notebook.fork()
    skill = Skill.compile(notebook.model, DATES, name="dates")
    at = notebook.spans("status")[0].stop + 2
    account = notebook.splice(skill, at=at)
    assert notebook.ids == before.ids[:at] + list(skill.unit.ids) + before.ids[at:]
    assert account.tokens_relocated == len(skill) + len(before) - at
    assert "have not read dates" in account.why
    exact_up_to(notebook, range(at + 4))
    assert set(notebook.states[at + len(skill) :]) == {TokenState.STALE}
    notebook.edit(status="pending", mode="full")
    assert set(notebook.states) == {TokenState.EXACT}


def test_cut_undoes_splice_bit_for_bit_and_knows_what_it_does_not_know() -> None:
    notebook = build()
    before = notebook.fork()
    at = notebook.spans("status")[0].stop + 2
    notebook.splice(Skill.compile(notebook.model, DATES, name="dates"), at=at)
    notebook.cut("dates")
    assert notebook.ids == before.ids
    assert notebook.rendered_text == before.rendered_text
    for layer in range(len(notebook.cache)):
        assert torch.equal(notebook.cache.keys(layer), before.cache.keys(layer))
        assert torch.equal(notebook.cache.values(layer), before.cache.values(layer))
    assert not notebook.cache.relocated.numel()


def test_move_touches_only_what_lies_between() -> None:
    notebook = build()
    refunds, dates = (
        Skill.compile(notebook.model, text, name=name) for text, name in ((REFUNDS, "refunds"), (DATES, "dates"))
    )
    start = len(notebook)
    notebook.splice(refunds)
    notebook.splice(dates)
    notebook.add("user", "now?")
    tail = len(notebook) - start - len(refunds) - len(dates)
    account = notebook.move("dates", to=notebook.part("refunds"))
    assert account.tokens_relocated == len(refunds) + len(dates)
    assert [part.name for part in notebook.parts] == ["", "dates", "refunds", ""]
    assert notebook.part("refunds").span.stop == len(notebook) - tail
    moved = notebook.part("dates").span
    for layer, rule in enumerate(notebook.model.engine.require_relocation().layers):
        from programmable_kv.cache.rotation import rotate

        assert rule.rotary is not None
        right = rotate(dates.segment.keys[layer], torch.full((len(dates),), moved.start), rule.rotary)
        found = notebook.cache.keys(layer)[:, :, moved.start + 4 : moved.stop]
        assert torch.equal(found, right[:, :, 4:]), "moved from the canonical keys, not from the rotated ones"
    notebook.move("dates")
    assert notebook.parts[-1].name == "dates"
    with pytest.raises(InvalidEditError, match="into themselves"):
        notebook.move("refunds", to=notebook.part("refunds").span.start + 2)


def test_a_thousand_moves_are_one() -> None:
    notebook = build()
    notebook.splice(Skill.compile(notebook.model, REFUNDS, name="refunds"))
    notebook.splice(Skill.compile(notebook.model, DATES, name="dates"), repair=NONE)
    once = notebook.fork()
    once.move("dates", to=once.part("refunds"))
    for _ in range(500):
        notebook.move("dates", to=notebook.part("refunds"))
        notebook.move("refunds", to=notebook.part("dates"))
    notebook.move("dates", to=notebook.part("refunds"))
    assert notebook.ids == once.ids
    for layer in range(len(once.cache)):
        assert torch.equal(notebook.cache.keys(layer), once.cache.keys(layer))


def test_recompute_makes_it_exact() -> None:
    notebook = build()
    notebook.splice(Skill.compile(notebook.model, DATES, name="dates"), at=notebook.spans("status")[0].stop + 2)
    notebook.add("user", "so?")
    first = next(slot for slot, state in enumerate(notebook.states) if not state.exact)
    account = notebook.recompute()
    assert account.tokens_computed == len(notebook) - first
    assert account.tokens_reused == first
    exact_up_to(notebook, range(len(notebook)))
    assert all(state.exact for state in notebook.states)
    assert notebook.recompute().tokens_computed == 0


def test_replace_is_cut_and_splice_at_one_relocation() -> None:
    notebook = build()
    notebook.splice(Skill.compile(notebook.model, REFUNDS, name="refunds"))
    notebook.add("user", "now?")
    other = notebook.fork()
    dates = Skill.compile(notebook.model, DATES, name="dates")
    span = notebook.part("refunds").span
    account = notebook.replace("refunds", dates)
    assert account.tokens_relocated == len(dates) + len(other) - span.stop
    other.cut("refunds")
    other.splice(dates, at=span.start)
    assert notebook.ids == other.ids
    assert notebook.states == other.states
    for layer in range(len(notebook.cache)):
        assert torch.equal(notebook.cache.keys(layer), other.cache.keys(layer))


@pytest.mark.parametrize(("rule", "count"), [("deviation:25%", 0.25), ("influence:3", 3)])
def test_other_repairs(rule: str, count: float) -> None:
    notebook = build()
    skill = Skill.compile(notebook.model, REFUNDS, name="refunds")
    account = notebook.splice(skill, repair=SeamRepair(seam=0, rule=rule))
    states = notebook.states[notebook.part("refunds").span.start :]
    repaired = sum(state is not TokenState.RELOCATED for state in states)
    assert repaired == (round(count * len(skill)) if count < 1 else count)
    assert account.tokens_computed == repaired + (len(skill) if count < 1 else 1), "what ranking cost is counted"


def test_what_a_tool_returned_is_spliced_between_turns() -> None:
    notebook = build()
    result = Skill.compile(notebook.model, "order delivered 2026", name="result", role="tool")
    assert result.text == "<|im_start|>tool\norder delivered 2026<|im_end|>\n"
    notebook.splice(result)
    notebook.add("user", "so?")
    decision = notebook.decide(None, ["cancel", "deny"])
    assert sum(decision.probabilities.values()) == pytest.approx(1.0)
    saved = notebook.fork()
    assert saved.states == notebook.states


def test_saved_and_loaded_with_skills(tmp_path: Any) -> None:
    notebook = build()
    notebook.splice(Skill.compile(notebook.model, REFUNDS, name="refunds"), at=notebook.spans("status")[0].stop)
    notebook.add("user", "so?")
    notebook.save(tmp_path / "saved")
    loaded = Notebook.load(tmp_path / "saved", notebook.model)
    assert loaded.states == notebook.states
    assert loaded.parts == notebook.parts
    for each in (loaded, notebook):
        each.cut("refunds")
        each.add("user", "and?")
    assert loaded.ids == notebook.ids
    for layer in range(len(notebook.cache)):
        assert torch.equal(loaded.cache.keys(layer), notebook.cache.keys(layer))


class TestErrors:
    """Each of these is refused, and the notebook is unchanged."""

    def check(self, error: type[Exception], match: str, operation: Any, notebook: Notebook | None = None) -> None:
        notebook = notebook or build()
        before = notebook.fork()
        with pytest.raises(error, match=match):
            operation(notebook)
        assert notebook.ids == before.ids
        assert notebook.parts == before.parts
        assert notebook.states == before.states
        for layer in range(len(before.cache)):
            assert torch.equal(notebook.cache.keys(layer), before.cache.keys(layer))

    def test_no_such_part(self) -> None:
        self.check(UnknownPartError, "no skill 'nothing'", lambda n: n.cut("nothing"))

    def test_no_such_slot(self) -> None:
        self.check(UnknownPartError, "no slot", lambda n: n.splice(Skill.compile(n.model, DATES), at=10_000))

    def test_inside_a_value(self) -> None:
        notebook = Notebook(tiny()).message("system", "status: {status}. so.", status="cancelled by the customer")
        notebook.prefill()
        inside = notebook.spans("status")[0].start + 1
        skill = Skill.compile(notebook.model, DATES)
        self.check(InvalidEditError, "inside the value", lambda n: n.splice(skill, at=inside), notebook)

    def test_too_long(self) -> None:
        notebook = build(tiny(max_position_embeddings=64))
        skill = Skill.compile(notebook.model, REFUNDS)
        self.check(ContextOverflowError, "positions", lambda n: n.splice(skill), notebook)

    def test_learned_positions(self) -> None:
        notebook = build(tiny("gpt2", n_positions=1024, n_embd=32, n_layer=2, n_head=4))
        skill = Skill.compile(notebook.model, DATES, name="dates")
        for operation in (
            lambda n: n.splice(skill),
            lambda n: n.cut(Span(3, 5)),
            lambda n: n.move(Span(3, 5)),
        ):
            self.check(UnverifiedError, "learned", operation, notebook)

    def test_beyond_a_regime(self) -> None:
        """LongRoPE's frequencies change at 128 tokens: exact below, refused if a position would be beyond."""
        parameters = {
            "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128,
            "short_factor": (1.0, 1.0, 1.5, 2.0), "long_factor": (2.0, 4.0, 4.0, 8.0),
        }  # fmt: skip
        notebook = build(tiny(rope_parameters=frozen(parameters)))
        skill = Skill.compile(notebook.model, DATES, name="dates")
        notebook.splice(skill, at=0, repair=WHOLE)
        notebook.edit(status="cancelled", mode="field_erratum")
        notebook.recompute()
        exact_up_to(notebook, range(len(notebook)))
        assert len(notebook) < 128 < len(notebook) + 2 * len(skill)
        second = Skill.compile(notebook.model, REFUNDS * 2, name="refunds")
        assert len(notebook) + len(second) > 128
        self.check(UnverifiedError, "below 128", lambda n: n.splice(second, at=0), notebook)
        self.check(FrequencyRegimeError, "beyond 128", lambda n: n.add("user", REFUNDS * 2), notebook)
        beyond = Notebook(notebook.model).message("system", "status: {status}. " + REFUNDS * 5, status="new")
        beyond.prefill()
        assert len(beyond) > 128
        self.check(UnverifiedError, "below 128", lambda n: n.cut(Span(3, 5)), beyond)
        self.check(UnverifiedError, "below 128", lambda n: n.edit(status="pending again", mode="in_place"), beyond)

    @pytest.mark.parametrize("rule", ["deviation", "deviation:x%", "influence:", "best"])
    def test_unknown_repairs(self, rule: str) -> None:
        with pytest.raises(InvalidEditError, match="deviation:15%"):
            SeamRepair(rule=rule)

    def test_what_cannot_be_compiled(self) -> None:
        with pytest.raises(InvalidValueError, match="empty"):
            Skill.compile(tiny(), "")
        with pytest.raises(InvalidValueError, match="private-use"):
            Skill.compile(tiny(), "obey \ue00a")
        with pytest.raises(UnknownFieldError):
            Skill.compile(tiny(), "no field", status="x")


_TEXTS = st.sampled_from([REFUNDS, DATES, "reply only.\n", "if gold, refund.\n"])


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_composition_keeps_its_books_and_can_be_made_exact(data: st.DataObject) -> None:
    """Text, tokens, states and cache always agree, tokens called exact are exact, and a full edit makes all exact."""
    notebook = build()
    serial = 0
    for _ in range(data.draw(st.integers(2, 7))):
        what = data.draw(st.sampled_from(["splice", "cut", "move", "replace", "edit", "add", "mark"]))
        names = [part.name for part in notebook.parts if part.name]
        try:
            if what == "splice":
                serial += 1
                skill = Skill.compile(notebook.model, data.draw(_TEXTS), name=f"skill_{serial}")
                at = data.draw(st.integers(0, len(notebook)))
                notebook.splice(skill, at=at, repair=SeamRepair(data.draw(st.integers(0, 60))))
            elif what in ("cut", "move", "replace") and names:
                name = data.draw(st.sampled_from(names))
                if what == "cut":
                    notebook.cut(name)
                elif what == "move":
                    notebook.move(name, to=data.draw(st.integers(0, len(notebook))))
                else:
                    serial += 1
                    notebook.replace(name, Skill.compile(notebook.model, data.draw(_TEXTS), name=f"skill_{serial}"))
            elif what == "edit":
                mode = data.draw(st.sampled_from(["in_place", "field_erratum", "suffix", "erratum", "selective"]))
                notebook.edit(status=data.draw(st.sampled_from(["shipped", "cancelled by me"])), mode=mode, k=2)
            elif what == "add":
                notebook.add("user", "ok then")
            elif what == "mark":
                ids, mark = notebook.ids, notebook.mark()
                notebook.add("user", "now?")
                notebook.rollback(mark)
                assert notebook.ids == ids
        except (
            InvalidEditError,
            UnknownPartError,
        ):  # a slot inside a value, a character or the part itself is refused, and nothing changes
            pass
        assert notebook.cache.length == len(notebook.ids) == len(notebook.states)
        assert notebook.cache.dense
        expected, _ = full_forward(notebook.model.engine.model, notebook.ids)
        good = (TokenState.EXACT, TokenState.REPAIRED)
        exact = [slot for slot, state in enumerate(notebook.states) if state in good]
        assert_rows_equal(notebook.cache, expected, exact, atol=1e-4)
    notebook.edit(status="pending", mode="full")
    exact_up_to(notebook, range(len(notebook)))
    assert set(notebook.states) == {TokenState.EXACT}


def test_a_field_after_a_skill_is_a_field() -> None:
    """Its place is in a piece of the prompt that is computed after the splice."""
    model = tiny()
    refunds = Skill.compile(model, REFUNDS, name="refunds")
    notebook = Notebook(model).message(
        "system", "agent.\n{refunds}status: {status}.", refunds=refunds, status="pending"
    )
    notebook.message("user", "the tier is {tier}?", tier="gold").prefill()
    assert notebook.fields == {"status": "pending", "tier": "gold"}
    notebook.edit(status="shipped", tier="silver", mode="full")
    assert "status: shipped." in notebook.rendered_text
    assert "tier is silver?" in notebook.rendered_text
    exact_up_to(notebook, range(len(notebook)))


def test_a_message_is_compiled_without_what_begins_a_conversation() -> None:
    """A template that adds its own system message before a lone turn must not add it to the skill."""
    model = tiny()
    own = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nbe nice<|im_end|>\n{% endif %}"
    chat = copy.copy(model.tokenizer)
    chat.chat_template = "<s>" + own + chat.chat_template
    result = Skill.compile(replace(model, tokenizer=chat), "order {order}", {"order": "77"}, role="tool")
    assert result.text == "<|im_start|>tool\norder 77<|im_end|>\n"
    assert [place.name for place in result.unit.places] == ["order"]
    with pytest.raises(TemplateError, match="no system role"):
        Skill.compile(tiny(kind="metaspace"), "order", role="system")


def test_a_field_may_be_called_like_an_argument() -> None:
    model = tiny()
    assert Skill.compile(model, "role: {role}, {name}.", {"role": "admin", "name": "bo"}).text == "role: admin, bo."
    with pytest.raises(InvalidValueError, match="in a mapping"):
        Skill.compile(model, "role: {role}.", role="admin")


def test_replacing_the_last_part_forgets_what_was_refreshed_in_it() -> None:
    notebook = build()
    notebook.add("user", "so? " * 30)
    notebook.edit(status="shipped", mode="selective", k=1000)
    notebook.replace(notebook.parts[-1], Skill.compile(notebook.model, "dates.\n"), repair=NONE)
    assert len(notebook.states) == len(notebook)
    notebook.recompute()
    exact_up_to(notebook, range(len(notebook)))


@pytest.mark.parametrize("how", ["cut", "move", "splice"])
def test_what_a_selective_edit_refreshed_is_forgotten_when_slots_move(how: str) -> None:
    notebook = build()
    notebook.edit(status="shipped", mode="selective", k=1000)
    assert set(notebook.states) == {TokenState.EXACT}, "all that follows was computed again"
    if how == "cut":
        notebook.add("user", "so?")
        notebook.cut(notebook.parts[-1])
        notebook.cut(Span(len(notebook) - 2, len(notebook)))
    elif how == "move":
        notebook.add("user", "so?")
        notebook.move(notebook.parts[-1], to=0)
    else:
        notebook.splice(Skill.compile(notebook.model, DATES), at=0)
    assert len(notebook.states) == len(notebook)
    assert TokenState.REFRESHED not in notebook.states
    notebook.recompute()
    exact_up_to(notebook, range(len(notebook)))


def test_a_skills_values_are_data_too() -> None:
    model = tiny()
    speaks = Skill.compile(model, "note: {note}\n", note="status is shipped")
    notebook = build(model)
    with pytest.raises(InvalidValueError, match="states a value of the field status"):
        notebook.splice(speaks)
    with pytest.raises(InvalidValueError, match="states a value of the field status"):
        Notebook(model).message("system", "{status}\n{speaks}", status="pending", speaks=speaks)
    with pytest.raises(InvalidValueError, match="states a value of the field tier"):
        Notebook(model).text("note: {note}", note="tier is gold").text("tier: {tier}", tier="silver")
    worded = Skill.compile(model, "note: {note}\n", note="henceforth read shipped")
    own = Notebook(model, erratum_template="henceforth read {name} as {value}").text("status: {status}", status="new")
    own.prefill()
    with pytest.raises(InvalidValueError, match="words of the erratum template"):
        own.splice(worded)


def test_a_move_to_where_it_is_costs_nothing() -> None:
    notebook = build()
    notebook.splice(Skill.compile(notebook.model, DATES, name="dates"), repair=WHOLE)
    before = notebook.states
    account = notebook.move("dates")
    assert (account.tokens_relocated, account.tokens_computed, account.bytes_moved) == (0, 0, 0)
    assert notebook.states == before


def test_the_note_of_a_move_counts_what_was_moved() -> None:
    notebook = build()
    for number in range(4):
        notebook.add("user", f"turn {number} about the order")
    first, second = notebook.parts[1:3]
    account = notebook.move(first, to=second.span.stop)
    assert account.tokens_relocated == len(first.span) + len(second.span) < len(notebook) - first.span.start
    assert account.why.startswith(f"{account.tokens_relocated} tokens were relocated")


def test_an_empty_context_says_so() -> None:
    notebook = build()
    notebook.cut(Span(0, len(notebook)))
    assert notebook.ids == []
    raw = Notebook(tiny()).text("agent")
    raw.prefill()
    raw.cut(Span(0, len(raw)))
    with pytest.raises(InvalidEditError, match="context is empty"):
        raw.decide(options=["refund", "deny"])
    with pytest.raises(NotPrefilledError, match="text is empty"):
        Notebook(tiny()).text("").prefill()
    assert raw.add("user", "").tokens_computed == 0
