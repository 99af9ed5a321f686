"""Chat templates of twenty families: the text of a turn, an erratum or a policy is never lost."""

from __future__ import annotations

from functools import cache

import pytest

from programmable_kv import Agent, Notebook, Skill
from programmable_kv.errors import TemplateError
from programmable_kv.notebook.survey import TemplateRow, survey
from reference import assert_rows_equal, full_forward
from templated import TEMPLATES, of, with_template

FAMILIES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
SHOUTING = "shouting"
"""a template that writes everything in upper case"""
OPTIONS = ["cancel", "deny"]


@cache
def row(family: str) -> TemplateRow:
    return survey(of(family).tokenizer)


def written(family: str, text: str) -> str:
    return text.upper() if family == SHOUTING else text


def build(family: str, *, user: bool = True) -> Notebook:
    """A notebook with a policy that has a field, and a user turn."""
    notebook = Notebook(of(family), fold_system=True)
    policy = "{status}".join(written(family, part) for part in ("Its status is ", " today. Be brief."))
    notebook.message("system", policy, status=written(family, "pending"))
    if user:
        notebook.message("user", written(family, "Where is it?"))
    notebook.prefill()
    return notebook


def assert_exact(notebook: Notebook) -> None:
    expected, _ = full_forward(notebook.model.engine.model, notebook.ids)
    assert_rows_equal(notebook.cache, expected, range(len(notebook)), atol=1e-9)


def assert_said(text: str, *said: str) -> None:
    """Assert that the text has each thing once, and in this order."""
    cursor = 0
    for thing in said:
        assert text.count(thing) == 1, f"{thing!r} stands {text.count(thing)} times in {text!r}"
        found = text.find(thing, cursor)
        assert found >= cursor, f"{thing!r} is not in its place in {text!r}"
        cursor = found + len(thing)


def test_there_are_twenty_families() -> None:
    assert len(FAMILIES) >= 20


@pytest.mark.parametrize("family", FAMILIES)
def test_fields_stand_in_a_prefilled_prompt(family: str) -> None:
    notebook = build(family)
    assert_said(notebook.rendered_text, *(written(family, s) for s in ("pending", "Be brief.", "Where is it?")))
    (span,) = notebook.spans("status")
    assert written(family, "pending") in notebook.model.tokenizer.decode(notebook.ids[span.start : span.stop])
    assert_exact(notebook)
    notebook.edit(status=written(family, "shipped"), mode="suffix")
    assert_said(notebook.rendered_text, *(written(family, s) for s in ("shipped", "Be brief.", "Where is it?")))
    assert_exact(notebook)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_edit_after_a_user_turn_states_the_value_once_behind_it(family: str) -> None:
    notebook = build(family)
    before = len(notebook)
    plan = notebook.plan.edit(status=written(family, "shipped"), mode="field_erratum")
    account = notebook.edit(status=written(family, "shipped"), mode="field_erratum")
    line = written(family, "[STATE UPDATE] status is now: shipped.")
    assert_said(notebook.rendered_text, written(family, "Where is it?"), line)
    assert line in notebook.parts[-1].text
    assert len(notebook) > before
    assert account.why == plan.why
    if row(family).erratum == "system message":
        assert "erratum is" not in account.why
    else:
        assert "user message" in account.why, "another role is declared in the plan"
    expected, _ = full_forward(notebook.model.engine.model, notebook.ids)
    assert_rows_equal(notebook.cache, expected, range(notebook.spans("status")[0].stop), atol=1e-9)
    notebook.edit(status=written(family, "lost"), mode="field_erratum")
    assert notebook.rendered_text.count(line) == 0, "the earlier line is taken back"
    assert notebook.decide(None, OPTIONS).choice in OPTIONS


@pytest.mark.parametrize("role", ["user", "assistant", "tool", "system"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_turn_is_said_once_in_its_place_or_refused(family: str, role: str) -> None:
    notebook = build(family)
    if role != "assistant" and role != "system":
        notebook.add("assistant", written(family, "In Oslo."))
    before = (notebook.ids, notebook.rendered_text)
    said = written(family, "It was found there.")
    expected = {"tool": row(family).tool, "system": row(family).mid_conversation}.get(role, "yes")
    if expected == "refused":
        with pytest.raises(TemplateError, match="chat template"):
            notebook.add(role, said)
        assert (notebook.ids, notebook.rendered_text) == before
        return
    notebook.add(role, said)
    assert_said(notebook.rendered_text, written(family, "Where is it?"), said)
    assert notebook.rendered_text.startswith(before[1])
    assert_exact(notebook)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_goes_on_with_answers_that_are_kept(family: str) -> None:
    """Cached text stays, and the account says so if a fresh rendering would be different."""
    notebook = build(family)
    options = [written(family, option) for option in OPTIONS]
    first = notebook.decide(None, options, keep=True)
    reasons = [first.account.why]
    said = [written(family, "Where is it?"), f"{first.choice}"]
    for question in ("Since when is that?", "Who did it then?"):
        before = notebook.rendered_text
        reasons.append(notebook.add("user", written(family, question)).why)
        decision = notebook.decide(None, options, keep=True)
        reasons.append(decision.account.why)
        assert notebook.rendered_text.startswith(before), "a turn stays as it was computed"
        added = notebook.rendered_text[len(before) :]
        assert_said(added, written(family, question), decision.choice)
    assert said[0] in notebook.rendered_text
    assert_exact(notebook)
    streamed = "".join(notebook.generate(written(family, "Tell me more."), max_new_tokens=6, keep=True))
    assert streamed.strip() in notebook.rendered_text
    assert_exact(notebook)
    expected = "turns stay" if any(reasons) else "as rendered afresh"
    assert row(family).multi_turn.startswith(expected)
    if not any(reasons):
        conversation = notebook._state.conversation
        assert conversation is not None
        fresh = conversation.template.filled(conversation.messages[:-2], conversation.values)
        shared = fresh[: len(notebook.rendered_text)]
        while not notebook.rendered_text.startswith(shared):
            shared = shared[:-1]
        assert len(fresh) - len(shared) <= len("<|im_end|>"), "no more is missing than what ends a text"


@pytest.mark.parametrize("family", FAMILIES)
def test_an_agent_works(family: str) -> None:
    policy = "{status}".join(written(family, part) for part in ("Its status is ", " today."))
    agent = Agent(of(family), policy, {"status": written(family, "pending")}, mode="field_erratum")
    options = [written(family, option) for option in OPTIONS]
    requests = [written(family, request) for request in ("Where is it?", "Can it go back?", "Is that all?")]
    values = [written(family, value) for value in ("shipped", "shipped", "lost")]
    for request, value in zip(requests, values, strict=True):
        turn = agent.act(request, options, status=value)
        assert turn.decision.choice in options
    text = agent.notebook.rendered_text
    assert_said(text, written(family, "today."), *requests[:2], written(family, "status is now: lost."), requests[2])
    assert agent.state == {"status": values[-1]}
    places = row(family).system
    assert ("first user turn" in agent.composed.why) == places.startswith("first user turn")
    agent.notebook.recompute()
    assert_exact(agent.notebook)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("mistral_v3",)])
def test_what_is_continued_is_what_a_fresh_prompt_holds(family: str) -> None:
    """Turn by turn or at once, the text is the same. (Mistral v3 moves the system message into the last user turn.)"""
    live = build(family)
    live.add("assistant", written(family, "In Oslo."))
    live.add("user", written(family, "Since when?"))
    whole = Notebook(of(family), fold_system=True)
    policy = "{status}".join(written(family, part) for part in ("Its status is ", " today. Be brief."))
    whole.message("system", policy, status=written(family, "pending")).message("user", written(family, "Where is it?"))
    whole.message("assistant", written(family, "In Oslo.")).message("user", written(family, "Since when?")).prefill()
    if family == "qwen3":  # a fresh rendering omits thoughts in earlier answers
        assert live.rendered_text.replace("<think>\n\n</think>\n\n", "") == whole.rendered_text
    else:
        assert live.rendered_text == whole.rendered_text


def test_a_template_without_a_place_for_a_policy_says_so() -> None:
    for family in ("gemma", "mistral_v1"):
        notebook = Notebook(of(family)).message("system", "Be {how}.", how="brief").message("user", "Hello.")
        with pytest.raises(TemplateError, match=r"no place for a system message.*fold_system=True"):
            notebook.prefill()
    with pytest.raises(TemplateError, match="no place for a system message"):
        Agent(of("gemma"), "Be {how}.", how="brief", fold_system=False)


def test_folding_leaves_templates_alone_that_have_a_system_message() -> None:
    texts = []
    for fold in (False, True):
        notebook = Notebook(of("chatml"), fold_system=fold).message("system", "Be brief.").message("user", "Hello.")
        assert notebook.prefill().why == ""
        texts.append(notebook.rendered_text)
    assert texts[0] == texts[1]


def test_a_policy_that_waits_for_the_first_user_turn() -> None:
    """Prefilled alone, it ends inside that turn. An erratum goes there, and nothing can be asked before a user turn."""
    notebook = build("llama2", user=False)
    assert notebook.rendered_text.endswith("today. Be brief.\n<</SYS>>\n\n")
    with pytest.raises(TemplateError, match="first user turn"):
        notebook.decide(None, OPTIONS)
    account = notebook.edit(status="shipped", mode="erratum")
    assert "is part of that turn" in account.why
    notebook.add("user", "Where is it?")
    assert notebook.rendered_text.endswith("[STATE UPDATE] status is now: shipped.\n\nWhere is it? [/INST]")
    assert notebook.rendered_text.count("[INST]") == 1


def test_what_ends_a_text_is_not_left_in_the_middle() -> None:
    for family in ("phi3", "ending"):
        notebook = build(family)
        end = notebook.model.tokenizer.eos_token
        assert end not in notebook.rendered_text
        notebook.add("assistant", "In Oslo.")
        assert end not in notebook.rendered_text


def test_a_thought_that_was_generated_stays_as_computed() -> None:
    """Qwen3 omits thoughts in earlier answers; the cache keeps the thought after which the answer was computed."""
    notebook = build("qwen3")
    conversation = notebook._state.conversation
    assert conversation is not None
    opening = conversation.continued([], prompt_for_answer=True).added
    answered = conversation.answered(opening, [], "<think>\nwell\n</think>\n\nIn Oslo.")
    later = answered.conversation.continued(build("qwen3").prompt.messages[1:])
    assert answered.added == "<think>\nwell\n</think>\n\nIn Oslo.<|im_end|>\n"
    assert later.added == "<|im_start|>user\nWhere is it?<|im_end|>\n"
    assert "stay as computed" in later.why


def test_a_decision_is_taken_behind_a_closed_thought() -> None:
    """DeepSeek-R1 opens a thought when it asks for an answer, so it is closed: options are answers."""
    notebook = build("deepseek_r1")
    asked = notebook.rendered_text + "<｜Assistant｜><think>\n\n</think>\n\n"
    decision = notebook.decide(None, OPTIONS, keep=True)
    assert "was closed" in decision.account.why
    assert notebook.rendered_text == f"{asked}{decision.choice}<｜end▁of▁sentence｜>"
    raw = Notebook(notebook.model).text(asked)
    raw.prefill()
    assert raw.decide(None, OPTIONS).log_probabilities == pytest.approx(decision.log_probabilities, abs=1e-9)
    "".join(notebook.generate("Why?", max_new_tokens=3, keep=True))
    assert notebook.rendered_text.count("</think>") == 1, "a generated answer goes on in the thought"


@pytest.mark.parametrize(
    ("body", "does"),
    [
        ("{% if loop.index < 3 %}{{ c }}{% endif %}", "drops or rewrites"),
        ("{{ c }}{% if loop.index > 2 %}{{ c }}{% endif %}", "repeats"),
        ("{{ c | replace('o', '0') }}", "drops or rewrites"),
    ],
)
def test_each_kind_of_loss_is_refused(body: str, does: str) -> None:
    template = (
        "{% for m in messages %}{% set c = '<' + m['role'] + '> ' + m['content'] + '\n' %}" + body + "{% endfor %}"
    )
    live = Notebook(with_template(template)).message("system", "Be kind.").message("user", "Hey.")
    live.prefill()
    before = live.ids
    with pytest.raises(TemplateError, match=does):
        live.add("assistant", "So long.")
    assert live.ids == before


def test_a_message_that_a_prompt_s_template_drops_is_refused() -> None:
    silent = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(TemplateError, match="no place for a system message"):
        Notebook(with_template(silent)).message("system", "Be kind.").message("user", "Hey.").prefill()
    folded = Notebook(with_template(silent), fold_system=True).message("system", "Be kind.").message("user", "Hey.")
    folded.prefill()
    assert folded.rendered_text == "Be kind.\n\nHey."


def test_a_text_with_the_characters_of_a_mark_is_cut_where_it_ends() -> None:
    notebook = Notebook(of("llama2")).message("system", "a \ue008 b \ue0090\ue00c {status}.", status="new")
    notebook.prefill()
    assert notebook.rendered_text == "<s>[INST] <<SYS>>\na \ue008 b \ue0090\ue00c new.\n<</SYS>>\n\n"
    notebook.add("user", "\ue0091\ue00c?")
    assert notebook.rendered_text.endswith("new.\n<</SYS>>\n\n\ue0091\ue00c? [/INST]")


def test_what_a_preface_says_before_its_last_message_is_said_too() -> None:
    silent = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(TemplateError, match="drops or rewrites the system message"):
        Skill.compile(with_template(silent), "rule", preface=[("system", "Be kind."), ("user", "Hey.")])
    with pytest.raises(TemplateError, match=r"drops or rewrites|no place"):
        Skill.compile(with_template(silent), "rule", role="user", preface=[("system", "Be kind."), ("user", "Hey.")])


def test_a_message_is_compiled_alone_without_what_ends_a_text() -> None:
    for family in ("phi3", "ending", "chatml", "llama2"):
        model = of(family)
        text = Skill.compile(model, "it was lost", name="note", role="user").text
        assert model.tokenizer.eos_token not in text or family == "chatml"
        assert "Be" not in text
        assert text.count("it was lost") == 1
        if family == "llama2":
            assert text == "<s>[INST] it was lost [/INST]"


def test_an_open_first_turn_is_the_user_s() -> None:
    """Mistral v3 renders a tool's result anywhere, but inside a user turn it would be part of that turn."""
    notebook = build("mistral_v3", user=False)
    for role in ("tool", "assistant", "system"):
        with pytest.raises(TemplateError, match="first user turn"):
            notebook.add(role, "It was found there.")


def test_the_account_says_when_a_prompt_is_rewritten() -> None:
    notebook = Notebook(of("qwen3")).message("user", "Hey.").message("assistant", "<think>hm</think>Yes.")
    notebook.message("user", "Sure?")
    assert "rewrites the text of some messages" in notebook.prefill().why
    assert "<think>" not in notebook.rendered_text
    shouting = Notebook(of(SHOUTING)).message("user", "Hey.")
    assert shouting.prefill().why == ""


@pytest.mark.parametrize("family", ["gemma", "llama2", "mistral_v3", "deepseek_r1"])
def test_an_agent_s_policy_may_be_a_skill_wherever_it_stands(family: str) -> None:
    policy = Skill.compile(of(family), "Its status is {status} today.", name="policy", status="pending")
    agent = Agent(of(family), policy, mode="field_erratum")
    assert agent.composed.tokens_relocated == len(policy)
    for status in ("shipped", "lost"):
        agent.act(f"Is it {status}?", OPTIONS, status=status)
    assert_said(agent.notebook.rendered_text, "today.", "Is it shipped?", "Is it lost?")
    assert agent.notebook.part("policy").text == "Its status is lost today."
