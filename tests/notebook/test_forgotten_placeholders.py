"""A placeholder without a value stays in the text, and the account of the prefill says so."""

from __future__ import annotations

import pytest

from conftest import tiny
from programmable_kv import Notebook, Skill


def test_a_forgotten_placeholder_is_named_in_the_account() -> None:
    notebook = Notebook(tiny()).message("system", "status: {status}\nwhen: {eta}\n{eta}\n", status="shipped")
    account = notebook.message("user", "{who} asks").prefill()
    assert "no value was given for {eta}, {who}" in account.why
    assert "{eta}" in notebook.rendered_text


@pytest.mark.parametrize("text", ["{status}", 'a JSON object {"a": 1}', "{}", "{{eta}} ${eta}", "{1}", "{a b}"])
def test_braces_that_are_no_placeholder_are_not_named(text: str) -> None:
    notebook = Notebook(tiny()).text(f"{{status}} {text}", status="shipped")
    assert "no value" not in notebook.prefill().why


def test_a_skill_in_its_place_is_no_forgotten_placeholder() -> None:
    model = tiny()
    skill = Skill.compile(model, "if returned then refund.\n", name="refunds")
    notebook = Notebook(model).text("rules: {refunds}", refunds=skill)
    assert "no value" not in notebook.prefill().why


def test_a_placeholder_above_the_message_that_gives_the_value_is_named() -> None:
    notebook = Notebook(tiny()).message("system", "when: {eta}").message("user", "it is {eta}", eta="monday")
    assert "{eta}" in notebook.prefill().why
