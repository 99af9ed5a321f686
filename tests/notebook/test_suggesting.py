"""Suggested readers: movement is compared with full forwards, and the notebook is unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny
from programmable_kv import Notebook
from programmable_kv.errors import InvalidArgumentError, InvalidOptionsError, InvalidValueError, UnknownFieldError
from programmable_kv.notebook import suggesting
from programmable_kv.notebook.movement import movement
from programmable_kv.notebook.suggesting import SuggestedReader, Suggestions
from programmable_kv.prompt.fields import Field

POLICY = (
    "reply only\nstatus: {status}\ntier: {tier}\nbe brief with the customer\nif status is shipped, deny.\n"
    "ask when the date is {status}.\nif it is pending, cancel.\n---\nthen reply"
)
LINES = [
    "tier: gold\n", "be brief with the customer\n", "if status is shipped, deny.\n", "ask when the date is shipped.\n",
    "if it is pending, cancel.\n",
]  # fmt: skip
"""lines with letters after the field's first place and before the question; the message's last line is treated below"""
OPTIONS = ["deny", "cancel"]


def prefilled(model: Any = None, status: str = "shipped", **options: Any) -> Notebook:
    notebook = Notebook(model or tiny(), **options).message("system", POLICY, status=status, tier="gold")
    notebook.message("user", "the customer asks to cancel").prefill()
    return notebook


def contents(notebook: Notebook) -> list[torch.Tensor]:
    cache = notebook.cache
    return [rows(layer).clone() for layer in range(len(cache)) for rows in (cache.keys, cache.values)]


def assert_same(notebook: Notebook, before: tuple[Any, ...]) -> None:
    tensors, *rest = before
    for now, then in zip(contents(notebook), tensors, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)
    assert (notebook.ids, notebook.states, notebook.fields, notebook.readers("status")) == tuple(rest)


def snapshot(notebook: Notebook) -> tuple[Any, ...]:
    return contents(notebook), notebook.ids, notebook.states, notebook.fields, notebook.readers("status")


def _place(ids: list[int], wanted: list[int]) -> slice:
    start = next(start for start in range(len(ids)) if ids[start : start + len(wanted)] == wanted)
    return slice(start, start + len(wanted))


@pytest.mark.parametrize("value", ["pending", "x", "cancelled by the customer"])
def test_movement_is_the_distance_to_a_full_prefill_of_the_new_text(model_type: str, value: str) -> None:
    """The cache under the old value, its keys relocated to their new positions, against a prefill of the new text."""
    model = tiny(model_type)
    notebook = prefilled(model)
    before = snapshot(notebook)
    moved = movement(notebook, "status", value)
    assert_same(notebook, before)
    stale, new = notebook.fork(), prefilled(model, status=value)
    stale.edit(status=value, mode="in_place")
    assert stale.ids == new.ids
    shares = []
    for old, true in zip(contents(stale), contents(new), strict=True):
        shares.append((true - old).pow(2).sum(dim=(0, 1, 3)) / true.pow(2).sum(dim=(0, 1, 3)))
    expected = torch.stack(shares).mean(dim=0)
    last, new_last = notebook.spans("status")[-1].stop, new.spans("status")[-1].stop
    atol = 1e-5 if model_type == "gemma2" else 1e-9
    torch.testing.assert_close(moved[last:], expected[new_last:], rtol=atol, atol=atol)
    assert moved[last:].max() > 1e-3
    line = model.tokenizer.encode(" brief with the customer", add_special_tokens=False)
    here, there = (_place(each.ids, line) for each in (notebook, new))
    torch.testing.assert_close(moved[here], expected[there], rtol=atol, atol=atol)
    assert not moved[: notebook.spans("status")[0].stop].any()


def test_every_later_line_is_listed_once_the_most_moved_first() -> None:
    notebook = prefilled()
    before = snapshot(notebook)
    suggestions = notebook.suggest_readers("status", "pending", share=1e-6)
    assert_same(notebook, before)
    listed = [line.text for line in suggestions.lines]
    assert sorted(listed) == sorted([*LINES, "then reply<|im_end|>\n"]), "no line without letters, no question"
    assert [line.moved for line in suggestions.lines] == sorted((x.moved for x in suggestions.lines), reverse=True)
    assert suggestions.lines[0].share == 1
    known = {line.text: line.known for line in suggestions.lines if line.known}
    assert known == {LINES[2]: "mentions 'status'", LINES[3]: "holds the field"}
    assert {line.text for line in suggestions.missing} == set(listed) - set(known)
    moved = movement(notebook, "status", "pending")
    reader = next(reader for reader in notebook.readers("status") if reader.text == LINES[2])
    line = next(line for line in suggestions.lines if line.text == LINES[2])
    assert line.moved == pytest.approx(float(moved[reader.span.start : reader.span.stop].sum()))


def test_what_is_suggested_can_be_declared() -> None:
    notebook = prefilled()
    suggestions = notebook.suggest_readers("status", "pending", share=1e-6)
    notebook.mentions("status", *suggestions.words)
    again = notebook.suggest_readers("status", "pending", share=1e-6)
    assert again.missing == again.words == ()
    assert all(line.known for line in again.lines)
    assert [line.moved for line in again.lines] == pytest.approx([line.moved for line in suggestions.lines])


def test_a_larger_share_suggests_less() -> None:
    notebook = prefilled()
    every = notebook.suggest_readers("status", "pending", share=1e-6)
    weakest = every.missing[-1]
    fewer = notebook.suggest_readers("status", "pending", share=weakest.share * 1.001)
    assert weakest.text not in {line.text for line in fewer.missing}
    assert len(fewer.missing) == len(every.missing) - 1
    assert weakest.text in {line.text for line in fewer.lines}, "it is listed, and not suggested"


def test_it_costs_one_computation_of_what_follows() -> None:
    notebook = prefilled()
    suffix = notebook.plan.edit(status="pending", mode="suffix").tokens_computed
    field = notebook.plan.edit(status="pending", mode="in_place").tokens_computed
    account = notebook.suggest_readers("status", "pending").account
    assert suffix <= account.tokens_computed <= suffix + field
    assert account.operation == "suggest_readers"
    assert notebook.last_account == account


@pytest.mark.parametrize("mode", ["in_place", "erratum", "field_erratum"])
def test_what_was_stale_before_is_no_movement(mode: str) -> None:
    """The copy of an edited notebook is recomputed first, so its lines move as those of a fresh notebook do."""
    notebook = prefilled(status="delivered")
    notebook.edit(status="shipped", mode=mode)
    before = snapshot(notebook)
    suggestions = notebook.suggest_readers("status", "pending")
    assert_same(notebook, before)
    fresh = prefilled().suggest_readers("status", "pending")
    assert [line.text for line in suggestions.lines] == [line.text for line in fresh.lines]
    assert [line.moved for line in suggestions.lines] == pytest.approx([line.moved for line in fresh.lines])
    assert suggestions.account.tokens_computed > fresh.account.tokens_computed


def test_a_line_is_tried_in_a_decision(monkeypatch: pytest.MonkeyPatch) -> None:
    """If only one line and the question follow the field, recomputing that line gives full prefill's decision."""
    notebook = Notebook(tiny("phi3")).text("status: {status}\nthe only line of the policy\nreply:", status="shipped")
    notebook.prefill()
    before = snapshot(notebook)
    assert suggesting.SMALLEST_GAP > 0.1, "the tiny network's gaps are smaller than a trained one's"
    monkeypatch.setattr(suggesting, "SMALLEST_GAP", 1e-6)
    choices = ["deny", "cancel", "refund", "ask", "gold", "silver", "tier", "date", "policy", "customer"]
    suggestions = notebook.suggest_readers("status", "pending", options=choices)
    assert_same(notebook, before)
    (line,) = suggestions.missing
    assert line.closes == pytest.approx(1.0), "nothing is left of the distance"
    assert suggestions.trial is not None
    assert suggestions.trial.before == suggestions.trial.readers != suggestions.trial.full, "this network decides so"
    assert suggestions.trial.suggested == suggestions.trial.full
    assert suggestions.trial.before == notebook.decide(None, choices).choice
    assert "closes 100% of the distance" in str(suggestions)
    assert "MISSED  the only line of the policy" in str(suggestions)


def test_lines_are_not_tried_where_the_value_decides_nothing() -> None:
    notebook = prefilled()
    suggestions = notebook.suggest_readers("status", "shipped", options=OPTIONS)
    assert {line.moved for line in suggestions.lines} == {0.0}, "the same value moves nothing"
    assert suggestions.missing == ()
    assert suggestions.trial is not None
    assert suggestions.trial.before == suggestions.trial.full == suggestions.trial.readers


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"share": 0.0}, InvalidArgumentError),
        ({"share": 1.5}, InvalidArgumentError),
        ({"turns": "some"}, InvalidArgumentError),
        ({"options": ["deny"]}, InvalidOptionsError),
        ({"name": "colour"}, UnknownFieldError),
        ({"value": "on the moon"}, InvalidValueError),
    ],
)
def test_what_cannot_be_asked_is_refused_and_changes_nothing(changes: dict[str, Any], error: type[Exception]) -> None:
    notebook = Notebook(tiny()).message(
        "system", POLICY, status=Field.enum("shipped", among=("shipped", "x")), tier="a"
    )
    notebook.prefill()
    before = snapshot(notebook)
    given = {"name": "status", "value": "x", **changes}
    name, value = given.pop("name"), given.pop("value")
    with pytest.raises(error):
        notebook.suggest_readers(name, value, **given)
    assert_same(notebook, before)


def test_it_says_why() -> None:
    lost, read = SuggestedReader("one\n", 2.0, 1.0), SuggestedReader("two\n", 1.0, 0.5, known="mentions 'a'")
    tried = SuggestedReader("- three  times\n", 0.02, 0.01, closes=0.25)
    assert (lost.reason, tried.words) == ("moves 100% as far as the most moved line", "- three times")
    assert tried.reason == "moves 1% as far as the most moved line; alone it closes 25% of the distance"
    suggestions = Suggestions("a", (lost, read, tried), 0.1, None, prefilled().last_account)
    assert suggestions.words == ("one",)
    assert str(suggestions).splitlines() == [
        "MISSED  one  (moves 100% as far as the most moved line)",
        "reads   two  (moves 50% as far as the most moved line; already a reader: mentions 'a')",
    ]
    assert str(Suggestions("a", (), 0.1, None, prefilled().last_account)) == "no line after a moves"


def test_words_declared_for_words_count_for_every_field_behind_them(tmp_path: Path) -> None:
    policy = (
        "tier: {tier}\nplan: {plan}\ntier gold is in band one.\nplan gold is in band two.\nband one has desk a.\n"
        "desk a: deny.\nbe brief\nthen ask\n"
    )
    notebook = Notebook(tiny()).message("system", policy, tier="gold", plan="gold").message("user", "cancel?")
    notebook.prefill()

    def read(name: str) -> list[str]:
        return [reader.text.strip() for reader in notebook.readers(name) if reader.word]

    with pytest.raises(UnknownFieldError, match="unknown field 'band'"):
        notebook.mentions("band", "desk")
    notebook.mentions("tier", "band").mentions("band", "desk")
    every = ["tier gold is in band one.", "plan gold is in band two.", "band one has desk a.", "desk a: deny."]
    assert read("tier") == every
    assert read("plan") == ["plan gold is in band two."]
    notebook.mentions("plan", "band").mentions("desk", "tier", "desk")
    assert read("tier") == every, "a circle ends"
    assert read("plan") == every
    assert notebook.fork().readers("plan") == notebook.readers("plan")
    notebook.save(tmp_path / "saved")
    assert Notebook.load(tmp_path / "saved", notebook.model).readers("plan") == notebook.readers("plan")


def test_a_rule_that_does_not_name_the_field_is_found(embedded: Any) -> None:
    """The rule says "it": readers found by name keep the old decision, suggested readers decide as full prefill."""
    policy = (
        "You serve as the lending desk of a city library.\n\n# Session\nbranch: {branch}\n\n# Policy\n"
        "- Report broken chairs to the caretaker.\n- Invoices are numbered without gaps.\n- Look at branch first.\n"
        "- When it is central, choose renew_card.\n- When it is harbour, choose donate.\n"
        "- Backups run after midnight.\n- Signatures may be electronic.\n\nReply with the action only."
    )
    notebook = Notebook(embedded).message("system", policy, branch="harbour")
    notebook.message("user", "How should a purchase wish be dealt with?").prefill()
    options = ["renew_card", "donate"]

    def edited(mode: str) -> str:
        mark = notebook.mark()
        choice = notebook.decide(None, options, edits={"branch": "central"}, mode=mode).choice
        notebook.rollback(mark)
        return choice

    assert (notebook.decide(None, options).choice, edited("suffix")) == ("donate", "renew_card")
    assert edited("readers") == "donate", "the deciding lines stay stale"
    suggestions = notebook.suggest_readers("branch", "central", options=options)
    assert {line.words for line in suggestions.missing} == {
        "- When it is central, choose renew_card.", "- When it is harbour, choose donate.",
    }  # fmt: skip
    assert suggestions.trial is not None
    assert (suggestions.trial.readers, suggestions.trial.suggested) == ("donate", "renew_card")
    assert all((line.closes or 0) > 0.1 for line in suggestions.missing)
    notebook.mentions("branch", *suggestions.words)
    assert edited("readers") == "renew_card"


def test_the_current_value_moves_nothing_and_the_suggestions_say_why() -> None:
    notebook = Notebook(tiny()).text("status: {status}\nif the status is one then deny.\n", status="shipped")
    notebook.prefill()
    assert "already has this value" in str(notebook.suggest_readers("status", "shipped"))
    assert "already has this value" not in str(notebook.suggest_readers("status", "pending"))
