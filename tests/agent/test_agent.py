"""An agent's turns on one cache: what they compute, what stays, and that the cache equals a prefill of the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import tiny
from programmable_kv import Agent, Notebook, SeamRepair, Skill
from programmable_kv.bench.agent import policies, summarise
from programmable_kv.errors import InvalidEditError, InvalidOptionsError, UnknownFieldError
from programmable_kv.records import Record, digest_of, read_record
from programmable_kv.states import TokenState
from reference import assert_rows_equal, full_forward, largest_difference

RESULTS = Path(__file__).parents[2] / "results"
POLICY = "you are an agent. status: {status}. reply only with the action."
REFUNDS = "refund policy: if the tier is {tier} refund, if silver deny.\n"
OPTIONS = ["refund", "deny"]


def started(**changes: Any) -> Agent:
    return Agent(tiny(**changes), POLICY, status="pending")


def test_turns_without_a_change_are_a_prefill_of_the_whole_conversation() -> None:
    agent = started()
    first = agent.act("the customer asks to cancel the order", OPTIONS)
    second = agent.act("and the refund", OPTIONS, think=True)
    whole = Notebook(agent.notebook.model).message("system", POLICY, status="pending")
    whole.message("user", first.request).message("assistant", first.decision.choice)
    whole.message("user", f"{second.request} First restate the field, then decide.")
    whole.message("assistant", f"{second.decision.thought} {second.decision.choice}")
    whole.prefill()
    assert agent.notebook.rendered_text == whole.rendered_text
    expected, _ = full_forward(agent.notebook.model.engine.model, agent.notebook.ids)
    assert_rows_equal(agent.notebook.cache, expected, range(len(agent.notebook)), atol=1e-9)
    assert set(agent.notebook.states) == {TokenState.EXACT}
    assert [turn.request for turn in agent.turns] == [first.request, second.request]


def test_a_turn_computes_what_is_new_and_nothing_else() -> None:
    agent = started()
    agent.act("the customer asks to cancel the order", OPTIONS)
    before = len(agent.notebook)
    turn = agent.act("the customer asks to cancel the order", OPTIONS, status="pending")
    assert turn.changes == {}, "a value that is no change is none"
    new = len(agent.notebook) - before
    assert turn.decision.account.tokens_computed <= new
    before = len(agent.notebook)
    turn = agent.act("the refund", OPTIONS, status="shipped")
    assert turn.changes == {"status": "shipped"}
    written = sum(len(span) for span in agent.notebook.spans("status"))
    assert turn.decision.account.tokens_computed <= len(agent.notebook) - before + written
    assert agent.state == {"status": "shipped"}
    assert TokenState.STALE in agent.notebook.states
    assert agent.account.tokens_computed == agent.composed.tokens_computed + sum(
        t.account.tokens_computed for t in agent.turns
    )


def test_the_next_turn_reads_the_last_one() -> None:
    """The answer is in the cache, not only in the text: without it the next turn's keys would differ."""
    agent = started()
    agent.act("the refund", OPTIONS)
    start = len(agent.notebook)
    agent.act("the customer asks", OPTIONS)
    ids = agent.notebook.ids
    expected, _ = full_forward(agent.notebook.model.engine.model, ids)
    assert_rows_equal(agent.notebook.cache, expected, range(start, len(ids)), atol=1e-9)
    answer = agent.notebook.model.tokenizer.encode("refund", add_special_tokens=False)
    other = [ids[0] if token in answer else token for token in ids]
    changed, _ = full_forward(agent.notebook.model.engine.model, other)
    assert largest_difference(agent.notebook.cache, changed, range(start, len(ids))) > 1e-3


def test_skills_are_composed_added_and_removed() -> None:
    model = tiny()
    policy = Skill.compile(model, REFUNDS, name="refunds", tier="gold")
    dates = Skill.compile(model, "date policy: orders delivered before 2026 are returned.\n", name="dates")
    agent = Agent(model, policy, skills=[dates], repair=SeamRepair(seam=2))
    assert agent.composed.tokens_relocated == len(policy) + len(dates)
    assert agent.composed.tokens_computed < len(agent.notebook) - len(policy) - len(dates) + 5
    assert agent.state == {"tier": "gold"}
    agent.act("the refund", OPTIONS, tier="silver")
    tool = Skill.compile(model, "the order was returned", name="order", role="tool")
    assert agent.add_skill(tool).tokens_computed <= 4
    assert agent.observe("tool", "the order was cancelled").tokens_computed > 4
    account = agent.remove_skill("order")
    assert account.tokens_computed == 0
    assert "the order was returned" not in agent.notebook.rendered_text
    agent.act("the refund", OPTIONS, tier="gold")
    assert agent.state == {"tier": "gold"}


def test_an_error_leaves_the_agent_unchanged() -> None:
    agent = started()
    agent.act("the refund", OPTIONS)
    before = (agent.notebook.ids, agent.notebook.states, agent.state, len(agent.turns))
    with pytest.raises(UnknownFieldError, match="tier"):
        agent.act("the refund", OPTIONS, tier="gold")
    with pytest.raises(InvalidOptionsError):
        agent.act("the refund", ["refund"], status="shipped")
    assert (agent.notebook.ids, agent.notebook.states, agent.state, len(agent.turns)) == before
    expected, _ = full_forward(agent.notebook.model.engine.model, agent.notebook.ids)
    assert_rows_equal(agent.notebook.cache, expected, range(len(agent.notebook)), atol=1e-9)


def test_an_answer_that_is_rendered_otherwise_than_it_is_asked_for_stays_as_computed() -> None:
    """Templates of reasoning models open a thought when they ask for an answer, and omit it in a given answer."""
    import copy

    from programmable_kv import wrap_model

    model = tiny()
    other = copy.deepcopy(model.tokenizer)
    other.chat_template = other.chat_template.replace(
        "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\nhm: ' }}"
    )
    agent = Agent(wrap_model(model.engine.model, other, name="thinking"), POLICY, status="pending")
    before = agent.notebook.rendered_text
    turn = agent.act("the refund", OPTIONS)
    assert "stays as computed" in turn.decision.account.why
    assert agent.notebook.rendered_text == (
        f"{before}<|im_start|>user\nthe refund<|im_end|>\n<|im_start|>assistant\nhm: {turn.decision.choice}<|im_end|>\n"
    )
    agent.act("the refund", OPTIONS, status="shipped")
    agent.notebook.recompute()
    expected, _ = full_forward(agent.notebook.model.engine.model, agent.notebook.ids)
    assert_rows_equal(agent.notebook.cache, expected, range(len(agent.notebook)), atol=1e-9)


def test_raw_text_keeps_its_turns_too() -> None:
    notebook = Notebook(tiny()).text("status: pending. what now?")
    notebook.prefill()
    decision = notebook.decide(" the action is", OPTIONS, keep=True)
    assert notebook.rendered_text == f"status: pending. what now? the action is {decision.choice}"
    expected, _ = full_forward(notebook.model.engine.model, notebook.ids)
    assert_rows_equal(notebook.cache, expected, range(len(notebook)), atol=1e-9)


def test_the_embedded_agent_follows_its_state(embedded: Any) -> None:
    policy = (
        "You are the support agent of an online shop.\n\n# Session\norder_status: {order_status}\n\n# Policy\n"
        "- If order_status is pending, cancel.\n- If order_status is shipped, deny.\n\nReply with the action only."
    )
    skill = Skill.compile(embedded, policy, name="policy", order_status="pending")
    agent = Agent(embedded, skill)
    request = "Somebody asks for a cancellation. What do you do?"
    said = [agent.act(request, ["cancel", "deny"], order_status=s).decision.choice for s in ("pending", "shipped")]
    again = agent.act(request, ["cancel", "deny"], order_status="pending").decision.choice
    assert [*said, again] == ["cancel", "deny", "cancel"]


def test_everything_is_in_the_account() -> None:
    agent = started()
    turn = agent.act("the customer asks", OPTIONS)
    heard = agent.observe("tool", "delivered")
    learned = agent.add_skill(Skill.compile(agent.notebook.model, "date policy.\n", name="dates"))
    forgot = agent.remove_skill("dates")
    assert turn.account.tokens_reused > 0
    parts = (agent.composed, turn.account, heard, learned, forgot)
    assert agent.account.tokens_computed == sum(part.tokens_computed for part in parts)
    assert agent.account.bytes_moved == sum(part.bytes_moved for part in parts)


def test_a_mode_that_is_none_costs_no_prefill() -> None:
    model = tiny()
    before = model.engine.meter.tokens_computed
    with pytest.raises(InvalidEditError, match="unknown edit mode 'magic'"):
        Agent(model, POLICY, mode="magic", status="pending")
    assert model.engine.meter.tokens_computed == before
    assert Agent(model, "mode: {mode}.", {"mode": "slow"}).state == {"mode": "slow"}


def test_the_record_s_figures_follow_from_its_rows() -> None:
    """The test draws the policies again to find the decisions under one set of rules."""
    record = read_record(RESULTS / "agent.json")
    drawn = policies(record.settings["instances"])
    assert record.data_digest == digest_of(scenario.text() for scenario in drawn)
    found: Any = summarise(record.rows, drawn)
    single = [row for row in record.rows if row["kind"] == "decisions" and len(drawn[row["policy"]].gates) == 1]
    right = [turn for row in single for turn in row["turns"] if turn["right"]]
    agreed = [turn for turn in right if turn["modes"]["field_erratum"]["agrees"]]
    assert found["one_rule_set"]["field_erratum"]["agreement"]["value"] == pytest.approx(len(agreed) / len(right))
    last = [
        turn
        for row in record.rows
        if row["kind"] == "decisions"
        for turn in row["turns"][-(record.settings["turns"] // 3) :]
        if turn["right"]
    ]
    agreed_at_last = [turn for turn in last if turn["modes"]["field_erratum"]["agrees"]]
    at_last = found["thirds"]["last"]["field_erratum"]["agreement"]
    assert at_last["value"] == pytest.approx(len(agreed_at_last) / len(last))
    assert at_last["value"] < found["thirds"]["first"]["field_erratum"]["agreement"]["value"]
    assert 0 < len(single) < record.settings["instances"] * record.settings["domains"]
    assert Record.model_validate(record.model_dump() | {"summary": found}).summary == record.summary


def test_a_conversation_of_two_turns_has_no_thirds() -> None:
    turn = {"right": True, "changed": True, "modes": {"erratum": {"right": True, "agrees": True}}}
    row = {"kind": "decisions", "policy": 0, "turns": [turn, turn]}
    found: Any = summarise([row], policies(1))
    assert "thirds" not in found
    assert found["erratum"]["agreement"]["value"] == 1
