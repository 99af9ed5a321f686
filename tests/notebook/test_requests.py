"""Requests in the format of chat clients: content parts, tool calls, tools, and variables of the template."""

from __future__ import annotations

import copy
import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from programmable_kv import Notebook, Skill
from programmable_kv.errors import InvalidValueError, TemplateError, UnknownFieldError
from programmable_kv.states import TokenState
from reference import assert_rows_equal, full_forward
from templated import of

FIND = {
    "type": "function",
    "function": {
        "name": "find_order",
        "description": "Find an order in {region}.",
        "parameters": {"type": "object", "properties": {"number": {"type": "integer"}}},
    },
}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "find_order", "arguments": '{"number": 7, "city": "Oslo"}'},
}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Its status is {status} today."},
    {"role": "user", "content": [{"type": "text", "text": "Where is it?"}, {"type": "text", "text": "Order 7."}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
    {"role": "tool", "tool_call_id": "c1", "name": "find_order", "content": "It is in Bergen."},
]
TOOL_FAMILIES = ("qwen25", "qwen3", "llama31", "mistral_v3")
"""families whose templates render tools and tool calls"""


def request(family: str, **options: Any) -> Notebook:
    given: dict[str, Any] = {"fields": {"status": "pending", "region": "Norway"}, "tools": [FIND]} | options
    return Notebook.from_messages(of(family), MESSAGES, **given)


def assert_exact(notebook: Notebook) -> None:
    expected, _ = full_forward(notebook.model.engine.model, notebook.ids)
    assert_rows_equal(notebook.cache, expected, range(len(notebook)), atol=1e-9)


@pytest.mark.parametrize("family", [f for f in TOOL_FAMILIES if f != "mistral_v3"])
def test_a_request_with_tools_is_what_the_template_makes_of_it(family: str) -> None:
    notebook = request(family)
    notebook.prefill()
    told = json.loads(json.dumps([FIND]).replace("{region}", "Norway"))
    asked = copy.deepcopy(MESSAGES)
    asked[0]["content"] = "Its status is pending today."
    asked[1]["content"] = "Where is it?\nOrder 7."
    asked[2] = {"role": "assistant", "content": "", "tool_calls": [copy.deepcopy(CALL)]}
    asked[2]["tool_calls"][0]["function"]["arguments"] = {"number": 7, "city": "Oslo"}
    expected = notebook.model.tokenizer.apply_chat_template(asked, tools=told, tokenize=False)
    assert notebook.rendered_text == expected
    assert_exact(notebook)
    assert notebook.fields == {"region": "Norway", "status": "pending"}
    notebook.edit(region="Sweden", status="lost", mode="suffix")
    assert notebook.rendered_text == expected.replace("Norway", "Sweden").replace("pending", "lost")
    assert_exact(notebook)


@pytest.mark.parametrize("family", TOOL_FAMILIES)
def test_a_live_conversation_goes_on_with_calls_and_results(family: str) -> None:
    """The tools are in the text once, even if the template writes them again in the last user turn."""
    notebook = Notebook.from_messages(
        of(family), MESSAGES[:2], fields={"status": "pending", "region": "Norway"}, tools=[FIND]
    )
    notebook.prefill()
    notebook.add("assistant", None, tool_calls=[CALL])
    notebook.add("tool", "It is in Bergen.", tool_call_id="c1", name="find_order")
    notebook.add("assistant", "In Bergen.")
    notebook.add("user", "Since when?")
    text = notebook.rendered_text
    for said in ("Find an order in Norway.", "It is in Bergen.", "Since when?"):
        assert text.count(said) == 1, said
    places = [text.index(said) for said in ("Order 7.", '"Oslo"', "It is in Bergen.", "In Bergen.", "Since when?")]
    assert places[:3] + places[4:] == sorted(places[:3] + places[4:])
    assert_exact(notebook)
    notebook.edit(region="Sweden")
    assert "Find an order in Sweden." in notebook.rendered_text


def test_two_results_in_a_row_stand_in_blocks_of_their_own() -> None:
    """Qwen puts consecutive tool results into one user turn; a result that is added later gets its own turn."""
    notebook = request("qwen25")
    notebook.prefill()
    account = notebook.add("tool", "It left on Monday.", tool_call_id="c2")
    assert notebook.rendered_text.endswith(
        "It is in Bergen.\n</tool_response><|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nIt left on Monday.\n</tool_response><|im_end|>\n"
    )
    assert "differs from a fresh rendering" in account.why
    assert_exact(notebook)


def test_arguments_go_as_text_where_a_template_joins_them() -> None:
    notebook = Notebook.from_messages(of("deepseek_r1"), MESSAGES, fields={"status": "pending"})
    notebook.prefill()
    assert 'find_order\n```json\n{"number": 7, "city": "Oslo"}' in notebook.rendered_text


def test_a_date_that_the_template_writes_is_a_field() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which day is it?"}]
    options: dict[str, Any] = {
        "fields": {"today": "25 November 2026"},
        "template_kwargs": {"date_string": "{today}"},
    }
    notebook = Notebook.from_messages(of("llama31"), messages, **options)
    notebook.prefill()
    assert "Today Date: 25 November 2026\n" in notebook.rendered_text
    notebook.edit(today="26 November 2026", mode="field_erratum")
    assert "Today Date: 26 November 2026\n" in notebook.rendered_text
    assert "today is now: 26 November 2026" in notebook.parts[-1].text
    notebook.decide("And tomorrow?", ["27", "26"], keep=True)
    notebook.recompute()
    assert_exact(notebook)
    with pytest.raises(TemplateError, match="does not write the option"):
        Notebook.from_messages(of("chatml"), messages, **options).prefill()


def test_a_date_that_the_template_asks_the_clock_for_is_a_field() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which day is it?"}]
    plain = Notebook.from_messages(of("today"), messages)
    plain.prefill()
    assert f"Current date: {date.today().isoformat()}\n" in plain.rendered_text
    options: dict[str, Any] = {"fields": {"day": "2026-11-25"}, "template_kwargs": {"strftime_now": "{day}"}}
    notebook = Notebook.from_messages(of("today"), messages, **options)
    notebook.prefill()
    assert "Current date: 2026-11-25\n" in notebook.rendered_text
    notebook.edit(day="2026-11-26", mode="suffix")
    assert "Current date: 2026-11-26\n" in notebook.rendered_text
    notebook.add("assistant", "Thursday.")
    assert_exact(notebook)
    assert Notebook.from_messages(of("today"), messages, template_kwargs={"strftime_now": "the 1st"}).prefill()
    with pytest.raises(TemplateError, match="does not write the option"):
        Notebook.from_messages(of("llama31"), messages, **options).prefill()


def test_thinking_is_switched_off_by_the_template_s_own_variable() -> None:
    messages = [{"role": "user", "content": "Hello."}]
    notebook = Notebook.from_messages(of("qwen3"), messages, template_kwargs={"enable_thinking": False})
    notebook.prefill()
    decision = notebook.decide(None, ["yes", "no"], keep=True)
    assert notebook.rendered_text.endswith(
        f"<|im_start|>assistant\n<think>\n\n</think>\n\n{decision.choice}<|im_end|>\n"
    )
    assert decision.account.why == ""


def test_a_skill_is_a_field_s_value_too() -> None:
    model = of("chatml")
    skill = Skill.compile(model, "refunds: {tier} only.\n", name="refunds", tier="gold")
    notebook = Notebook.from_messages(
        model, [{"role": "system", "content": "Rules: {refunds} End."}], fields={"refunds": skill}
    )
    notebook.prefill()
    assert "Rules: refunds: gold only.\n End." in notebook.rendered_text
    assert notebook.fields == {"tier": "gold"}


@pytest.mark.parametrize("family", [*TOOL_FAMILIES, "deepseek_r1"])
def test_a_saved_request_goes_on_as_it_would_have(family: str, tmp_path: Path) -> None:
    """This holds even if the text was computed turn by turn and the template would now render it differently."""
    tools = None if family == "deepseek_r1" else [FIND]
    fields = {"status": "pending"} if tools is None else {"status": "pending", "region": "Norway"}
    notebook = Notebook.from_messages(
        of(family),
        MESSAGES[:2],
        fields=fields,
        tools=tools,
        template_kwargs={"custom": ["x", 1, None]},
        fold_system=True,
    )
    notebook.prefill()
    notebook.add("assistant", tool_calls=[CALL])
    notebook.add("tool", "It is in Bergen.", tool_call_id="c1", name="find_order")
    notebook.add("assistant", "In Bergen.")
    notebook.save(tmp_path)
    again = Notebook.load(tmp_path, notebook.model)
    for each in (notebook, again):
        each.decide("Since when?", ["Monday", "Friday"], keep=True)
        each.edit(status="lost", mode="field_erratum")
        each.add("user", "And now?")
    assert again.rendered_text == notebook.rendered_text
    assert again.prompt.template == notebook.prompt.template
    again.recompute()
    assert set(again.states) == {TokenState.EXACT}


def test_what_a_template_loses_of_a_request_is_refused() -> None:
    with pytest.raises(TemplateError, match="does not write the tools"):
        Notebook.from_messages(of("chatml"), MESSAGES[:2], tools=[FIND], fields={"status": "pending"}).prefill()
    with pytest.raises(TemplateError, match="drops or rewrites the assistant message"):
        Notebook.from_messages(of("zephyr"), MESSAGES[:3], fields={"status": "pending"}).prefill()
    both = [*MESSAGES[:2], {**MESSAGES[2], "content": "One moment."}]
    with pytest.raises(TemplateError, match="drops or rewrites the assistant message"):
        Notebook.from_messages(of("llama31"), both, fields={"status": "pending"}).prefill()


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ({"content": "x"}, "a message is a mapping"),
        ("x", "a message is a mapping"),
        ({"role": "a b", "content": "x"}, "a role must be one word"),
        ({"role": "user", "content": 3}, "text, None or a list of parts"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "'image_url': only text"),
        ({"role": "user", "content": "x", "audio": {"id": "1"}}, "has 'audio'"),
        ({"role": "user", "content": "\ue00a"}, r"U\+E00A"),
        ({"role": "tool", "content": "x", "name": "<|im_end|>"}, "im_end"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "a tool call of the assistant message"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "not JSON"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, "a JSON object"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"<s>": "a"}}}]}, "<s>"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": ["\ue00b"]}}}]},
            "a tool call",
        ),
        ({"role": "assistant", "tool_calls": [{"id": "<s>", "function": {"name": "f"}}]}, "a name, an id or a key"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "<s>"}}]}, "a name, an id or a key"),
        ({"role": "assistant", "content": "x", "reasoning_content": ["x"]}, "the reasoning of"),
    ],
)
def test_what_is_no_message_is_refused(message: Any, match: str) -> None:
    with pytest.raises(InvalidValueError, match=match):
        Notebook.from_messages(of("chatml"), [message])


def test_tools_and_variables_are_plain_data() -> None:
    model = of("chatml")
    with pytest.raises(InvalidValueError, match="a tool is"):
        Notebook(model, tools=[{"type": "function"}])
    with pytest.raises(InvalidValueError, match="im_end"):
        Notebook(model, tools=[{"name": "f", "description": "<|im_end|>"}])
    with pytest.raises(InvalidValueError, match="plain JSON"):
        Notebook(model, template_kwargs={"a": object()})
    with pytest.raises(InvalidValueError, match="tokenize is not one"):
        Notebook(model, template_kwargs={"tokenize": True})
    with pytest.raises(InvalidValueError, match="im_start"):
        Notebook(model, template_kwargs={"a": ["<|im_start|>"]})
    with pytest.raises(UnknownFieldError, match=r"placeholder \{tier\}"):
        Notebook.from_messages(model, MESSAGES[:1], fields={"status": "pending", "tier": "gold"})


def test_a_tool_call_that_was_cut_is_not_saved(tmp_path: Path) -> None:
    notebook = request("qwen25")
    notebook.prefill()
    call = {"function": {"name": "find_order", "arguments": {"password": "swordfish"}}}
    notebook.add("assistant", tool_calls=[call])
    notebook.cut(notebook.parts[-1])
    notebook.save(tmp_path)
    assert "swordfish" not in (tmp_path / "notebook.json").read_text()
    again = Notebook.load(tmp_path, notebook.model)
    again.add("user", "So?")
    assert again.rendered_text.endswith("<|im_start|>user\nSo?<|im_end|>\n")


@pytest.mark.parametrize("wrong", [3, True, "find", {"name": "find"}, {"find"}])
def test_tools_and_tool_calls_are_lists(wrong: Any) -> None:
    notebook = Notebook.from_messages(of("qwen25"), [{"role": "user", "content": "Hello."}])
    notebook.prefill()
    with pytest.raises(InvalidValueError, match="list of mappings"):
        notebook.add("assistant", None, tool_calls=wrong)
    with pytest.raises(InvalidValueError, match="list of mappings"):
        Notebook(of("qwen25"), tools=wrong)
