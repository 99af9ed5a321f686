"""After any sequence of edits and turns, a reader of the requests knows the latest values, and no sent text changes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from programmable_kv.serve.notebooks.book import Book, changed, declared
from programmable_kv.serve.notebooks.shelf import BookShelf
from programmable_kv.serve.notebooks.telling import BookRewriter
from programmable_kv.serve.refusal import RefusedError
from programmable_kv.serve.rewriting.body import read
from programmable_kv.serve.rewriting.forms import LineRole
from programmable_kv.serve.rewriting.plan import Action
from programmable_kv.serve.rewriting.store import ConversationStore
from programmable_kv.serve.rewriting.verdicts import Verdicts
from programmable_kv.serve.rewriting.wording import new_token
from programmable_kv.serve.states import open_state
from serve.rewriting_peers import CHAT, MESSAGES, RESPONSES, RULES, extends

SYSTEM = RULES + "One: <{one}>. Two: <{two}>. The end."
VALUES = ["a", "b", "a b", "x y z", "7"]
"""Values that are ambiguous side by side: in `{one} {two}`, different values may give the same text."""
STEPS = st.lists(
    st.tuples(st.sampled_from(["edit", "turn", "turn", "other"]), st.sampled_from(["one", "two"]), st.sampled_from(VALUES)),
    min_size=1, max_size=14,
)  # fmt: skip


class Peer:
    """A notebook, and the requests sent for it."""

    def __init__(
        self, route: str, system: str = SYSTEM, rebase_after: int = 64, line_role: LineRole = LineRole.AUTO
    ) -> None:
        self.state = open_state(None, durable=False)
        self.shelf = BookShelf(self.state, most=9)
        self.rewriter = BookRewriter(
            ConversationStore(self.state, most=99),
            Verdicts(self.state),
            "u",
            rebase_after=rebase_after,
            line_role=line_role,
        )
        self.route = route
        source = {
            "messages": [{"role": "system", "content": system}], "fields": {"one": "a", "two": "b"}, "tools": None,
            "template_kwargs": None, "upstream_model": "m",
        }  # fmt: skip
        texts, _ = declared(source)
        self.book = Book("nb_1", "t", 1, source, new_token(), texts, texts)
        self.shelf.add(self.book)

    def edit(self, **values: Any) -> None:
        edited = replace(self.book, version=self.book.version + 1, texts=changed(self.book, values))
        assert self.shelf.change(edited, self.book)
        self.book = edited

    def send(self, turns: list[str]) -> tuple[Action, Any]:
        said = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(turns)]
        body: dict[str, Any] = {"model": "notebook:nb_1", "input" if self.route == RESPONSES else "messages": said}
        asked = read(json.dumps(body).encode())
        assert asked is not None
        work = self.rewriter.ask(self.route, (), asked, self.shelf.get("t", "nb_1"))
        self.rewriter.answered(work, 200)
        if work.warming is not None:
            self.rewriter.warmed(work, done=True)
        return work.plan.action, json.loads(work.body)


def known(body: Any, system: str = SYSTEM) -> dict[str, str]:
    """The values that a reader of a request knows: the values in the text, overridden by each line in order."""
    text = json.dumps(body, ensure_ascii=False)
    head = body.get("system") or body.get("instructions") or body["messages"][0]["content"]
    head = head if isinstance(head, str) else "\n\n".join(block["text"] for block in head)
    pattern = re.escape(system).replace(r"\{one\}", "(?P<one>.*)").replace(r"\{two\}", "(?P<two>.*)")
    found = re.match(pattern, head)
    assert found is not None, head
    values = dict(found.groupdict())
    for line in re.findall(r'\[state [0-9a-f]{16}\] (\\".*?\\")\.', text):
        values |= json.loads("{" + line.replace('\\"', '"').replace('"; "', '", "') + "}")
    return values


@pytest.mark.parametrize("route", [CHAT, MESSAGES, RESPONSES])
@given(steps=STEPS)
@settings(max_examples=40, deadline=None)
def test_a_reader_knows_the_latest_values(route: str, steps: list[tuple[str, str, str]]) -> None:
    peer = Peer(route)
    conversations: list[list[str]] = [["0?"]]
    latest: dict[int, Any] = {}
    for number, (step, name, value) in enumerate(steps):
        if step == "edit":
            peer.edit(**{name: value})
            continue
        if step == "other":
            conversations.append([f"{number} begins"])
        at = (len(value) + number) % len(conversations)
        action, body = peer.send(conversations[at])
        assert known(body) == dict(peer.book.texts)
        if at in latest and action in (Action.ERRATUM, Action.REPLAYED):
            assert extends(body, latest[at])
        assert action in (Action.ERRATUM, Action.REPLAYED), action
        latest[at] = body
        conversations[at] = [*conversations[at], "Yes.", f"{number}?"]


@given(steps=STEPS)
@settings(max_examples=30, deadline=None)
def test_and_also_over_rebases(steps: list[tuple[str, str, str]]) -> None:
    peer = Peer(CHAT, rebase_after=2)
    turns = ["0?"]
    for number, (_, name, value) in enumerate(steps):
        peer.edit(**{name: value})
        _, body = peer.send(turns)
        assert known(body) == dict(peer.book.texts)
        turns = [*turns, "Yes.", f"{number}?"]


def test_values_that_read_alike_are_told_apart() -> None:
    """Both fields change, but the text stays the same, so comparing texts would not show the change."""
    system = RULES + "{one} {two}"
    peer = Peer(CHAT, system)
    peer.edit(one="x y", two="z")
    peer.send(["0?"])
    peer.edit(one="x", two="y z")
    _, body = peer.send(["0?", "Yes.", "1?"])
    assert '"one": "x"; "two": "y z"' in body["messages"][-1]["content"]


def test_a_request_that_outlives_its_notebook_leaves_nothing() -> None:
    peer = Peer(CHAT)
    book = peer.book
    peer.send(["0?"])
    assert peer.shelf.remove(book)
    asked = read(json.dumps({"model": "notebook:nb_1", "messages": [{"role": "user", "content": "late"}]}).encode())
    assert asked is not None
    work = peer.rewriter.ask(CHAT, (), asked, book)
    assert work.plan.action is Action.FORWARDED
    assert json.loads(work.body)["messages"][0]["content"] == SYSTEM.format(one="a", two="b")
    for table in ("conversations", "errata", "notebook_conversations", "gateway_notebooks", "renewals", "sessions"):
        assert peer.state.rows(f"SELECT count(*) FROM {table}") == [(0,)], table


@pytest.mark.parametrize("route", [CHAT, MESSAGES, RESPONSES])
def test_an_empty_value_takes_no_other_text_with_it(route: str) -> None:
    """A system message that consists of one value has no text block while the value is empty."""
    source: dict[str, Any] = {
        "messages": [{"role": "system", "content": "{note}"}, {"role": "system", "content": "POLICY"}],
        "fields": {"note": {"value": "Be brief.", "kind": "block"}}, "tools": None, "template_kwargs": None,
        "upstream_model": "m",
    }  # fmt: skip
    peer = Peer(route)
    peer.shelf.remove(peer.book)
    texts, _ = declared(source)
    peer.book = Book("nb_1", "t", 1, source, new_token(), texts, texts)
    peer.shelf.add(peer.book)
    for value in ("Be brief.", "", "Be kind.", "", "Be kind."):
        if peer.book.texts["note"] != value:
            peer.edit(note=value)
        sent = json.dumps(peer.send([f"with {value!r}?"])[1])
        assert sent.count("POLICY") == 1, sent
        if value:
            assert value in sent


def test_a_request_without_a_turn_is_refused() -> None:
    peer = Peer(CHAT)
    asked = read(json.dumps({"model": "notebook:nb_1", "messages": [{"role": "system", "content": "x"}]}).encode())
    assert asked is not None
    with pytest.raises(RefusedError, match="not a valid conversation"):
        peer.rewriter.ask(CHAT, (), asked, peer.book)
