"""Random clients: each request repeats what was sent before, or the answer says that it does not. Nothing is lost."""

from __future__ import annotations

import json
import sqlite3
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from programmable_kv.serve.address import DatabaseAddress
from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.rewriting.body import read
from programmable_kv.serve.rewriting.conversation import Form
from programmable_kv.serve.rewriting.rewriter import Rewriting
from programmable_kv.serve.rewriting.rules import rules_of
from programmable_kv.serve.rewriting.wording import quoted
from serve.rewriting_peers import CHAT, MESSAGES, RESPONSES, RULES, Peer, chat, claude, codex, extends, prefix

if TYPE_CHECKING:
    from programmable_kv.bench.database_server import Database

BROKEN = ("reset", "rebase")
NEW = ("forwarded", "announced", "hoisted", "shared")
RULESET = {"volatile": [{"name": "time", "pattern": "^Now: (.*)$"}, {"name": "left", "pattern": "<left>(.*?)</left>"}]}


class Client:
    """A client with its conversation, in one of the protocols."""

    def __init__(self, route: str) -> None:
        self.route = route
        self.day = 1
        self.clock, self.left, self.extra, self.number = 0, 9, "", 0
        self.said: list[Any] = ["hi"]
        self.tools = [{"name": name, "input_schema": {"type": "object"}} for name in "abc"]

    def step(self, step: str) -> None:
        self.number += 1
        if step == "clock":
            self.clock += 1
        elif step == "back":
            self.clock = max(0, self.clock - 1)
        elif step == "left":
            self.left -= 1
        elif step == "turn":
            self.said += [f"answer {self.number}", f"question {self.number} <left>{self.left}</left>"]
        elif step == "tools" and self.route == CHAT:
            call = {"id": f"c{self.number}", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            self.said.append({"role": "assistant", "content": None, "tool_calls": [call]})
            self.said.append({"role": "tool", "tool_call_id": f"c{self.number}", "content": "found"})
        elif step == "tools" and self.route == RESPONSES:
            names = [f"c{self.number}a", f"c{self.number}b"]
            self.said += [{"type": "function_call", "call_id": name, "name": "f", "arguments": "{}"} for name in names]
            self.said += [{"type": "function_call_output", "call_id": name, "output": "found"} for name in names]
        elif step == "tools":
            use = {"type": "tool_use", "id": f"c{self.number}", "name": "f", "input": {}}
            found = {"type": "tool_result", "tool_use_id": f"c{self.number}", "content": "found"}
            self.said += [{"role": "assistant", "content": [use]}, {"role": "user", "content": [found]}]
        elif step == "reorder":
            self.tools = [*self.tools[1:], self.tools[0]]
        elif step == "day":
            self.day += 1
        elif step == "other":
            self.extra += "Another rule.\n"
        elif step == "edit":
            self.said[-1] = f"edited {self.number}" if isinstance(self.said[-1], str) else self.said[-1]
        elif step == "trim" and len(self.said) > 2:
            self.said = self.said[:-2]

    def body(self) -> dict[str, Any]:
        said = [
            dict(each) if isinstance(each, dict) else {"role": self._role(n), "content": each}
            for n, each in enumerate(self.said)
        ]
        said[0]["content"] = f"hi <left>{self.left}</left>"
        make = {CHAT: chat, MESSAGES: claude, RESPONSES: codex}[self.route]
        return make(
            f"Now: 10:{self.clock:02}:00\n{RULES}{self.extra}",
            *said,
            tools=self.tools,
            chat_template_kwargs=self.template,
        )

    @property
    def template(self) -> dict[str, Any]:
        return {"date_string": f"{self.day} Nov 2026", "thinking": False}

    def _role(self, at: int) -> str:
        return "assistant" if str(self.said[at]).startswith("answer") else "user"


STEPS = st.lists(
    st.sampled_from(
        [
            "clock",
            "clock",
            "back",
            "left",
            "turn",
            "turn",
            "tools",
            "reorder",
            "retry",
            "day",
            "other",
            "edit",
            "trim",
            "warmed",
            "lost",
        ],
    ),
    min_size=1,
    max_size=18,
)


@pytest.mark.parametrize("route", [CHAT, MESSAGES, RESPONSES])
@pytest.mark.parametrize("mode", [GatewayMode.ERRATUM, GatewayMode.HOIST])
@settings(max_examples=60, deadline=None)
@given(
    steps=STEPS,
    session=st.sampled_from(["", "s"]),
    refused=st.sets(st.sampled_from(list(Form)), max_size=2),
    rebase_after=st.sampled_from([1, 2, 64]),
)
def test_a_request_extends_the_one_before_or_says_that_it_does_not(
    route: str, mode: GatewayMode, steps: list[str], session: str, refused: set[Form], rebase_after: int
) -> None:
    _check(route, mode, steps, session, refused, rebase_after)


@pytest.mark.xdist_group("postgres")
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS, session=st.sampled_from(["", "s"]), rebase_after=st.sampled_from([1, 64]))
def test_so_does_one_of_two_gateways_on_a_database(
    database: Database, steps: list[str], session: str, rebase_after: int
) -> None:
    _check(CHAT, GatewayMode.ERRATUM, steps, session, set(), rebase_after, database.new())


def _check(
    route: str, mode: GatewayMode, steps: list[str], session: str, refused: set[Form], rebase_after: int,
    place: DatabaseAddress | None = None,
) -> None:  # fmt: skip
    """Check a random conversation. If `place` is given, two gateways that share it take turns."""
    peer = Peer(mode=mode, rules=rules_of(RULESET), rebase_after=rebase_after, place=place)
    other = Peer(mode=mode, rules=rules_of(RULESET), rebase_after=rebase_after, place=place) if place else peer
    for form in refused:
        peer.rewriter.accepted.decide(route, "m", form, "refused")
    client = Client(route)
    latest: dict[str, Any] = {}
    """the gateway's conversation -> its latest body; without a session name, a client may have several conversations"""
    previous: Any = None
    warming: dict[str, Rewriting] = {}
    """conversation -> the request whose prefix is being warmed"""
    for step in ["first", *steps]:
        if step in ("warmed", "lost"):
            for work in warming.values():
                peer.rewriter.warmed(work, done=step == "warmed")
                latest[_warm(work).identity] = json.loads(work.warming.body) if work.warming else None
            warming.clear()
            continue
        client.step(step)
        body = client.body()
        peer, other = other, peer
        got = peer.send(body, session=session, route=route)
        after = peer.works[-1].plan.after
        assert after is not None
        if peer.works[-1].warming is not None:
            assert after.identity not in warming, "never two at once"
            warming[after.identity] = peer.works[-1]
        if peer.action == "rebase" and peer.works[-1].plan.before is not None:
            assert _goes_on(got, latest[after.identity]), "it switches to what was computed"
        elif peer.action in ("replayed", "erratum"):
            assert _goes_on(got, latest[after.identity])
            assert not session or step in ("edit", "trim") or _goes_on(got, previous)
        else:
            assert peer.action in (*BROKEN, *NEW)
            assert previous is None or peer.action in BROKEN or step in ("edit", "trim") or _goes_on(got, previous)
        latest[after.identity] = previous = got
        _check_meaning(peer, body, got)
        _check_calls(got)
    for each in {id(peer): peer, id(other): other}.values():
        each.state.close()


def _warm(work: Rewriting) -> Any:
    assert work.warming is not None
    return work.warming.conversation


def _notes(peer: Peer) -> tuple[Any, ...]:
    after = peer.works[-1].plan.after
    return after.notes if after is not None else ()


def _goes_on(later: Any, earlier: Any) -> bool:
    """Whether a request extends an earlier one. The earlier one's last message may be longer, by an inline line."""
    one, other = prefix(earlier), prefix(later)
    return extends(later, earlier) or (
        other[: len(one) - 1] == one[:-1] and str(other[len(one) - 1]).startswith(str(one[-1]))
    )


def _check_meaning(peer: Peer, body: Any, got: Any) -> None:
    """Check that a reader of the text and then of its lines knows the client's values, and that the turns remain."""
    plan = peer.works[-1].plan
    text = json.dumps(got)
    turns = body.get("messages") or body["input"]
    wanted = body.get("system") or body.get("instructions") or turns[0]["content"]
    time = wanted.partition("Now: ")[2].partition("\n")[0]
    told = text.rpartition(f"{json.dumps(quoted('time'))[1:-1]}: ")[2] if "[state" in text and plan.after else ""
    lines = [note.line for note in _notes(peer) if '"time"' in note.line]
    if lines:
        assert f'"time": "{time}"' in lines[-1], told
    else:
        assert f"Now: {time}" in text
    for message in turns[-2:]:
        content = message.get("content")
        if isinstance(content, str) and message["role"] != "system" and "<left>" not in content:
            assert json.dumps(content)[1:-1] in text


def _check_calls(got: Any) -> None:
    """Check that nothing is inserted between a call and its result."""
    messages = got.get("messages") or got["input"]
    for message, behind in pairwise(messages):
        if message.get("type") == "function_call":
            assert "[state" not in json.dumps(behind)
            continue
        content = message.get("content")
        calls = message.get("tool_calls") or (isinstance(content, list) and content[0].get("type") == "tool_use")
        if calls:
            assert behind["role"] == "tool" or behind["content"][0]["type"] == "tool_result"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    members=st.dictionaries(st.text(max_size=6), JSON, min_size=1, max_size=4),
    messages=st.lists(JSON, max_size=4),
    indent=st.sampled_from([None, 0, 1, "\t"]),
    ascii_only=st.booleans(),
)
def test_the_places_of_a_body_are_right(
    members: dict[str, Any], messages: list[Any], indent: Any, ascii_only: bool
) -> None:
    given_body = {**members, "messages": messages}
    text = json.dumps(given_body, indent=indent, ensure_ascii=ascii_only)
    body = read(text.encode("utf-8", "surrogatepass"))
    if body is None:
        assert any(0xD800 <= ord(sign) < 0xE000 for sign in text), "only text that is no UTF-8 is not read"
        return
    assert body.data == given_body
    assert body.spliced([]) == text.encode()
    for name, spot in body.spots.items():
        assert json.loads(text[spot.start : spot.stop]) == given_body[name]
    for value, spot in zip(messages, body.items["messages"], strict=True):
        assert json.loads(text[spot.start : spot.stop]) == value


@settings(max_examples=300, deadline=None)
@given(value=st.text(max_size=60))
def test_any_value_is_one_line_and_nothing_of_it_is_lost(value: str) -> None:
    said = quoted(value)
    assert json.loads(said) == value
    assert len(said.splitlines()) == 1
    assert not {"<", "["} & set(said)
    said.encode()


def test_lines_are_never_changed_in_the_file(tmp_path: Path) -> None:
    peer = Peer(path=tmp_path / "state")
    peer.send(chat(f"Now: 10:01\n{RULES}", "hi"))
    peer.send(chat(f"Now: 10:02\n{RULES}", "hi", "Yes.", "so"))
    assert peer.action == "erratum"
    with pytest.raises(sqlite3.IntegrityError, match="never changed"), peer.state.write() as run:
        run.execute("UPDATE errata SET line = 'another'")
    assert len(peer.state.rows("SELECT * FROM errata")) == 1


def test_what_was_silent_for_a_week_is_forgotten(tmp_path: Path) -> None:
    peer = Peer(path=tmp_path / "state")
    for name in ("old", "new"):
        peer.send(chat(f"Now: 10:01\n{RULES}", name))
        peer.send(chat(f"Now: 10:02\n{RULES}", name, "Yes.", "so"))
    old = peer.works[1].plan.after
    assert old is not None
    with peer.state.write() as run:
        run.execute("UPDATE conversations SET used = used - 700000 WHERE identity = ?", (old.identity,))
    peer.state.close()
    again = Peer(path=tmp_path / "state")
    assert len(again.store) == 1
    assert len(again.state.rows("SELECT * FROM errata")) == 1


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    said = ["hi"]
    sent: list[Any] = []
    for turn in range(6):
        peer = Peer(path=tmp_path / "state")
        sent.append(peer.send(chat(f"Now: 10:0{turn}\n{RULES}", *said)))
        assert peer.action == ("erratum" if turn else "announced")
        peer.state.close()
        said += ["Yes.", f"more {turn}"]
    assert all(extends(later, earlier) for earlier, later in pairwise(sent))
