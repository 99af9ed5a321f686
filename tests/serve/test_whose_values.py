"""No request contains values of another conversation.

The tests cover the names of conversations, clocks, and values that are declared to be kept apart. The oracle is the
list of sent requests.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.rewriting.changes import Change, kind_of
from programmable_kv.serve.rewriting.prompt import CHAT
from programmable_kv.serve.rewriting.rules import rules_of
from serve.rewriting_peers import RULES, Peer, chat

pytestmark = pytest.mark.usefixtures("places")
CUSTOMER = {"volatile": [{"name": "the customer", "pattern": "^Customer: (.*)$"}]}
ALICE, BOB = "Alice, 12 Elm St", "Bob"


def of(customer: str) -> str:
    return f"Customer: {customer}\n{RULES}"


def sent(peer: Peer, body: Any, headers: Any = ()) -> str:
    """Send a body. Returns the text that the upstream gets."""
    work = peer.rewriter.begin("t", CHAT, headers, json.dumps(body).encode())
    peer.rewriter.answered(work, 200)
    peer.works.append(work)
    return work.body.decode()


SHARED_NAMES: list[tuple[dict[str, Any], Any]] = [
    ({"user_id": "app"}, ()),
    ({}, ((b"user_id", b"app"),)),
    ({"user": "app"}, ()),
    ({"safety_identifier": "app"}, ()),
    ({"metadata": {"user_id": "app", "session_id": "app"}}, ()),
    ({"prompt_cache_key": "app"}, ()),
]


@pytest.mark.parametrize("share", ["declared", "none"])
@pytest.mark.parametrize(("named", "headers"), SHARED_NAMES)
def test_a_users_or_an_applications_name_is_no_conversations_name(
    named: dict[str, Any], headers: Any, share: str
) -> None:
    for first in ("hi", "Where is my parcel?"):
        peer = Peer(rules=rules_of({**CUSTOMER, "share": share}))
        sent(peer, chat(of(ALICE), "hi", **named), headers)
        got = sent(peer, chat(of(BOB), first, **named), headers)
        assert ALICE not in got
        assert f"Customer: {BOB}" in json.loads(got)["messages"][0]["content"]


def test_beside_a_users_name_a_sessions_name_still_names_one_conversation() -> None:
    """This also holds if a header names the user and the body names the session."""
    peer, headers = Peer(rules=rules_of(CUSTOMER)), ((b"user_id", b"app"),)
    sent(peer, chat(of(ALICE), "hi", session_id="1"), headers)
    got = sent(peer, chat(of(BOB), "hi", session_id="2"), headers)
    assert ALICE not in got
    got = sent(peer, chat(of("Alice, 7 Oak Rd"), "hi", "Yes.", "so", session_id="1"), headers)
    assert peer.action == "erratum"
    assert '"the customer": "Alice, 7 Oak Rd"' in peer.line


def test_a_sessions_name_and_a_users_of_the_same_letters_do_not_meet() -> None:
    peer = Peer(rules=rules_of(CUSTOMER))
    sent(peer, chat(of(ALICE), "hi", session_id="x"))
    assert ALICE not in sent(peer, chat(of(BOB), "hi", user_id="x"))
    other = Peer(rules=rules_of(CUSTOMER))
    sent(other, chat(of(ALICE), "hi", user_id="x"))
    assert ALICE not in sent(other, chat(of(BOB), "hi", session_id="x"))


def test_who_begins_with_equal_values_is_another_conversation_all_the_same() -> None:
    """Alice and Bob begin with equal requests, before anything is known about either. Later their values differ."""
    peer = Peer(rules=rules_of(CUSTOMER))
    sent(peer, chat(of("(not known)"), "hi"))
    sent(peer, chat(of("(not known)"), "hi"))
    said = ["hi", "Hello!", "Where is my order?"]
    sent(peer, chat(of(ALICE), *said))
    got = sent(peer, chat(of(BOB), *said))
    assert ALICE not in got
    for more in (["There.", "When?"], ["There.", "When?", "Soon.", "Thanks."]):
        assert ALICE not in sent(peer, chat(of(BOB), *said, *more))
        assert BOB not in sent(peer, chat(of(ALICE), *said, *more))


def test_so_is_one_whose_first_request_could_not_go_on_with_what_was_sent() -> None:
    """A line cannot stand between a call and its result, so the gateway sends the second prompt unchanged."""
    rules = {"volatile": [*CUSTOMER["volatile"], {"name": "the time", "pattern": "^Now: (.*)$"}]}
    peer = Peer(rules=rules_of(rules))
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    said = ["hi", {"role": "assistant", "content": None, "tool_calls": [call]}]
    sent(peer, chat(f"Now: 10:00\n{of('(not known)')}", *said))
    sent(peer, chat(f"Now: 10:01\n{of('(not known)')}", *said))
    assert (peer.action, peer.why) == ("reset", "no line can be appended to this request")
    said.append({"role": "tool", "tool_call_id": "c", "content": "It is there."})
    sent(peer, chat(f"Now: 10:01\n{of(ALICE)}", *said))
    assert (peer.action, peer.why) == ("reset", "it may belong to another conversation")
    assert ALICE not in sent(peer, chat(f"Now: 10:01\n{of(BOB)}", *said))


def test_a_greeting_that_every_conversation_begins_with_is_no_proof_that_it_goes_on() -> None:
    peer = Peer(rules=rules_of(CUSTOMER))
    greeted = [{"role": "assistant", "content": "How can I help?"}, {"role": "user", "content": "Where is it?"}]
    sent(peer, chat(of(ALICE), *greeted))
    assert ALICE not in sent(peer, chat(of(BOB), *greeted))


def test_one_conversation_without_a_name_is_told_as_long_as_it_is_alone() -> None:
    peer, said = Peer(rules=rules_of(CUSTOMER)), ["hi", "Hello!", "so"]
    sent(peer, chat(of(ALICE), "hi"))
    sent(peer, chat(of(ALICE), *said))
    sent(peer, chat(of("Alice, 7 Oak Rd"), *said, "Yes.", "and"))
    assert peer.action == "erratum"
    sent(peer, chat(of("Alice, 7 Oak Rd"), *said, "Yes.", "and"))
    assert peer.action == "replayed", "the same again: it may be another one"
    sent(peer, chat(of("Alice, 9 Oak Rd"), *said, "Yes.", "and", "Yes.", "more"))
    assert (peer.action, peer.why) == ("reset", "it may belong to another conversation")


@pytest.mark.parametrize("said", [["hi", "Hello!", "so"], ["For example?", "As this.", "hi"]])
def test_turns_that_a_conversation_is_first_seen_with_are_no_proof(said: list[str]) -> None:
    """Such turns may be examples in every conversation. Lines are used once the model has answered after them."""
    peer, more = Peer(rules=rules_of(CUSTOMER)), ["Yes.", "and"]
    sent(peer, chat(of(ALICE), *said))
    assert ALICE not in sent(peer, chat(of(BOB), *said, *more))
    assert (peer.action, peer.why) == ("reset", "it may belong to another conversation")
    got = sent(peer, chat(of("Bob, 7 Oak Rd"), *said, *more, "Yes.", "more"))
    assert (peer.action, ALICE in got) == ("erratum", False)


def test_a_beginning_that_was_forgotten_is_no_proof_that_it_is_alone() -> None:
    peer, said = Peer(rules=rules_of(CUSTOMER)), ["hi", "Hello!", "so"]
    sent(peer, chat(of(ALICE), "hi"))
    sent(peer, chat(of(ALICE), *said))
    with peer.state.write() as run:
        run.execute("DELETE FROM beginnings")
    assert ALICE not in sent(peer, chat(of(BOB), *said, "Yes.", "and"))


def test_a_request_that_was_refused_is_not_counted() -> None:
    peer, said = Peer(rules=rules_of(CUSTOMER)), ["hi", "Hello!", "so"]
    sent(peer, chat(of(ALICE), *said))
    before = peer.state.rows("SELECT key, conversations FROM beginnings")
    peer.send(chat(of(ALICE), *said), status=400)
    assert peer.state.rows("SELECT key, conversations FROM beginnings") == before


@pytest.mark.parametrize(
    ("one", "other", "is_clock"),
    [
        ("10:00", "10:01", True),
        ("11:59 AM", "12:01 PM", True),
        ("11:59 a.m.", "12:01 p.m.", True),
        ("2026-11-26T10:00:00.123456+00:00", "2026-11-26T10:00:07+00:00", True),
        ("Thu Nov 26 2026", "Fri Dec 4 2026", True),
        ("Thursday, 26 November 2026, 10:00", "Friday, 27 November 2026, 9:01", True),
        ("November 21st", "November 22nd", True),
        ("the 3rd of May", "the 4th of June", True),
        ("26 Nov. 2026", "1 Dec. 2026", True),
        ("Monday", "Tuesday", True),
        ("26.11.2026", "27.11.2026", True),
        ("10:00, customer 4711", "10:01, customer 4711", True),
        ("10:00, customer 4711", "10:01, customer 4712", False),
        ("Julia", "Martin", False),
        ("Julia Roberts", "Martin Roberts", False),
        ("April Roberts", "June Roberts", False),
        ("April Roberts, 12 Elm St", "June Roberts, 12 Elm St", False),
        ("Jan", "Mark", False),
        ("Jan", "May", False),
        ("Augusto", "Declan", False),
        ("Novartis", "Octopus", False),
        ("Deco Ltd", "Marco Ltd", False),
        ("10:00 ACME", "10:01 IBM", False),
        ("12:30 PM ABC", "12:31 PM XYZ", False),
        ("Julia born 1980-01-02", "Martin born 1990-03-04", False),
        ("10.20.30.40", "10.20.31.40", False),
        ("Thu Nov 26 23:59:58 2026", "Fri Nov 27 00:00:01 2026", True),
        ("26 Nov 2026, 10:00:00+0000", "3 Dec 2026, 09:30:00+0000", True),
        ("2026-11-26 10:00 +01:00", "2026-06-26 09:59 +02:00", True),
        ("12/31/2026", "1/1/2027", True),
        ("3 PM", "Monday 4 PM", False),
        ("1234-56-78", "9876-54-32", False),
        ("2041-77-19", "2042-88-20", False),
        ("2026-11-26", "2042-88-20", False),
        ("12:34:56", "65:43:21", False),
        ("12:34:98", "12:34:99", False),
        ("12:34:56:11", "12:34:57:12", False),
        ("12.34.5678", "98.76.5432", False),
        ("12/34/5678", "98/76/5432", False),
        ("06.12.10.11.09", "06.12.11.10.08", False),
        ("12:30 at 5", "12:30 at 9", False),
        ("10:01 5", "10:02 77", False),
        ("10:01 0512", "10:02 0999", False),
        ("12:30 1999 2001", "12:31 2003 1987", False),
        ("2026-01-01 10:00 +49:171", "2026-01-01 10:00 +49:172", False),
        ("1764184001", "1764184999", False),
    ],
)
def test_peoples_names_and_numbers_are_no_clocks(one: str, other: str, is_clock: bool) -> None:
    assert (kind_of(one, other) == "clock") is (kind_of(other, one) == "clock") is is_clock
    peer = Peer(rules=rules_of(CUSTOMER))
    sent(peer, chat(of(one), "hi"))
    got = sent(peer, chat(of(other), "hi"))
    assert (f"Customer: {one}\\n" in got) is is_clock


NUMBERS = [
    ("1234-56-78", "9876-54-32"),
    ("2041-77-19", "2042-88-20"),
    ("12:34:56", "65:43:21"),
    ("12.34.5678", "98.76.5432"),
    ("12/34/5678", "98/76/5432"),
    ("10:01 5", "10:02 77"),
]


@pytest.mark.parametrize(("one", "other"), NUMBERS)
def test_a_number_that_looks_like_a_moment_is_its_customers_own(one: str, other: str) -> None:
    assert not Change("the customer", other, True, kind_of(one, other)).harmless
    assert not Change("the customer", other, True, kind_of(one, other)).shareable
    for first in ("hi", "Another question"):  # an equal beginning without a session name, and another conversation
        peer = Peer(rules=rules_of(CUSTOMER))
        peer.send(chat(of(one), "hi"))
        got = json.dumps(peer.send(chat(of(other), first)))
        assert one not in got
        assert f"Customer: {other}" in got
        assert peer.action in ("reset", "announced")


@pytest.mark.parametrize("mode", [GatewayMode.ERRATUM, GatewayMode.HOIST])
@pytest.mark.parametrize(
    ("more", "share", "apart"),
    [
        ({"share": False}, "declared", True),
        ({}, "none", True),
        ({"share": False}, "none", True),
        ({}, "declared", False),
    ],
)
@pytest.mark.parametrize("first", ["hi", "Another question"])
def test_what_is_declared_to_be_kept_apart_is(
    mode: GatewayMode, more: dict[str, Any], share: str, apart: bool, first: str
) -> None:
    """The gateway takes a date of birth for a clock, although it is a personal value."""
    rules = {"volatile": [{"name": "born", "pattern": "^Born: (.*)$", **more}], "share": share}
    peer = Peer(mode=mode, rules=rules_of(rules))
    one, other = "1980-01-02", "1990-03-04"
    sent(peer, chat(f"Born: {one}\n{RULES}", "hi"))
    got = sent(peer, chat(f"Born: {other}\n{RULES}", first))
    assert other in got
    assert (one not in got) is (apart or (mode is GatewayMode.HOIST and first != "hi"))


def test_learned_clocks_are_kept_apart_too_where_nothing_is_shared() -> None:
    for share, apart in (("none", True), ("declared", False)):
        peer = Peer(rules=rules_of({"share": share}))
        system = "The appointment is at 10:0{}.\n" + RULES
        for minute in range(4):
            said = [text for turn in range(minute) for text in ("Yes.", f"turn {turn}")]
            sent(peer, chat(system.format(minute), "one", *said, session_id="s"))
        assert peer.action == "erratum", "it is learned"
        sent(peer, chat(system.format(7), "hi"))
        got = sent(peer, chat(system.format(8), "hi"))
        assert ("10:07" not in got) is apart
