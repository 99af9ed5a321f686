"""Dates that a client gives to the chat template: the gateway repeats the first date, and a line states the new one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.rewriting.moments import is_moment
from serve.rewriting_peers import CHAT, MESSAGES, RESPONSES, RULES, Peer, chat, claude, codex, extends
from templated import of

pytestmark = pytest.mark.usefixtures("places")
MAKE: dict[str, Any] = {CHAT: chat, MESSAGES: claude, RESPONSES: codex}


def day(number: int, **more: Any) -> dict[str, Any]:
    return {"chat_template_kwargs": {"date_string": f"{number} Nov 2026", "enable_thinking": False, **more}}


@pytest.mark.parametrize("mode", [GatewayMode.ERRATUM, GatewayMode.HOIST])
@pytest.mark.parametrize("route", [CHAT, MESSAGES, RESPONSES])
def test_the_earlier_date_is_sent_and_the_new_one_told(route: str, mode: GatewayMode) -> None:
    peer, make = Peer(mode=mode), MAKE[route]
    first = peer.send(make(RULES, "hi", **day(26)), route=route)
    assert peer.action == "announced"
    second = peer.send(make(RULES, "hi", "Yes.", "so", **day(27)), route=route)
    assert peer.action == "erratum"
    assert '"date_string": "27 Nov 2026"' in peer.line
    assert second["chat_template_kwargs"] == day(26)["chat_template_kwargs"]
    assert extends(second, first)
    assert peer.works[-1].plan.saved_bytes > len(RULES)
    third = peer.send(make(RULES, "hi", "Yes.", "so", "Yes.", "oh", **day(27)), route=route)
    assert (peer.action, peer.line) == ("replayed", "")
    assert extends(third, second)
    fourth = peer.send(make(RULES, "hi", "Yes.", "so", "Yes.", "oh", "Yes.", "and", **day(26)), route=route)
    assert (peer.action, '"26 Nov 2026"' in peer.line) == ("erratum", True), "a way back is told, too"
    assert extends(fourth, third)


def test_in_a_real_template_the_prefix_stays_and_the_new_date_is_read() -> None:
    """Without the gateway, the prefix would change."""
    tokenizer = of("llama31").tokenizer

    def rendered(body: Any) -> str:
        options = body["chat_template_kwargs"]
        return str(tokenizer.apply_chat_template(body["messages"], tokenize=False, **options))

    peer = Peer()
    first = rendered(peer.send(chat(RULES, "hi", **day(26))))
    later = chat(RULES, "hi", "Yes.", "so", **day(27))
    second = rendered(peer.send(later))
    assert "Today Date: 26 Nov 2026" in first
    assert second.startswith(first)
    assert "27 Nov 2026" in second[len(first) :]
    assert not rendered(later).startswith(first[:200])


def test_other_variables_go_through_as_they_come() -> None:
    peer = Peer()
    peer.send(chat(RULES, "hi", **day(26, tools_in_user_message=True, style="short")))
    got = peer.send(chat(RULES, "hi", "Yes.", "so", **day(26, tools_in_user_message=False, style="long")))
    assert peer.action == "replayed"
    assert got["chat_template_kwargs"] == day(26, tools_in_user_message=False, style="long")["chat_template_kwargs"]
    got = peer.send(chat(RULES, "hi", "Yes.", "so", "Yes.", "oh", chat_template_kwargs={"today": "27 Nov 2026"}))
    assert got["chat_template_kwargs"] == {"today": "27 Nov 2026"}, "another name: the conversation goes on with it"
    got = peer.send(
        chat(RULES, "hi", "Yes.", "so", "Yes.", "oh", "Yes.", "x", chat_template_kwargs={"today": "28 Nov 2026"})
    )
    assert got["chat_template_kwargs"] == {"today": "27 Nov 2026"}


@pytest.mark.parametrize("given", [None, [], "27 Nov 2026", {}, {"date_string": 5}, {"a": {"b": "27 Nov 2026"}}])
def test_what_is_no_such_variable_goes_through(given: Any) -> None:
    peer = Peer()
    peer.send(chat(RULES, "hi", chat_template_kwargs=given))
    got = peer.send(chat(RULES, "hi", "Yes.", "so", chat_template_kwargs=given))
    assert got["chat_template_kwargs"] == given
    assert (peer.action, peer.works[-1].plan.body) == ("forwarded", None)


def test_a_conversation_that_begins_on_another_day_has_a_head_of_its_own() -> None:
    peer = Peer()
    peer.send(chat(f"Now: 10:01\n{RULES}", "hi", **day(26)), session="a")
    got = peer.send(chat(f"Now: 10:02\n{RULES}", "hello", **day(27)), session="b")
    assert got["chat_template_kwargs"]["date_string"] == "27 Nov 2026"
    assert "26 Nov" not in json.dumps(got)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("27 Nov 2026", True), ("2026-11-27", True), ("Friday, 27 November 2026", True), ("10:02", True),
        ("2026-11-27T10:02:03Z", True), ("27/11/2026", True), ("", False), ("short", False), ("2026", False),
        ("1234-56-78", False), ("27 Nov 2026 for Anna", False), ("order 27 Nov", False), ("May", False), ("5", False),
    ],
)  # fmt: skip
def test_what_is_a_date_and_nothing_else(value: str, expected: bool) -> None:
    assert is_moment(value) is expected
