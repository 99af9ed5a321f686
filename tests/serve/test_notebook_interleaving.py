"""Concurrent requests and edits of one notebook: however they interleave, no old value follows a new one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from programmable_kv.serve.aside import Aside
from programmable_kv.serve.notebooks.asking import Asking
from programmable_kv.serve.notebooks.book import Book, changed, declared
from programmable_kv.serve.notebooks.shelf import BookShelf
from programmable_kv.serve.notebooks.telling import BookRewriter
from programmable_kv.serve.refusal import RefusedError
from programmable_kv.serve.rewriting.conversation import Conversation
from programmable_kv.serve.rewriting.store import ConversationStore
from programmable_kv.serve.rewriting.verdicts import Verdicts
from programmable_kv.serve.rewriting.wording import new_token
from programmable_kv.serve.states import open_state
from serve.rewriting_peers import CHAT, MESSAGES, RESPONSES, RULES

ROUTES = [CHAT, MESSAGES, RESPONSES]
BETWEEN = st.lists(st.sampled_from(["edit", "ask"]), max_size=3)
"""The actions of other clients between two steps of a request."""
REQUESTS = st.lists(
    st.tuples(st.sampled_from(["again", "next"]), st.lists(BETWEEN, max_size=4)), min_size=1, max_size=6
)


class Watched(BookShelf):
    """A shelf that calls `after` whenever a notebook was read."""

    after: Callable[[], None] = staticmethod(lambda: None)

    def get(self, tenant: str, identity: str) -> Book:
        found = super().get(tenant, identity)
        self.after()
        return found


class WatchedStore(ConversationStore):
    """A store that calls `after` whenever conversations were read."""

    after: Callable[[], None] = staticmethod(lambda: None)

    def candidates(self, keys: Any) -> list[Conversation]:
        found = super().candidates(keys)
        self.after()
        return found


class Peer:
    """A notebook with one field. Each edit sets the field to the next number."""

    def __init__(self, route: str) -> None:
        self.route = route
        state = open_state(None, durable=False)
        self.shelf, self.store = Watched(state, most=9), WatchedStore(state, most=99)
        self.rewriter = BookRewriter(self.store, Verdicts(state), "u")
        self.asking = Asking(self.shelf, self.rewriter, Aside(state))
        messages = [{"role": "system", "content": f"{RULES}Status <{{status}}>."}]
        source: dict[str, Any] = {"messages": messages, "fields": {"status": "0"}, "tools": None, "upstream_model": "m"}
        texts, _ = declared(source)
        self.shelf.add(Book("nb_1", "t", 1, source, new_token(), texts, texts))
        self.latest, self.turns = 0, ["0?"]
        self.steps: list[list[str]] = []
        """The actions at the next points between two steps of the running request."""
        self.shelf.after = self.store.after = self.happen

    def happen(self) -> None:
        doing, self.steps = (self.steps[0] if self.steps else []), self.steps[1:]
        left, self.steps = self.steps, []  # nothing interleaves with these actions
        for each in doing:
            if each == "edit":
                self.edit()
            else:
                self.ask()
        self.steps = left

    def edit(self) -> None:
        before = BookShelf.get(self.shelf, "t", "nb_1")
        texts = changed(before, {"status": str(self.latest + 1)})
        assert self.shelf.change(replace(before, texts=texts, version=before.version + 1), before)
        self.latest += 1

    def ask(self) -> str:
        said = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(self.turns)]
        body = {"model": "notebook:nb_1", ("input" if self.route == RESPONSES else "messages"): said}
        known_before = self.latest
        work = self.asking._begun("t", self.route, (), json.dumps(body).encode())
        assert work is not None
        self.rewriter.answered(work, 200)
        told = [
            int(each)
            for each in re.findall(r'Status <(\d+)>|status\\": \\"(\d+)', work.body.decode())
            for each in each
            if each
        ]
        assert told, "the values stand in the text"
        assert told == sorted(set(told)), "an old value is told after a new one"
        assert known_before <= told[-1] <= self.latest, "the value is of the time of the request"
        return str(work.plan.action)


@pytest.mark.parametrize("route", ROUTES)
@given(requests=REQUESTS)
@settings(max_examples=60, deadline=None)
def test_no_old_value_is_told_after_a_new_one(route: str, requests: list[tuple[str, list[list[str]]]]) -> None:
    peer = Peer(route)
    for number, (turn, between) in enumerate(requests):
        if turn == "next":
            peer.turns = [*peer.turns, "Yes.", f"{number}?"]
        peer.steps = list(between)
        peer.ask()


@pytest.mark.parametrize("route", ROUTES)
def test_a_request_that_was_overtaken_tells_the_new_value(route: str) -> None:
    """After the request reads the notebook, an edit follows, and a second try of the request states the new value."""
    peer = Peer(route)
    peer.ask()
    peer.steps = [["edit", "ask"]]
    assert peer.ask() == "replayed", "what the second try told is sent again"


def test_a_notebook_that_is_edited_all_the_time_is_busy() -> None:
    peer = Peer(CHAT)
    peer.store.after = peer.edit
    with pytest.raises(RefusedError, match="in use") as refused:
        peer.ask()
    assert refused.value.refusal.status == 503
    assert len(peer.store) == 0
