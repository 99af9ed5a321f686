"""Rebase: the upstream computes a prefix with new values in the background, and the conversation switches to it."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import pytest

from programmable_kv.explain.pieces import Usage
from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.settings import GatewaySettings
from serve import places
from serve.caching_upstream import CachingUpstream
from serve.http_peers import Received, answer, metric, raw_upstream, running, wait_until
from serve.processes import free_port, process
from serve.rewriting_peers import (
    CHAT,
    CLOCK,
    MESSAGES,
    RESPONSES,
    RULES,
    Peer,
    at,
    chat,
    claude,
    codex,
    extends,
    prefix,
)
from serve.test_killed import CLOCK_RULES, Talker

pytestmark = pytest.mark.usefixtures("places")
MAKE = {CHAT: chat, MESSAGES: claude, RESPONSES: codex}


class Talk:
    """One conversation whose clock in the system prompt changes every turn."""

    def __init__(self, peer: Peer, route: str = CHAT, **other: Any) -> None:
        self.peer, self.route, self.other = peer, route, other
        self.said: list[Any] = ["hi"]
        self.minute = 0

    def turn(self, step: int = 1) -> Any:
        got = self.peer.send(MAKE[self.route](at(str(self.minute % 10)), *self.said, **self.other), route=self.route)
        self.minute += step
        self.said += ["Yes.", f"more {self.minute}"]
        return got

    def until_warming(self, most: int = 12) -> Any:
        for _ in range(most):
            got = self.turn()
            if self.peer.works[-1].warming is not None:
                return got
        raise AssertionError("nothing was warmed")


@pytest.mark.parametrize("route", [CHAT, MESSAGES, RESPONSES])
@pytest.mark.parametrize("mode", [GatewayMode.ERRATUM, GatewayMode.HOIST])
def test_after_so_many_lines_a_prefix_without_them_is_warmed_and_switched_to(route: str, mode: GatewayMode) -> None:
    peer = Peer(mode=mode, rebase_after=4)
    talk = Talk(peer, route, **({"max_tokens": 700} if route == CHAT else {}))
    before = talk.until_warming()
    lines = len(peer.works[-1].plan.after.notes)  # type: ignore[union-attr]
    assert lines == 4
    assert peer.action == "erratum", "the request itself keeps the old prefix"
    warm = peer.warmed()
    assert warm.get("stream") in (None, False)
    assert warm.get("max_tokens", warm.get("max_output_tokens")) in (1, 16)
    new = f"Now: 10:0{talk.minute - 1}"
    assert (new in json.dumps(warm)) or mode is GatewayMode.HOIST, "the new value stands in its place"
    assert json.dumps(warm).count("[state ") == (2 if mode is GatewayMode.HOIST else 1), "only the announcement is left"
    after = talk.turn()
    assert (peer.action, peer.why) == ("rebase", "warmed in the background")
    assert extends(after, warm)
    assert not extends(after, before)
    assert len(peer.works[-1].plan.after.notes) == (2 if mode is GatewayMode.HOIST else 1)  # type: ignore[union-attr]
    assert extends(talk.turn(), after), "and goes on from there"
    assert [outcome for _, outcome in peer.rebases] == ["warmed", "switched"]


def test_as_long_as_it_is_not_done_the_old_prefix_is_kept() -> None:
    peer = Peer(rebase_after=3)
    talk = Talk(peer)
    latest = talk.until_warming()
    warming = peer.works[-1]
    for _ in range(4):
        got = talk.turn()
        assert peer.action == "erratum"
        assert extends(got, latest)
        assert peer.works[-1].warming is None, "never two at once"
        latest = got
    peer.rewriter.warmed(warming, done=True)
    got = talk.turn()
    assert peer.action == "rebase"
    assert extends(got, json.loads(warming.warming.body)), "also some turns later"  # type: ignore[union-attr]


def test_a_warm_up_that_fails_changes_nothing_and_is_tried_again_later() -> None:
    peer = Peer(rebase_after=4)
    talk = Talk(peer)
    latest = talk.until_warming()
    peer.warmed(done=False)
    tried = 0
    for _ in range(6):
        got = talk.turn()
        assert (peer.action, extends(got, latest)) == ("erratum", True)
        latest = got
        if peer.works[-1].warming is not None:
            tried += 1
            peer.warmed(done=False)
    assert tried == 1, "not at every turn"
    assert [outcome for _, outcome in peer.rebases] == ["failed", "failed"]


def test_a_request_that_does_not_go_on_with_what_was_warmed_stays_where_it_is() -> None:
    """The client changes a rule while the prefix is being computed."""
    peer = Peer(rebase_after=3)
    talk = Talk(peer)
    talk.until_warming()
    peer.warmed()
    peer.send(chat(at("9", RULES + "Another rule.\n"), *talk.said))
    assert peer.action == "reset"


def test_bound_reasoning_is_never_rebased() -> None:
    peer = Peer(rebase_after=2)
    block = {"type": "thinking", "thinking": "hm", "signature": "s"}
    said: list[Any] = ["hi"]
    for minute in range(5):
        peer.send(claude(at(str(minute)), *said), route=MESSAGES)
        assert peer.works[-1].warming is None
        said += [{"role": "assistant", "content": [block, {"type": "text", "text": "Yes."}]}, f"more {minute}"]
    assert peer.action == "erratum"


@pytest.mark.parametrize(
    "block",
    [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "redacted_thinking", "data": "s"},
        {"type": "web_search_tool_result", "tool_use_id": "1", "content": [{"url": "u", "encrypted_content": "s"}]},
        {"type": "text", "text": "It is so.", "citations": [{"url": "u", "encrypted_index": "s"}]},
    ],
)
def test_what_a_server_takes_back_only_in_its_place_is_not_rebased(block: Any) -> None:
    peer, said = Peer(rebase_after=2), ["hi", {"role": "assistant", "content": [block]}, "so"]
    for minute in range(5):
        peer.send(claude(at(str(minute)), *said), route=MESSAGES)
        assert peer.works[-1].warming is None
    assert peer.action == "erratum"


@pytest.mark.parametrize(
    "block",
    [
        {"type": "text", "text": "Is my disk encrypted? The signature, encrypted_content."},
        {"type": "tool_result", "tool_use_id": "1", "content": '{"encrypted_content": "x", "signature": 1}'},
        {"type": "image", "source": {"type": "url", "url": "http://encrypted/redacted_thinking"}},
    ],
)
def test_words_of_a_user_are_no_bound_reasoning(block: Any) -> None:
    call = {"type": "tool_use", "id": "1", "name": "encrypted", "input": {"signature": "encrypted_content"}}
    peer, said = (
        Peer(rebase_after=2),
        ["hi", {"role": "assistant", "content": [call]}, {"role": "user", "content": [block]}],
    )
    if block["type"] != "tool_result":
        said[1] = "Yes."
    for minute in range(3):
        peer.send(claude(at(str(minute)), *said), route=MESSAGES)
    assert peer.works[-1].warming is not None


HOSTED: list[tuple[str, dict[str, Any]]] = [
    (RESPONSES, {"tools": [{"type": "function", "name": "f"}, {"type": "mcp", "server_url": "http://x"}]}),
    (RESPONSES, {"tools": [{"type": "web_search"}]}),
    (RESPONSES, {"tools": [{"type": "code_interpreter", "container": {"type": "auto"}}]}),
    (RESPONSES, {"tools": "unheard of"}),
    (RESPONSES, {"prompt": {"id": "p"}}),
    (CHAT, {"web_search_options": {}}),
    (CHAT, {"tools": [{"type": "web_search"}]}),
    (CHAT, {"plugins": [{"id": "web"}]}),
    (MESSAGES, {"tools": [{"name": "web_search", "type": "web_search_20250305"}]}),
    (MESSAGES, {"mcp_servers": [{"type": "url", "url": "http://x"}]}),
    (MESSAGES, {"container": "c"}),
]
OWN: list[tuple[str, dict[str, Any]]] = [
    (RESPONSES, {"tools": [{"type": "function", "name": "f"}, {"type": "custom", "name": "g"}], "prompt": None}),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "f"}}], "web_search_options": None}),
    (MESSAGES, {"tools": [{"name": "f", "input_schema": {}}, {"type": "custom", "name": "g"}], "mcp_servers": []}),
    (CHAT, {"tools": None}),
    (CHAT, {"tools": []}),
]


@pytest.mark.parametrize(
    ("route", "more", "hosted"), [*((*each, True) for each in HOSTED), *((*each, False) for each in OWN)]
)
def test_nothing_is_computed_in_the_background_where_the_server_could_act(
    route: str, more: dict[str, Any], hosted: bool
) -> None:
    peer = Peer(rebase_after=2)
    talk = Talk(peer, route, **more)
    for _ in range(5):
        talk.turn()
        if peer.works[-1].warming is not None:
            break
    assert (peer.action, peer.works[-1].warming is None) == ("erratum", hosted)


def test_a_model_that_must_think_first_is_not_asked_for_one_token() -> None:
    peer = Peer(rebase_after=2)
    talk = Talk(peer, MESSAGES, thinking={"type": "enabled", "budget_tokens": 2000})
    for _ in range(4):
        talk.turn()
        assert peer.works[-1].warming is None


@pytest.mark.parametrize("route", [CHAT, MESSAGES, RESPONSES])
def test_a_client_that_compacts_keeps_its_system_prompt_and_is_rebased(route: str) -> None:
    peer = Peer()
    said = ["hi", "Yes.", "so", "Yes.", "and"]
    tools = [{"type": "function", "name": name} for name in "ab"]
    first = peer.send(MAKE[route](at("1"), *said[:1], tools=tools), session="s", route=route)
    for minute, turns in ((2, 3), (3, 5)):
        peer.send(MAKE[route](at(str(minute)), *said[:turns], tools=tools), session="s", route=route)
    summary = ["A summary of what was said."]
    got = peer.send(MAKE[route](at("4"), *summary, tools=tools[::-1]), session="s", route=route)
    assert (peer.action, peer.why) == ("rebase", "the turns are new in this session")
    system = 2 if route != CHAT else 1
    assert prefix(got)[: system + 1] == prefix(first)[: system + 1], "the system prompt is read from the cache"
    assert '"the time": "10:04"' in peer.line
    warm = peer.warmed()
    assert "Now: 10:04" in json.dumps(warm)
    more = peer.send(MAKE[route](at("5"), *summary, "Yes.", "go on", tools=tools), session="s", route=route)
    assert (peer.action, peer.why) == ("rebase", "warmed in the background")
    assert extends(more, warm)


def test_a_new_conversation_of_a_session_with_another_system_prompt_is_one_of_its_own() -> None:
    peer = Peer()
    peer.send(chat(at("1"), "hi"), session="s")
    peer.send(chat(at("2", RULES + "Another rule.\n"), "another"), session="s")
    assert peer.action == "announced"
    peer.send(chat(at("3"), "a third"), session="other")
    assert peer.action == "shared", "another session has its own channel, behind the same system prompt"
    tokens = {work.plan.after.token for work in peer.works if work.plan.after is not None}
    assert len(tokens) == 3


def test_two_conversations_of_one_session_do_not_end_each_other() -> None:
    peer = Peer()
    one = peer.send(chat(at("1"), "one"), session="s")
    two = peer.send(chat(at("2"), "two"), session="s")
    assert peer.action == "rebase"
    later = peer.send(chat(at("3"), "one", "Yes.", "so"), session="s")
    assert extends(later, one)
    assert extends(peer.send(chat(at("2"), "two", "Yes.", "so"), session="s"), two)


@pytest.mark.parametrize("state", ["warming", "ready", "failed"])
def test_a_restart_keeps_what_was_warmed_and_forgets_what_was_being_computed(tmp_path: Path, state: str) -> None:
    peer = Peer(path=tmp_path / "state", rebase_after=3)
    talk = Talk(peer)
    latest = talk.until_warming()
    warm = json.loads(peer.works[-1].warming.body)  # type: ignore[union-attr]
    if state != "warming":
        peer.warmed(done=state == "ready")
    elif not peer.state.alone:  # until the time is over, another gateway may be computing the prefix
        with peer.state.write() as run:
            run.execute("UPDATE renewals SET until = epoch() - 1")
    peer.state.close()
    talk.peer = peer = Peer(path=tmp_path / "state", rebase_after=3)
    got = talk.turn()
    if state == "ready":
        assert peer.action == "rebase"
        assert extends(got, warm)
    else:
        assert peer.action == "erratum"
        assert extends(got, latest)
        assert (peer.works[-1].warming is not None) == (state == "warming"), "a lost one is begun again"


def gateway(url: str, **more: Any) -> GatewaySettings:
    state = places.now.at(more.pop("state", None))
    return GatewaySettings(url, port=0, mode=GatewayMode.ERRATUM, rules=CLOCK, rebase_after=4, state=state, **more)


WARMED = f'pkv_rebases_total{{outcome="warmed",route="{CHAT}"}}'


def is_warm_up(body: Any) -> bool:
    return body.get("max_tokens") == 1


def ask(url: str, said: list[Any], minute: int) -> httpx2.Response:
    body = {"model": "m", "messages": [{"role": "system", "content": at(str(minute % 10))}, *said], "max_tokens": 50}
    got = httpx2.post(f"{url}{CHAT}", json=body, headers={"x-session-id": "s"}, timeout=30)
    said += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": f"more {len(said)}"}]
    return got


@pytest.mark.parametrize("salts", [False, True])
def test_no_request_pays_for_the_new_prefix(salts: bool, tmp_path: Path) -> None:
    upstream = CachingUpstream()
    with raw_upstream(upstream) as server, running(gateway(server.url, salts=salts, state=tmp_path / "s")) as front:
        said: list[Any] = [{"role": "user", "content": "hi"}]
        actions: list[str] = []
        begun = 0
        for turn in range(16):
            got = ask(front.url, said, turn)
            actions.append(got.headers["x-pkv-action"])
            if got.headers.get("x-pkv-rebase") == "warming":
                begun += 1
                wait_until(lambda begun=begun: metric(front.url, WARMED) == begun)  # type: ignore[misc]
        switches = [n for n, action in enumerate(actions) if action == "rebase; why=warmed in the background"]
        assert len(switches) >= 2
        assert {action.partition(";")[0] for action in actions[1:]} == {"erratum", "rebase"}
        assert metric(front.url, f'pkv_rebases_total{{outcome="switched",route="{CHAT}"}}') == len(switches)
        assert metric(front.url, f'pkv_rewriting_lost_tokens_estimate_total{{route="{CHAT}"}}') > 0, "it is counted"
        found = list(zip(upstream.bodies, upstream.counts, strict=True))
        asked = [(body, count) for body, count in found if not is_warm_up(body)]
        for body, (total, cached) in asked[1:]:
            assert total - cached < 40, (
                f"{total - cached} of {total} tokens were computed while a client waited: {body}"
            )
        warmed = [count for body, count in found if is_warm_up(body)]
        assert len(warmed) in (len(switches), len(switches) + 1)
        assert all(total - cached > 60 for total, cached in warmed), "those were computed in the background"
        if salts:
            assert len({body["cache_salt"] for body in upstream.bodies}) == 1, "with the same salt"
        broken = [
            n for n, (one, other) in enumerate(pairwise([body for body, _ in asked]), 1) if not extends(other, one)
        ]
        assert broken == switches, "the old prefix is kept up to the switch, and the new one after it"


@pytest.mark.parametrize("fault", ["refused", "cut"])
def test_a_warm_up_that_the_upstream_does_not_answer_leaves_the_session_intact(fault: str) -> None:
    upstream = CachingUpstream()

    async def script(request: Received) -> AsyncIterator[bytes]:
        if is_warm_up(request.json):
            yield answer(b"{}", "500 Internal Server Error") if fault == "refused" else b"HTTP/1.1 200 OK\r\ncontent-le"
            return
        async for part in upstream(request):
            yield part

    with raw_upstream(script) as server, running(gateway(server.url)) as front:
        said: list[Any] = [{"role": "user", "content": "hi"}]
        for turn in range(9):
            got = ask(front.url, said, turn)
            assert got.status_code == 200
            if got.headers.get("x-pkv-rebase"):
                failed = f'pkv_rebases_total{{outcome="failed",route="{CHAT}"}}'
                wait_until(lambda failed=failed: metric(front.url, failed) >= 1)  # type: ignore[misc]
        assert all(extends(later, earlier) for earlier, later in pairwise(upstream.bodies))
        assert got.headers["x-pkv-action"] == "erratum"


def test_an_upstream_that_is_lost_while_it_warms_leaves_the_session_intact(tmp_path: Path) -> None:
    upstream, hold = CachingUpstream(), threading.Event()

    async def script(request: Received) -> AsyncIterator[bytes]:
        if is_warm_up(request.json) and not hold.is_set():
            hold.set()
            return  # the connection closes before an answer
        async for part in upstream(request):
            yield part

    with raw_upstream(script) as server, running(gateway(server.url, state=tmp_path / "s")) as front:
        said: list[Any] = [{"role": "user", "content": "hi"}]
        for turn in range(7):
            assert ask(front.url, said, turn).status_code == 200
        assert hold.is_set()
        assert all(extends(later, earlier) for earlier, later in pairwise(upstream.bodies))


@pytest.mark.slow
def test_a_gateway_that_is_killed_while_it_rebases_loses_no_line(tmp_path: Path) -> None:
    """Over three kills and many rebases, each request extends the one before it, or the warm-up that it switches to."""
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps(CLOCK_RULES))
    upstream, port, stop = CachingUpstream(), free_port(), threading.Event()
    with raw_upstream(upstream) as server:
        words = [
            "-m", "programmable_kv", "serve", "--upstream", server.url, "--port", str(port), "--mode", "erratum",
            "--line-role", "system",
            "--volatile", str(rules), "--state", places.now.option(tmp_path / "state"), "--rebase-after", "2",
        ]  # fmt: skip
        talkers = [Talker(port, number, stop) for number in range(3)]
        for kill in range(4):
            with process(*words, port=port) as front:
                if kill == 0:
                    for talker in talkers:
                        talker.start()
                before = [len(talker.actions) for talker in talkers]
                wait_until(
                    lambda before=before: all(len(t.actions) > n + 6 for t, n in zip(talkers, before, strict=True)), 90
                )  # type: ignore[misc]
                if kill < 3:
                    front.send_signal(signal.SIGKILL)
                    continue
                stop.set()
                for talker in talkers:
                    talker.join(20)
    for talker in talkers:
        mine = [body for body in upstream.bodies if body["messages"][1]["content"].startswith(talker.name_)]
        warmed = [body for body in mine if is_warm_up(body)]
        asked = [body for body in mine if not is_warm_up(body)]
        actions = {action.partition(";")[0] for action in talker.actions[1:]}
        assert actions <= {"erratum", "replayed", "rebase"}, sorted(set(talker.actions))
        assert "rebase" in actions
        for earlier, later in pairwise(asked):
            assert extends(later, earlier) or any(extends(later, each) for each in warmed), (
                "a line that was sent was lost"
            )


def test_a_rebase_that_costs_more_than_lines_save_switches_the_mode_off() -> None:
    """The cost of a rebase counts against the gain. It does not decide before requests of clients are counted."""
    peer = Peer()
    talk = Talk(peer)
    talk.turn()
    for _ in range(9):
        peer.rewriter.judge.spent("t", CHAT, "m", 5000)
    talk.turn()
    assert peer.action == "erratum", "nothing was counted of clients' own requests yet"
    said = [*talk.said]
    for minute in range(3, 12):
        body = chat(at(str(minute % 10)), *said)
        peer.send(body, usage=Usage(1000, 900, 0, True))
        said += ["Yes.", f"more {minute}"]
    assert peer.why == "rewriting is switched off here for now, because it did not pay"
