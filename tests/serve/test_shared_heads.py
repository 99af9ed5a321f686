"""A new conversation reuses the system prompt of an earlier one, byte for byte.

It is never one of another tenant, and contains no personal values. The oracle is the list of sent requests.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from programmable_kv.errors import InvalidValueError
from programmable_kv.explain.pieces import Usage
from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.rewriting.conversation import Form
from programmable_kv.serve.rewriting.heads import key_of
from programmable_kv.serve.rewriting.rules import rules_of
from serve.rewriting_peers import CHAT, MESSAGES, RESPONSES, RULES, Peer, at, chat, claude, codex, extends, prefix

MAKE = {CHAT: chat, MESSAGES: claude, RESPONSES: codex}
CHANNEL = "Some values in this conversation are kept up to date."
PIECES: list[dict[str, Any]] = [
    {"name": "time", "pattern": "^Now: (.*)$"},
    {"name": "customer", "pattern": "^Customer: (.*)$"},
    {"name": "trace", "pattern": "^Trace: (.*)$", "tell": False},
    {"name": "status", "pattern": "^Status: (.*)$", "share": True},
]


def head_of(body: Any) -> str:
    """The text that a prefix cache reads before the announcement of lines."""
    head, channel, _ = "\n".join(prefix(body)).partition(CHANNEL)
    assert channel, "it is announced"
    return head


@pytest.mark.parametrize("route", [CHAT, MESSAGES, RESPONSES])
def test_another_conversation_begins_with_the_same_bytes_and_tells_its_own_values(route: str) -> None:
    peer, make = Peer(), MAKE[route]
    first = peer.send(make(at("1"), "Where is it?"), session="one", route=route)
    second = peer.send(make(at("2"), "Can I return it?"), session="two", route=route)
    assert peer.action == "shared"
    assert head_of(second) == head_of(first)
    assert len(head_of(second)) > len(RULES), "the shared bytes reach up to the announcement"
    tokens = [re.findall(r"\[state (\w{16})\]", json.dumps(body)) for body in (first, second)]
    assert not set(tokens[0]) & set(tokens[1]), "each conversation has a token of its own"
    assert peer.line == f'[state {tokens[1][0]}] "the time": "10:02".'
    assert "Now: 10:02" not in json.dumps(second)
    assert peer.works[-1].plan.saved_bytes > len(RULES)
    third = peer.send(make(at("3"), "Can I return it?", "Yes.", "Sure?"), session="two", route=route)
    assert (peer.action, head_of(third)) == ("erratum", head_of(first)), "and it goes on like any other"


@pytest.mark.parametrize("minute", ["1", "2"])
def test_a_conversation_whose_tools_stand_in_another_order_begins_with_the_same_bytes(minute: str) -> None:
    peer = Peer()
    tools = [{"type": "function", "function": {"name": name}} for name in "abc"]
    first = peer.send(chat(at("1"), "one", tools=tools), session="one")
    second = peer.send(chat(at(minute), "two", tools=tools[::-1]), session="two")
    assert peer.action == "shared"
    assert head_of(second) == head_of(first)
    assert bool(peer.line) == (minute == "2"), "the order needs no line"
    third = peer.send(chat(at(minute), "two", "Yes.", "so", tools=tools), session="two")
    assert (peer.action, peer.why, peer.works[-1].plan.body is None) == ("replayed", "", False)
    assert extends(third, second)
    fourth = peer.send(
        chat(at(minute), "two", "Yes.", "so", "Yes.", "then", tools=tools[1:] + tools[:1]), session="two"
    )
    assert (peer.action, peer.why) == ("replayed", "the tools are sent in their earlier order")
    assert extends(fourth, third)


def test_heads_of_earlier_versions_are_read() -> None:
    """Earlier versions stored a head as a list of texts. Heads with tools had other keys, so they are not found."""
    peer = Peer()
    first = peer.send(chat(at("1"), "one"), session="one")
    with peer.state.write() as run:
        [(document,)] = run.execute("SELECT document FROM heads").fetchall()
        run.execute("UPDATE heads SET document = ?", (json.dumps(json.loads(document)["texts"]),))
    second = peer.send(chat(at("2"), "two"), session="two")
    assert (peer.action, head_of(second)) == ("shared", head_of(first))


def test_the_same_values_need_no_line() -> None:
    peer = Peer()
    first = peer.send(chat(at("1"), "one"), session="one")
    second = peer.send(chat(at("1"), "two"), session="two")
    assert (peer.action, peer.line) == ("announced", "")
    assert head_of(second) == head_of(first)


@pytest.mark.parametrize(
    ("whose", "shares"),
    [
        ({}, True),
        ({"tenant": "another"}, False),
        ({"model": "another"}, False),
        ({"cache_salt": "another"}, False),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, False),
    ],
)
def test_only_what_an_upstream_could_find_again_and_the_tenant_may_see(whose: dict[str, Any], shares: bool) -> None:
    peer = Peer()
    tenant = whose.pop("tenant", "t")
    peer.send(chat(at("1"), "one"), session="one")
    got = peer.send(chat(at("2"), "two") | whose, session="two", tenant=tenant)
    assert (peer.action == "shared") is shares
    assert ("10:01" in json.dumps(got)) is shares


@pytest.mark.parametrize(
    ("more", "before", "after", "shares"),
    [
        ({}, "10:01", "10:02", True),
        ({}, "2026-11-26 10:01", "2026-12-01 09:30", True),
        ({}, "Thursday, 26 November", "Thursday, 3 December", False),
        ({}, "26 November", "27 November", True),
        ({}, "10:01, customer 4711", "10:02, customer 4711", True),
        ({}, "10:01, customer 4711", "10:02, customer 4712", False),
        ({}, "10:01 1764184001", "10:02 1764184999", False),
        ({}, "1764184001", "1764184999", False),
        ({}, "10.20.30.40", "10.20.31.40", False),
        ({}, "Ann", "Bob", False),
        ({}, "4711", "4712", False),
        ({}, "3f9c0a51d2b8", "77aa0a51d2c9", False),
        ({"share": False}, "10:01", "10:02", False),
        ({"share": True}, "Ann", "Bob", True),
        ({"tell": False}, "3f9c0a51d2b8", "77aa0a51d2c9", False),
        ({"tell": False, "share": True}, "3f9c0a51d2b8", "77aa0a51d2c9", True),
    ],
)
def test_what_belongs_to_somebody_is_not_shared(more: dict[str, Any], before: str, after: str, shares: bool) -> None:
    peer = Peer(rules=rules_of({"volatile": [{"name": "piece", "pattern": "^Now: (.*)$", **more}]}))
    peer.send(chat(f"Now: {before}\n{RULES}", "one"), session="one")
    got = json.dumps(peer.send(chat(f"Now: {after}\n{RULES}", "two"), session="two"))
    assert (peer.action == "shared") is shares
    assert (before in got) is shares
    assert (after in got) is (not shares or more.get("tell", True))


@pytest.mark.parametrize(("sharing", "shares"), [("none", False), ("declared", False), ("learned", True)])
def test_learned_clocks_are_shared_where_that_is_asked_for(sharing: str, shares: bool) -> None:
    peer = Peer(rules=rules_of({"share": sharing}))
    for minute in "1234":
        said = [text for turn in range(int(minute)) for text in ("Yes.", f"turn {turn}")]
        peer.send(chat(at(minute), "one", *said), session="one")
    assert peer.action == "erratum", "the line was learned"
    first = peer.send(chat(at("5"), "two"), session="two")
    second = peer.send(chat(at("6"), "three"), session="three")
    assert (peer.action == "shared", head_of(second) == head_of(first)) == (shares, shares)


def test_it_can_be_switched_off() -> None:
    rules = {"volatile": [{"name": "the time", "pattern": "^Now: (.*)$"}]}
    for given_rules, action in ((rules, "shared"), ({**rules, "share": "none"}, "announced")):
        peer = Peer(rules=rules_of(given_rules))
        peer.send(chat(at("1"), "one"), session="one")
        peer.send(chat(at("2"), "two"), session="two")
        assert peer.action == action
    with pytest.raises(InvalidValueError, match="share must be one of none, declared, learned"):
        rules_of({**rules, "share": True})
    with pytest.raises(InvalidValueError, match="tell and share must be true or false"):
        rules_of({"volatile": [{"name": "time", "pattern": "x", "share": "yes"}]})


def test_a_head_that_was_refused_is_not_begun_with() -> None:
    peer = Peer()
    peer.send(chat(at("1"), "one"), session="one", status=400)
    peer.send(chat(at("2"), "two"), session="two")
    assert peer.action == "announced"


def test_a_head_is_begun_with_for_a_day_and_then_sent_anew(tmp_path: Path) -> None:
    peer = Peer(path=tmp_path / "state")
    peer.send(chat(at("1"), "one"), session="one")
    peer.state.close()
    again = Peer(path=tmp_path / "state")
    again.send(chat(at("2"), "two"), session="two")
    assert again.action == "shared", "a restart keeps it"
    with again.state.write() as run:
        run.execute("UPDATE heads SET made = made - 86401")
    again.send(chat(at("3"), "three"), session="three")
    assert again.action == "announced"
    got = again.send(chat(at("4"), "four"), session="four")
    assert again.action == "shared"
    assert "Now: 10:03" in json.dumps(got)


def test_a_line_that_is_long_beside_what_it_saves_is_not_sent() -> None:
    peer = Peer(rules=rules_of({"volatile": [{"name": "memory", "pattern": "<m>(.*)</m>", "share": True}]}))
    peer.send(chat(f"<m>{'a' * 500}</m>\n{RULES}", "one"), session="one")
    got = peer.send(chat(f"<m>{'b' * 500}</m>\n{RULES}", "two"), session="two")
    assert (peer.action, "aaa" in json.dumps(got)) == ("announced", False)
    got = peer.send(chat(f"<m>{'c' * 30}</m>\n{RULES}", "three"), session="three")
    assert (peer.action, "bbb" in json.dumps(got)) == ("shared", True)


def test_bound_reasoning_is_not_put_behind_another_head() -> None:
    thought = {"role": "assistant", "content": [{"type": "thinking", "thinking": "so", "signature": "s"}]}
    peer = Peer()
    peer.send(claude(at("1"), "one"), session="one", route=MESSAGES)
    peer.send(claude(at("2"), "two", thought, "more"), session="two", route=MESSAGES)
    assert peer.action == "announced"


def test_a_role_that_is_refused_for_the_line_is_told_in_another_form() -> None:
    peer = Peer()
    first = peer.send(chat(at("1"), "one"), session="one")
    work = peer.rewriter.begin("t", CHAT, ((b"x-session-id", b"two"),), json.dumps(chat(at("2"), "two")).encode())
    assert peer.rewriter.refused(work, 400)
    peer.rewriter.answered(work, 200)
    assert (work.plan.action, work.plan.note and work.plan.note.form) == ("shared", Form.USER)
    assert head_of(json.loads(work.body)) == head_of(first)


def test_hoisted_heads_are_the_same_anyway() -> None:
    peer = Peer(mode=GatewayMode.HOIST)
    first = peer.send(chat(at("1"), "one"), session="one")
    second = peer.send(chat(at("2"), "two"), session="two")
    assert (peer.action, head_of(second)) == ("hoisted", head_of(first))


@pytest.mark.parametrize(("cached", "switched_off"), [(900, False), (0, True)])
def test_it_is_judged_by_the_upstreams_numbers(cached: int, switched_off: bool) -> None:
    peer = Peer()
    peer.send(chat(at("1"), "the first"), session="first")
    for number in range(8):
        usage = Usage(1000, cached)
        peer.send(chat(at("2"), f"number {number}"), session=str(number), usage=usage)
        assert peer.action == "shared"
    gains = peer.rewriter.as_json("t")["routes"][0]
    assert gains["counted_by_upstream"] == 8
    assert (gains["gained_tokens_estimate"] > 8 * 800) is not switched_off
    peer.send(chat(at("3"), "and now"), session="last")
    assert (peer.action, "did not pay" in peer.why) == (("forwarded", True) if switched_off else ("shared", False))


@dataclass(frozen=True)
class Begin:
    """The first request of a conversation. Each time and trace belongs to one tenant and customer, so a leak shows."""

    tenant: int
    customer: int
    minute: int
    status: int
    told: bool

    @property
    def time(self) -> str:
        return f"1{self.tenant}:{self.minute:02}"

    @property
    def own(self) -> list[str]:
        return [
            f"Customer: person-{self.tenant}-{'abc'[self.customer]}",
            f"Trace: {'abc'[self.customer]}{self.tenant}f00d",
        ]

    @property
    def system(self) -> str:
        return "\n".join([f"Now: {self.time}", *self.own, f"Status: state {'xyz'[self.status]}", RULES])


BEGIN = st.builds(
    Begin, st.integers(0, 1), st.integers(0, 2), st.integers(0, 59), st.integers(0, 2), st.booleans()
)  # fmt: skip


@pytest.mark.parametrize("route", [CHAT, MESSAGES, RESPONSES])
@settings(max_examples=60, deadline=None)
@given(begins=st.lists(BEGIN, min_size=2, max_size=12))
def test_whatever_begins_a_shared_head_was_sent_before_and_nothing_of_others_is_in_it(
    route: str, begins: list[Begin]
) -> None:
    peer = Peer(rules=rules_of({"volatile": PIECES}))
    heads: dict[str, list[str]] = {}
    for number, begin in enumerate(begins):
        tenant = f"tenant {begin.tenant}"
        status = 200 if begin.told else 400
        got = peer.send(
            MAKE[route](begin.system, f"question {number}"),
            session=str(number), tenant=tenant, route=route, status=status,
        )  # fmt: skip
        text = json.dumps(got)
        for other in begins:
            if other.tenant != begin.tenant:
                assert other.time not in text, "tenants never meet"
            assert all(piece in begin.own or piece not in text for piece in other.own), "another's piece is readable"
        if peer.action == "shared":
            assert head_of(got) in heads[tenant], "it was sent before, up to the announcement"
            line = peer.line
            assert (f"Now: {begin.time}" in text) or (f'"time": "{begin.time}"' in line)
            assert f"Status: state {'xyz'[begin.status]}" in text or f'"state {"xyz"[begin.status]}"' in line
            assert "Trace" not in line
        else:
            assert peer.action in ("announced", "reset")
            assert f"Now: {begin.time}" in text
        if begin.told:
            heads.setdefault(tenant, []).append(head_of(got))


def test_a_key_without_the_tenant_would_let_tenants_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative witness of the property above: without the tenant in the key, a value leaks."""
    monkeypatch.setattr(
        "programmable_kv.serve.rewriting.rewriter.key_of",
        lambda prompt, rules, learned, _, *rest: key_of(prompt, rules, learned, *rest),
    )
    peer = Peer()
    peer.send(chat(at("1"), "one"), session="one", tenant="a")
    got = peer.send(chat(at("2"), "two"), session="two", tenant="b")
    assert (peer.action, "10:01" in json.dumps(got)) == ("shared", True)
