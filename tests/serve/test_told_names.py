"""A line states a name and a value. It is sent only if it is true for every place of that name in the model's input."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.rewriting.rules import rules_of
from serve.rewriting_peers import CHAT, MESSAGES, RULES, Peer, chat, claude

UNCLEAR = "several places share a name but have different values"
STOCK = {"volatile": [{"name": "stock", "pattern": "^Stock: (.*)$"}], "learn": False}
CART = {"volatile": [{"name": "the cart", "pattern": "<cart>(.*?)</cart>"}], "learn": False}


def orders(*statuses: str) -> str:
    return "".join(f"Order {17 + n}:\nStatus: {status}\n" for n, status in enumerate(statuses)) + RULES


def taught(peer: Peer, system: Any, *values: str) -> list[str]:
    """Have a conversation in which a line of the system prompt changes until it is learned. Returns the turns."""
    said = ["hi"]
    for number, value in enumerate(values):
        peer.send(chat(system(value), *said), session="s")
        said += ["Yes.", f"more {number}"]
    return said


def test_a_learned_line_whose_name_stands_twice_is_not_told() -> None:
    peer = Peer(rules=rules_of({}))
    said = taught(peer, lambda status: orders(status, "pending"), "pending", "paid", "packed")
    got = peer.send(chat(orders("packed", "cancelled"), *said), session="s")
    assert (peer.action, peer.why) == ("reset", UNCLEAR)
    assert got["messages"][0]["content"].startswith(orders("packed", "cancelled"))
    peer.send(chat(orders("lost", "lost"), *said, "Yes.", "and"), session="s")
    assert (peer.action, peer.line.count("Status")) == ("erratum", 1), "it is so of both"


def test_a_learned_line_whose_name_stands_once_is_told() -> None:
    peer = Peer(rules=rules_of({}))
    said = taught(peer, orders, "pending", "paid", "packed")
    peer.send(chat(orders("sent"), *said), session="s")
    assert peer.action == "erratum"
    assert peer.line.endswith('"Status": "sent".')


@pytest.mark.parametrize("role", ["user", "assistant", "tool"])
@pytest.mark.parametrize("line", ["Status: open", "- Status = open", '"Status": open', "  Status:open"])
def test_the_name_of_a_learned_line_is_looked_for_in_messages_too(role: str, line: str) -> None:
    """A tool's result may contain the status of another order."""
    peer = Peer(rules=rules_of({}))
    said = taught(peer, orders, "pending", "paid", "packed")
    other = {"role": role, "content": f"Order 99:\n{line}\nThat is all."}
    peer.send(chat(orders("sent"), *said, "Yes.", other, "go on"), session="s")
    assert (peer.action, peer.why) == ("reset", UNCLEAR)


def test_a_lines_beginning_that_another_line_has_is_not_told() -> None:
    for also, action in (("", "erratum"), ("It is forbidden to guess.\n", "reset")):
        peer = Peer(rules=rules_of({}))
        system = f"It is 2026-11-26 10:0{{}}:00.\n{also}{RULES}"
        said = taught(peer, system.format, "1", "2", "3")
        peer.send(chat(system.format("4"), *said), session="s")
        assert peer.action == action


def test_a_declared_name_with_several_values_is_not_told() -> None:
    peer = Peer(rules=rules_of(STOCK))
    peer.send(chat(f"Apples\nStock: 5\nPears\nStock: 5\n{RULES}", "hi"), session="s")
    got = peer.send(chat(f"Apples\nStock: 5\nPears\nStock: 0\n{RULES}", "hi", "Yes.", "so"), session="s")
    assert (peer.action, peer.why, peer.line) == ("reset", UNCLEAR, "")
    assert "Stock: 0" in got["messages"][0]["content"]
    peer.send(chat(f"Apples\nStock: 7\nPears\nStock: 7\n{RULES}", "hi", "Yes.", "so", "Yes.", "and"), session="s")
    assert (peer.action, peer.line.partition("] ")[2]) == ("erratum", '"stock": "7".')


def test_two_rules_of_one_name_are_one_name() -> None:
    pieces = [{"name": "stock", "pattern": f"^{fruit}: (.*)$"} for fruit in ("Apples", "Pears")]
    peer = Peer(rules=rules_of({"volatile": pieces}))
    peer.send(chat(f"Apples: 5\nPears: 6\n{RULES}", "hi"), session="s")
    peer.send(chat(f"Apples: 4\nPears: 6\n{RULES}", "hi", "Yes.", "so"), session="s")
    assert (peer.action, peer.why) == ("reset", UNCLEAR)


def test_hoist_leaves_a_name_with_several_values_where_it_is() -> None:
    rules = {"volatile": [*STOCK["volatile"], {"name": "the time", "pattern": "^Now: (.*)$"}]}  # type: ignore[misc]
    peer = Peer(mode=GatewayMode.HOIST, rules=rules_of(rules))
    system = f"Now: 10:00\nApples\nStock: {{}}\nPears\nStock: {{}}\n{RULES}"
    got = peer.send(chat(system.format(5, 0), "hi"), session="s")
    head = got["messages"][0]["content"]
    assert peer.action == "hoisted"
    assert "Stock: 5\nPears\nStock: 0" in head
    assert 'Now: (given below as "the time")' in head
    assert peer.line.endswith('] "the time": "10:00".')
    peer.send(chat(system.format(5, 1), "hi", "Yes.", "so"), session="s")
    assert (peer.action, peer.why) == ("reset", UNCLEAR)
    got = peer.send(chat(system.format(3, 3), "another"), session="t")
    assert got["messages"][0]["content"].count('(given below as "stock")') == 2
    assert peer.line.count('"stock": "3"') == 1, "both are so"
    alone = Peer(mode=GatewayMode.HOIST, rules=rules_of(STOCK))
    alone.send(chat(f"Apples\nStock: 5\nPears\nStock: 0\n{RULES}", "hi"))
    assert (alone.action, alone.line) == ("announced", "")


@pytest.mark.parametrize("route", [CHAT, MESSAGES])
def test_a_change_in_an_old_message_is_not_told_behind_the_newest_value(route: str) -> None:
    """The client keeps the cart only in the newest message, and removes it from earlier ones."""
    peer, make = Peer(rules=rules_of(CART)), {CHAT: chat, MESSAGES: claude}[route]
    peer.send(make(RULES, "<cart>1 apple</cart> what is in it?"), session="s", route=route)
    said = ["<cart>(left out)</cart> what is in it?", "1 apple.", "<cart>1 apple, 2 pears</cart> and now?"]
    got = peer.send(make(RULES, *said), session="s", route=route)
    assert (peer.action, peer.why, peer.line) == ("reset", UNCLEAR, "")
    assert "(left out)" in json.dumps(got)


def test_a_shared_system_prompt_is_not_begun_with_where_a_name_has_several_values() -> None:
    piece = {"name": "stock", "pattern": "^Stock: (.*)$", "share": True}
    peer = Peer(rules=rules_of({"volatile": [piece]}))
    peer.send(chat(f"Apples\nStock: 5\nPears\nStock: 0\n{RULES}", "one"), session="one")
    got = peer.send(chat(f"Apples\nStock: 5\nPears\nStock: 1\n{RULES}", "two"), session="two")
    assert (peer.action, "Stock: 1" in json.dumps(got)) == ("announced", True)


VALUES = st.sampled_from(["1", "2"])
STEPS = st.lists(st.tuples(VALUES, VALUES, st.lists(VALUES, min_size=1, max_size=3)), min_size=2, max_size=6)


@pytest.mark.parametrize("mode", [GatewayMode.ERRATUM, GatewayMode.HOIST])
@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_what_is_told_is_so_wherever_the_name_stands(
    mode: GatewayMode, steps: list[tuple[str, str, list[str]]]
) -> None:
    """The name is in two places of the system prompt, and in old and new messages of the user."""
    peer = Peer(mode=mode, rules=rules_of({"volatile": [{"name": "left", "pattern": "<left>(.*?)</left>"}]}))
    for number, (one, other, inside) in enumerate(steps):
        said = ["hi"]
        for turn in range(number + 1):
            told = f" <left>{inside[turn]}</left>" if turn < len(inside) else ""
            said += ["Yes.", f"question {turn}{told}"]
        body = chat(f"A <left>{one}</left> B <left>{other}</left>\n{RULES}", *said)
        peer.send(body, session="s")
        now = set(re.findall("<left>(.*?)</left>", json.dumps(body)))
        for value in re.findall('"left": "(.*?)"', peer.line):
            assert now == {value}
    peer.state.close()
