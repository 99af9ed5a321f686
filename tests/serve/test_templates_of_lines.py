"""Finds changing lines by their constant parts: with the results of a regular expression, and fast."""

from __future__ import annotations

import json
import re
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from programmable_kv.serve.rewriting.changes import may_hold
from programmable_kv.serve.rewriting.rules import rules_of
from serve.rewriting_peers import RULES, Peer, chat

PARTS = st.lists(st.text("ab.\r é", max_size=3), min_size=2, max_size=6)
TEXT = st.text("ab.\r é\n", max_size=14)


@settings(max_examples=1500, deadline=None)
@given(
    text=TEXT,
    templates=st.lists(PARTS, max_size=3),
    between=st.lists(st.text("ab. ", min_size=1, max_size=2), min_size=6),
)
def test_it_finds_what_a_regular_expression_finds(text: str, templates: list[list[str]], between: list[str]) -> None:
    filled = [part + value for parts in templates[:1] for part, value in zip(parts, between, strict=False)]
    for given_text in (
        text,
        f"{text}\n{''.join(filled)}",
        "".join(filled[:-1]) + (templates[0][-1] if templates else ""),
    ):
        forms = [re.compile(".+?".join(map(re.escape, parts))) for parts in templates]
        found = any(form.fullmatch(line) for line in given_text.split("\n") for form in forms)
        assert may_hold(given_text, [json.dumps(parts) for parts in templates]) is found


def test_a_text_full_of_a_templates_parts_takes_no_long_time() -> None:
    """One client of a tenant teaches the line, and any other client may send the text."""
    template = json.dumps(["a ", *[" q "] * 7, " z"])
    started = time.perf_counter()
    assert not may_hold("a " + " q " * 100_000 + " c", [template])
    assert not may_hold("a " + " q " * 6 + " y" * 100_000 + " z", [template])
    assert may_hold("a " + " q " * 100_000 + " c z", [template])
    assert time.perf_counter() - started < 1


def test_a_request_does_not_wait_for_it() -> None:
    peer, said = Peer(rules=rules_of({})), ["hi"]
    for minute in (1, 11, 21):
        line = "a " + " q ".join(f"{10 + at}:{minute + at:02}" for at in range(7)) + " z"
        peer.send(chat(f"You help.\n{line}\n{RULES}", *said), session="s")
        said += ["Yes.", f"more {minute}"]
    assert peer.verdicts.learned("t\n/v1/chat/completions"), "it is learned"
    started = time.perf_counter()
    peer.send(chat(f"You help.\na {' q ' * 3000} c\n{RULES}", "another"))
    assert time.perf_counter() - started < 1
    assert peer.action == "forwarded"
