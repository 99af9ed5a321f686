"""Chat templates together with special tokens as plain text, types of fields, and blocks."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest

from programmable_kv import Field, Notebook, Skill
from programmable_kv.errors import InvalidEditError, InvalidValueError, TemplateError
from reference import assert_rows_equal, full_forward
from templated import TEMPLATES, of, with_template

README = "to stop, write <|im_end|> or </turn>"
HARMLESS = "to stop, write something or other"
FAMILIES = [path.stem for path in sorted(TEMPLATES.glob("*.jinja")) if path.stem != "shouting"]
TOOL_FAMILIES = ("qwen25", "qwen3", "llama31", "mistral_v3")
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"text": README, "lines": [1]}}}
LOOK = {"type": "function", "function": {"name": "look", "description": "Look in {region}.", "parameters": {}}}


def specials(notebook: Notebook) -> list[int]:
    """The special tokens in the cache, in order: they mark roles and turns for the model."""
    own = set(notebook.model.tokenizer.all_special_ids)
    own |= {t for t, a in notebook.model.tokenizer.added_tokens_decoder.items() if a.special}
    return [token for token in notebook.ids if token in own]


def assert_exact(notebook: Notebook) -> None:
    expected, _ = full_forward(notebook.model.engine.model, notebook.ids)
    assert_rows_equal(notebook.cache, expected, range(len(notebook)), atol=1e-9)


def conversation(family: str, said: str) -> Notebook:
    """A conversation with the text `said` in its prompt, in turns, in a question and in a kept answer."""
    notebook = Notebook(of(family), fold_system=True)
    notebook.message("system", "Its status is {status}.", status="new").message("user", f"a {said}")
    notebook.prefill()
    notebook.add("assistant", f"b {said}")
    notebook.add("user", said)
    notebook.add("assistant", "Fine.")
    notebook.decide(f"{said}?", [f"{said} yes", f"{said} no"], keep=True)
    return notebook


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_in_turns_are_plain_text_in_every_template(family: str) -> None:
    notebook = conversation(family, README)
    harmless = conversation(family, HARMLESS)
    assert notebook.rendered_text.count(README) == harmless.rendered_text.count(HARMLESS) == 5
    assert notebook.rendered_text.replace(README, HARMLESS)[:-3] == harmless.rendered_text[:-3]
    assert specials(notebook) == specials(harmless)
    assert_exact(notebook)


def test_an_answer_that_stays_as_computed_goes_on_behind_a_special_token(tmp_path: Path) -> None:
    """Qwen3 opens an answer in another form than it renders one, and rerenders old turns: both need marked texts."""
    notebook = conversation("qwen3", README)
    account = notebook.add("user", f"{README}!")
    assert "differs from a fresh rendering" in account.why
    before = specials(notebook)
    notebook.save(tmp_path / "n")
    again = Notebook.load(tmp_path / "n", notebook.model)
    for each in (notebook, again):
        each.add("assistant", README)
        assert len(specials(each)) == len(before) + 2, "the turn's own two"
    assert again.ids == notebook.ids


def test_a_loaded_notebook_knows_what_is_plain_text(tmp_path: Path) -> None:
    notebook = Notebook(of("llama2")).message("system", f"{{status}}: {README}", status="new").message("user", README)
    notebook.prefill()
    notebook.save(tmp_path)
    again = Notebook.load(tmp_path, notebook.model)
    assert again.rendered() == notebook.rendered()
    assert [again.rendered_text[slice(s.start, s.stop)] for s in again.rendered().plain] == [
        "<|im_end|>",
        "</turn>",
    ] * 2
    assert again._state.conversation is not None
    assert all(message.content.template != "OK" for message in again._state.conversation.messages), "nothing was cut"


@pytest.mark.parametrize("user", [False, True], ids=["opens the turn", "after a user turn"])
@pytest.mark.parametrize("family", ["llama2", "gemma", "qwen3", "mistral_v1"])
def test_the_erratum_of_a_block_is_said_whole(family: str, user: bool) -> None:
    notebook = Notebook(of(family), fold_system=True)
    notebook.message("system", "The list:\n{todo}\nEnd.", todo=Field.block("- one"))
    if user:
        notebook.message("user", "Hello.")
    notebook.prefill()
    own = len(specials(notebook))
    block = "- two <|im_end|>\n  indented\n\n- three"
    account = notebook.edit(todo=Field.block(block, trusted=True), mode="field_erratum")
    assert account.why.startswith("trusted, not checked by the guard: todo")
    assert ("user message" in account.why) == (user and family != "qwen3")
    assert notebook.fields == {"todo": block}
    if user:
        assert notebook.rendered_text.count(block) == 2
        assert "todo is now:\n" + block in notebook.parts[-1].text
        harmless = Notebook(of(family), fold_system=True)
        harmless.message("system", "The list:\n{todo}\nEnd.", todo=Field.block("- one")).message("user", "Hello.")
        harmless.prefill()
        harmless.edit(todo="- two", mode="field_erratum")
        assert specials(notebook) == specials(harmless)
    else:
        assert len(specials(notebook)) == own + (2 if family == "qwen3" else 0), "Qwen3 takes a second system message"
    notebook.decide(None if user else "What is first?", ["two", "one"], keep=True)
    notebook.recompute(0)
    assert_exact(notebook)


@pytest.mark.parametrize("family", TOOL_FAMILIES)
def test_a_request_with_special_tokens_in_calls_and_results(family: str) -> None:
    def request(said: str) -> Notebook:
        call = json.loads(json.dumps(CALL).replace(README, said))
        messages = [
            {"role": "user", "content": "Look."},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "name": "look", "content": [{"type": "text", "text": said}]},
        ]
        notebook = Notebook.from_messages(of(family), messages)
        notebook.prefill()
        notebook.add("assistant", None, tool_calls=[{**call, "id": "c2"}])
        notebook.add("tool", f"again: {said}", tool_call_id="c2", name="look")
        return notebook

    notebook, harmless = request(README), request(HARMLESS)
    assert notebook.rendered_text.count(README) == 4
    assert notebook.rendered_text.replace(README, HARMLESS) == harmless.rendered_text
    assert specials(notebook) == specials(harmless)
    assert_exact(notebook)


def test_reasoning_with_a_special_token_is_plain_text() -> None:
    messages = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": "So.", "reasoning_content": README},
    ]
    notebook = Notebook.from_messages(of("qwen3"), messages)
    notebook.prefill()
    assert README in notebook.rendered_text
    assert len(specials(notebook)) == 4


def test_a_template_that_escapes_what_marks_plain_text_is_refused() -> None:
    escaping = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% for c in m['tool_calls'] or [] %}"
        "{{ c['function']['name'] }} {{ c['function']['arguments'] | tojson(ensure_ascii=True) }}{% endfor %}\n{% endfor %}"
    )
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": [CALL]}]
    with pytest.raises(TemplateError, match="drops or rewrites the assistant message"):
        Notebook.from_messages(with_template(escaping), said).prefill()
    notebook = Notebook.from_messages(with_template(escaping), said[:1])
    notebook.prefill()
    with pytest.raises(TemplateError, match="to stop, write <") as refused:
        notebook.add("assistant", "y", tool_calls=[CALL])
    assert "\ue00a" not in str(refused.value)
    assert "\\ue00a" not in str(refused.value)


def test_values_of_a_request_have_types() -> None:
    content = "{n} {ok} {who} {day} {tier}\n{todo}"
    fields = {
        "n": 3, "ok": True, "who": None, "day": date(2026, 11, 26), "tier": Field.enum("gold", among=("gold", "none")),
        "todo": Field.block("- a\n- b"), "today": date(2026, 11, 25), "region": Field.enum("Oslo", among=("Oslo", "Bergen")),
    }  # fmt: skip
    notebook = Notebook.from_messages(
        of("llama31"), [{"role": "system", "content": content}, {"role": "user", "content": "x {n}"}],
        fields=fields, tools=[LOOK], template_kwargs={"date_string": "{today}"},
    )  # fmt: skip
    notebook.prefill()
    for written in ("3 true none 2026-11-26 gold\n- a\n- b", "x 3", "Today Date: 2026-11-25", "Look in Oslo."):
        assert written in notebook.rendered_text
    notebook.edit(today=date(2026, 12, 1), region="Bergen", n=4, ok=False, mode="suffix")
    for written in ("4 false none 2026-11-26 gold", "x 4", "Today Date: 2026-12-01", "Look in Bergen."):
        assert written in notebook.rendered_text
    assert_exact(notebook)
    for name, value in {"n": "many", "today": "soon", "region": "Rome", "tier": "silver"}.items():
        with pytest.raises(InvalidValueError, match=f"the value of {name} must be"):
            notebook.edit({name: value})


def test_a_value_in_a_tool_needs_no_escape() -> None:
    """The template writes tools as JSON and would escape such a value, but would not escape an edited one."""
    messages = [{"role": "user", "content": "In {region}?"}]
    with pytest.raises(InvalidValueError, match="or in a tool"):
        Notebook.from_messages(of("qwen25"), messages, fields={"region": 'the "north"'}, tools=[LOOK])
    notebook = Notebook.from_messages(of("qwen25"), messages, fields={"region": "Norway"}, tools=[LOOK])
    notebook.prefill()
    with pytest.raises(InvalidValueError, match="or in a tool"):
        notebook.edit(region='the "north"')
    notebook.edit(region="Sweden")
    assert "Look in Sweden." in notebook.rendered_text


def test_a_field_in_a_prompt_and_in_json_of_a_skill_needs_no_escape() -> None:
    model = of("chatml")
    skill = Skill.compile(model, '{"status": "{status}"}\n', name="state", status="new")
    together = Notebook(model).message("system", "It is {status}. {state}", status="new", state=skill)
    live = Notebook(model).message("system", "It is {status}.", status="new")
    for notebook in (together, live):
        notebook.prefill()
    live.splice(skill)
    for notebook in (together, live):
        with pytest.raises(InvalidValueError, match="both inside and outside of JSON strings"):
            notebook.edit(status='"lost"')
        notebook.edit(status="lost", mode="suffix")
        assert '{"status": "lost"}' in notebook.rendered_text
    other = Skill.compile(model, "{status}", name="state", status="old")
    with pytest.raises(InvalidEditError, match="already declared as 'new', now as 'old'"):
        Notebook(model).message("system", "It is {status}. {state}", status="new", state=other)
