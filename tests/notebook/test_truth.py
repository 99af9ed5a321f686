"""A notebook never calls its cache better than it is: attacks that once succeeded, checked with full forwards."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_edits import build

from conftest import ALTERNATING, CHATML, frozen, tiny
from programmable_kv import Mode, Notebook, SeamRepair, Skill, SkillStore
from programmable_kv.cache.span import Span
from programmable_kv.errors import (
    FrequencyRegimeError,
    InvalidArgumentError,
    InvalidEditError,
    OutOfStepError,
    TemplateError,
    UnknownPartError,
    UnverifiedError,
)
from programmable_kv.models.fingerprint import fingerprint
from programmable_kv.prompt.chat import answer_end
from programmable_kv.prompt.units import Kind
from programmable_kv.states import TokenState
from reference import assert_rows_equal, full_forward


def longrope(bound: int) -> Any:
    """A model with one table of frequencies up to the length `bound`, and another one beyond."""
    parameters = {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": bound,
        "short_factor": (1.0, 1.0, 1.5, 2.0), "long_factor": (2.0, 4.0, 4.0, 8.0),
    }  # fmt: skip
    return tiny(rope_parameters=frozen(parameters))


def errors_by_state(notebook: Notebook) -> dict[TokenState, float]:
    """For each state, the largest difference of its tokens' values from those of a full prefill."""
    expected, _ = full_forward(notebook.model.engine.model, notebook.ids)
    worst: dict[TokenState, float] = defaultdict(float)
    for layer, (_, right) in enumerate(expected):
        off = (notebook.cache.values(layer) - right).abs().amax(dim=(0, 1, 3))
        for slot, state in enumerate(notebook.states):
            worst[state] = max(worst[state], float(off[slot]))
    return worst


def _only(condition: str) -> str:
    """A ChatML template that renders only messages that meet a condition."""
    body = "{% for m in messages %}"
    return CHATML.replace(body, body + "{% if " + condition + " %}").replace("{% endfor %}", "{% endif %}{% endfor %}")


def with_template(template: str) -> Any:
    model = tiny()
    tokenizer = copy.copy(model.tokenizer)
    tokenizer.chat_template = template
    return replace(model, tokenizer=tokenizer)


# -- states ------------------------------------------------------------------------------------------------------------


def test_the_first_two_states_are_exact_and_the_others_are_not() -> None:
    """Compared with the oracle, every state occurs, and only tokens in the exact states equal a full prefill."""
    notebook = build()
    notebook.splice(Skill.compile(notebook.model, "refund policy: if the tier is gold refund.\n", name="refunds"))
    notebook.add("user", "so? what is to be done?")
    relocated = errors_by_state(notebook)
    notebook.edit(status="shipped now", mode="selective", k=3)
    edited = errors_by_state(notebook)
    assert set(relocated) | set(edited) == set(TokenState)
    for worst in (relocated, edited):
        for state, error in worst.items():
            assert (error < 1e-9) is state.exact, f"{state}: {error}"


def test_one_recomputed_token_leaves_the_others_of_its_part_exact() -> None:
    notebook = build()
    notebook.edit(tier="silver", mode="in_place")
    place = notebook.spans("tier")[0]
    states = notebook.states
    assert set(states[: place.stop]) == {TokenState.EXACT}
    assert set(states[place.stop :]) == {TokenState.STALE}


def test_an_erratum_goes_stale_with_what_it_follows_and_with_its_value() -> None:
    notebook = build()
    notebook.edit(status="pending", mode="erratum")
    notebook.add("user", "and now?")
    erratum = next(part for part in notebook.parts if part.kind is Kind.ERRATUM)
    assert erratum.state is TokenState.AFTER_EDIT
    assert not erratum.superseded
    mark = notebook.mark()
    notebook.splice(Skill.compile(notebook.model, "dates.\n", name="dates"), at=0)
    assert next(part for part in notebook.parts if part.kind is Kind.ERRATUM).state is TokenState.STALE
    notebook.rollback(mark)
    notebook.edit(status="returned", mode="stale")
    erratum = next(part for part in notebook.parts if part.kind is Kind.ERRATUM)
    assert erratum.superseded, "it states a value that is no longer in force"
    assert erratum.state is TokenState.STALE


def test_a_part_that_no_longer_stands_there_is_refused() -> None:
    notebook = build()
    notebook.add("user", "the first turn")
    notebook.add("user", "the second turn")
    first, second = notebook.parts[-2:]
    notebook.cut(first)
    for part in (first, second):
        with pytest.raises(UnknownPartError, match="no longer there"):
            notebook.cut(part)
    notebook.cut(notebook.parts[-1])
    assert "turn" not in notebook.rendered_text


def test_rows_are_checked_also_where_the_value_is_written_already(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = build()
    notebook.edit(status="pending", mode="in_place")
    engine = notebook.model.engine
    monkeypatch.setattr(type(engine), "rows", property(lambda self: replace(real, exact=False, reason="no mask")))
    with pytest.raises(UnverifiedError, match="no mask"):
        notebook.edit(status="pending", mode="selective", k=2)


real = tiny().engine.rows


# -- errata and the length of a context --------------------------------------------------------------------------------


def test_two_hundred_edits_keep_the_context_short() -> None:
    """Five fields are edited in turn, with a question after each edit: the length stays, and rebase makes all exact."""
    notebook = Notebook(tiny())
    names = [f"part_{number}" for number in range(5)]
    text = " ".join(f"{name}: {{{name}}}." for name in names)
    notebook.message("system", text, **dict.fromkeys(names, "new")).message("user", "the customer asks").prefill()
    lengths = []
    for number in range(200):
        notebook.edit({names[number % 5]: f"{number % 7}"}, mode="field_erratum")
        if number % 20 == 0:
            notebook.decide("now?", ["cancel", "deny"])
        lengths.append(len(notebook))
    assert max(lengths[5:]) <= 1.2 * min(lengths[5:])
    assert sum(part.kind is Kind.ERRATUM for part in notebook.parts) <= 5
    assert not any(part.superseded for part in notebook.parts)
    account = notebook.rebase()
    assert account.exact
    assert not any(part.kind is Kind.ERRATUM for part in notebook.parts)
    expected, _ = full_forward(notebook.model.engine.model, notebook.ids)
    assert_rows_equal(notebook.cache, expected, range(len(notebook)), atol=1e-9)
    assert notebook.fields == {name: notebook.rendered_text.split(f"{name}: ")[1][0] for name in names}


def test_a_rebase_with_a_limit_folds_back_what_fits() -> None:
    notebook = Notebook(tiny()).text("status: {status}. " + "the policy says what to do. " * 20, status="new")
    notebook.text("tier: {tier}. so reply.", tier="gold").prefill()
    notebook.edit(status="pending", tier="silver", mode="erratum")
    whole = notebook.plan.rebase().tokens_computed
    account = notebook.rebase(limit=whole // 2)
    assert 0 < account.tokens_computed <= whole // 2
    assert "more than" in account.why
    assert "tier: silver" in notebook.rendered_text
    assert "status: new" in notebook.rendered_text
    assert "status is now: pending" in notebook.rendered_text
    assert notebook.rebase(limit=3).tokens_computed == 0
    assert notebook.rebase().exact


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_stream_is_open_because_it_was_begun() -> None:
    """Raw text without a prompt: the first piece comes from the last cached token, and the cache has not grown."""
    notebook = Notebook(tiny()).text("status: {status}. cancel or", status="pending")
    notebook.prefill()
    length = len(notebook)
    stream = notebook.generate(None, max_new_tokens=4)
    next(stream)
    for operation in (lambda: notebook.edit(status="shipped"), lambda: notebook.add("user", "so"), notebook.fork):
        with pytest.raises(OutOfStepError, match="still open"):
            operation()
    stream.close()
    assert notebook.cache.length == length == len(notebook)
    notebook.edit(status="shipped", mode="suffix")
    expected, _ = full_forward(notebook.model.engine.model, notebook.ids)
    assert_rows_equal(notebook.cache, expected, range(len(notebook)), atol=1e-9)


@pytest.mark.parametrize("raw", [True, False])
def test_a_kept_answer_is_not_computed_again(raw: bool) -> None:
    notebook = Notebook(tiny())
    if raw:
        notebook.text("the order status is pending. ")
    else:
        notebook.message("system", "the order status is pending").message("user", "hello")
    notebook.prefill()
    before = len(notebook)
    said = "".join(notebook.generate("and now?", max_new_tokens=9, keep=True))
    account = notebook.last_account
    assert said in notebook.rendered_text
    assert account.tokens_computed <= len(notebook) - before + 9, "the prompt and the answer are computed once"
    again = len(notebook) - before
    assert account.tokens_computed < 2 * again
    expected, _ = full_forward(notebook.model.engine.model, notebook.ids)
    assert_rows_equal(notebook.cache, expected, range(len(notebook)), atol=1e-9)
    assert all(state.exact for state in notebook.states)
    notebook.add("user", "thanks")


# -- text --------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    cut=st.integers(1, 30),
    values=st.lists(
        st.sampled_from(["gold", "x", "cancelled by the customer", "2026", "shi pped"]), min_size=1, max_size=3
    ),
    kind=st.sampled_from(["byte-level", "metaspace"]),
)
def test_values_are_replaced_in_a_part_that_was_split_anywhere(cut: int, values: list[str], kind: str) -> None:
    """Two places close together in a part that was split: no slot has the keys of another token."""
    notebook = Notebook(tiny(kind=kind)).text(
        "the customer policy says tier {tier}, then {tier} again. reply only with the action", tier="silver"
    )
    notebook.prefill()
    try:
        notebook.cut(Span(0, min(cut, notebook.spans("tier")[0].start)))
    except InvalidEditError:  # a slot inside a character
        return
    for value in values:
        notebook.edit(tier=value, mode="suffix")
        assert notebook.rendered_text.count(value) >= 2
        expected, _ = full_forward(notebook.model.engine.model, notebook.ids)
        exact = [slot for slot, state in enumerate(notebook.states) if state.exact]
        assert_rows_equal(notebook.cache, expected, exact, atol=1e-9)
        assert "".join(part.text for part in notebook.parts) == notebook.rendered_text
    notebook.recompute()
    expected, _ = full_forward(notebook.model.engine.model, notebook.ids)
    assert_rows_equal(notebook.cache, expected, range(len(notebook)), atol=1e-9)


def test_a_template_that_rewrites_values_is_refused() -> None:
    upper = CHATML.replace("m['content']", "m['content'] | upper")
    with pytest.raises(TemplateError, match="writes 'GOLD'"):
        Notebook(with_template(upper)).message("system", "the tier is {tier} here", tier="gold").prefill()


def test_what_a_template_drops_is_said_in_another_role_or_refused() -> None:
    """Some templates render nothing for a system message within a conversation, and do not raise."""
    drops = _only("loop.first or m['role'] != 'system'")
    notebook = Notebook(with_template(drops))
    notebook.message("system", "the tier is {tier}. reply only.", tier="gold").message("user", "hello").prefill()
    notebook.edit(tier="silver", mode="field_erratum")
    assert "<|im_start|>user\n[STATE UPDATE] tier is now: silver." in notebook.rendered_text
    with pytest.raises(TemplateError, match="drops or rewrites the system message"):
        notebook.add("system", "be polite")
    mute = Notebook(with_template(_only("loop.index < 3")))
    mute.message("system", "the tier is {tier}. reply only.", tier="gold").message("user", "hello").prefill()
    with pytest.raises(TemplateError, match="suffix"):
        mute.edit(tier="silver", mode="field_erratum")
    assert mute.fields == {"tier": "gold"}
    mute.edit(tier="silver", mode="suffix")
    assert "tier is silver" in mute.rendered_text


def test_the_end_of_an_answer_does_not_depend_on_the_conversation() -> None:
    """A template that requires alternating roles would refuse to render an answer's end after a user message."""
    odd = (
        "{% if loop.index0 % 2 != (m['role'] == 'assistant') | int %}{{ raise_exception('must alternate') }}{% endif %}"
    )
    strict = ALTERNATING.replace("{{'<turn>'", odd + "{{'<turn>'")
    model = with_template(strict)
    assert answer_end(model.tokenizer).startswith("</turn>")
    scores = []
    for asked in ("user", "assistant"):
        notebook = Notebook(model).message("user", "the order status?")
        if asked == "assistant":
            notebook.message("assistant", "pending").message("user", "the order status?")
        notebook.prefill()
        end = notebook.model.tokenizer.convert_tokens_to_ids("</turn>")
        decision = notebook.decide(options=["cancel", "cancel now"])
        opening = notebook.model.tokenizer.encode("<turn>assistant\ncancel", add_special_tokens=False)
        _, logits = full_forward(model.engine.model, [*notebook.ids, *opening, end])
        log_probabilities = torch.log_softmax(logits.double(), dim=-1)
        start = len(notebook.ids) + len(notebook.model.tokenizer.encode("<turn>assistant\n", add_special_tokens=False))
        ids = [*opening[start - len(notebook.ids) :], end]
        expected = sum(float(log_probabilities[start - 1 + i, token]) for i, token in enumerate(ids))
        scores.append(abs(decision.log_probabilities["cancel"] - expected))
    assert max(scores) < 1e-6


# -- frequencies that change with the length ---------------------------------------------------------------------------


def test_a_context_does_not_grow_across_a_change_of_frequencies() -> None:
    """LongRoPE has one table up to a length and another beyond: tokens appended there would not fit the cached ones."""
    notebook = build(longrope(96))
    ids, states = notebook.ids, notebook.states
    long = "the customer asks to cancel the order " * 12
    with pytest.raises(FrequencyRegimeError):
        notebook.add("user", long)
    assert (notebook.ids, notebook.states, notebook.cache.length) == (ids, states, len(ids))
    beyond = Notebook(notebook.model).message("system", "status: {status}.", status="pending").message("user", long)
    beyond.prefill()
    expected, _ = full_forward(notebook.model.engine.model, beyond.ids)
    assert len(beyond) > 96
    assert_rows_equal(beyond.cache, expected, range(len(beyond)), atol=1e-9)
    with pytest.raises(FrequencyRegimeError):
        beyond.edit(status="shipped", mode="in_place")
    beyond.edit(status="shipped", mode="suffix")
    expected, _ = full_forward(notebook.model.engine.model, beyond.ids)
    assert_rows_equal(beyond.cache, expected, range(len(beyond)), atol=1e-9)


# -- interruptions and arguments ---------------------------------------------------------------------------------------


def test_an_interrupted_prefill_can_be_begun_again() -> None:
    model = tiny(max_position_embeddings=8192)
    notebook = Notebook(model).message("system", "a b c " * 1500)
    reports: list[tuple[int, int]] = []

    def interrupt(done: int, total: int) -> None:
        reports.append((done, total))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        notebook.prefill(progress=interrupt)
    assert reports[0][0] < reports[0][1]
    reports.clear()
    notebook.prefill(progress=lambda done, total: reports.append((done, total)))
    assert reports[-1] == (len(notebook), len(notebook))
    assert len(reports) > 1


@pytest.mark.parametrize(
    "operation",
    [
        lambda n: n.cut(3.5),
        lambda n: n.move(Span(0, 2), to="end"),
        lambda n: n.splice("a text"),
        lambda n: n.splice(Skill.compile(n.model, "dates."), at=True),
        lambda n: n.edit(status="x", mode="selective", k="many"),
        lambda n: n.generate("so?", max_new_tokens=2.5),
        lambda n: n.generate("so?", temperature="hot"),
    ],
)
def test_arguments_of_another_type_are_refused(operation: Any) -> None:
    notebook = build()
    ids = notebook.ids
    with pytest.raises(InvalidArgumentError):
        operation(notebook)
    assert notebook.ids == ids


def test_a_plan_for_another_mode_says_so() -> None:
    notebook = build()
    account = notebook.edit(status="shipped", mode="field_erratum")
    assert (account.mode_asked, account.mode_used) == (Mode.FIELD_ERRATUM, Mode.IN_PLACE)
    assert "no erratum" in account.why
    assert account.exact
    assert SeamRepair().computes


def test_frequencies_are_saved_with_what_they_made(tmp_path: Any) -> None:
    """This includes an early one of several skills compiled in a forward that reaches beyond the bound."""
    model = longrope(32)
    texts = {"first": "the order status is pending. ", "second": "the customer asks to cancel the order. " * 4}
    store = SkillStore(tmp_path / "store")
    early = store.compile_together(model, texts)[0]
    assert store.get(model, "first").segment.tables == early.segment.tables == (1,)
    notebook = Notebook(model).text(texts["first"] + texts["second"])
    notebook.prefill()
    notebook.save(tmp_path / "saved")
    assert Notebook.load(tmp_path / "saved", model).cache.tables == notebook.cache.tables == (1,)
    with pytest.raises(FrequencyRegimeError, match="has 4 positions"):
        notebook.cut(Span(4, len(notebook)))
    assert set(notebook.states) == {TokenState.EXACT}


def test_a_fingerprint_does_not_follow_the_last_forward() -> None:
    model = longrope(32)
    before = fingerprint(model.engine.model, model.tokenizer)
    Notebook(model).text("the order status is pending. " * 12).prefill()
    assert fingerprint(model.engine.model, model.tokenizer) == before
