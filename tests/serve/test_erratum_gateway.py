"""Mode `erratum` over sockets: official clients, a gateway, and an upstream with a prefix cache."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from programmable_kv.errors import InvalidArgumentError
from programmable_kv.serve.app import gateway_app
from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.rewriting.forms import LineRole
from programmable_kv.serve.rewriting.rules import rules_of
from programmable_kv.serve.rewriting.store import ConversationStore
from programmable_kv.serve.rewriting.verdicts import Verdicts
from programmable_kv.serve.settings import GatewaySettings
from serve import places
from serve.caching_upstream import CachingUpstream
from serve.http_peers import EVENTS_HEAD, Received, Running, metric, raw_upstream, running, wait_until
from serve.rewriting_peers import CLOCK, RULES, at, extends

pytestmark = pytest.mark.usefixtures("places")
CHAT = "/v1/chat/completions"


def settings(url: str, mode: GatewayMode = GatewayMode.ERRATUM, **more: Any) -> GatewaySettings:
    state = places.now.at(more.pop("state", None))
    return GatewaySettings(url, port=0, mode=mode, rules=more.pop("rules", CLOCK), state=state, **more)


def ask_openai(gateway: Running, system: str, said: list[Any]) -> str | None:
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="k", max_retries=0)
    messages: Any = [{"role": "system", "content": system}, *said]
    return client.chat.completions.create(model="m", messages=messages).choices[0].message.content


def ask_stream(gateway: Running, system: str, said: list[Any]) -> str | None:
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="k", max_retries=0)
    messages: Any = [{"role": "system", "content": system}, *said]
    parts = client.chat.completions.create(
        model="m", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    return "".join(part.choices[0].delta.content or "" for part in parts if part.choices)


def ask_anthropic(gateway: Running, system: str, said: list[Any]) -> str | None:
    client = anthropic.Anthropic(base_url=gateway.url, api_key="k", max_retries=0)
    return client.messages.create(model="m", max_tokens=5, system=system, messages=said).content[0].text  # type: ignore[union-attr]


def ask_responses(gateway: Running, system: str, said: list[Any]) -> str | None:
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="k", max_retries=0)
    return client.responses.create(model="m", instructions=system, input=said).output_text


Ask = Callable[[Running, str, list[Any]], str | None]


def talk(gateway: Running, ask: Ask, turns: int, first: str = "hi") -> None:
    """Have a conversation whose clock in the system prompt changes every turn."""
    said: list[Any] = [{"role": "user", "content": first}]
    for turn in range(turns):
        got = ask(gateway, at(str(turn)), said)
        assert got == "Yes."
        said += [{"role": "assistant", "content": got}, {"role": "user", "content": f"more {turn}"}]


def rewriting(gateway: Running) -> Any:
    return httpx2.get(f"{gateway.url}/pkv/report").json()["rewriting"]


def settled(gateway: Running, requests: int) -> None:
    wait_until(lambda: httpx2.get(f"{gateway.url}/pkv/report").json()["observer"]["observed"] == requests)


@pytest.mark.parametrize("ask", [ask_openai, ask_stream, ask_anthropic, ask_responses])
def test_a_moving_clock_no_longer_breaks_the_prefix(ask: Ask) -> None:
    cached = {}
    for mode in (GatewayMode.OBSERVE, GatewayMode.ERRATUM):
        upstream = CachingUpstream()
        with raw_upstream(upstream) as server, running(settings(server.url, mode)) as gateway:
            talk(gateway, ask, 9)
            settled(gateway, 9)
            [route] = httpx2.get(f"{gateway.url}/pkv/report").json()["routes"].values()
            cached[mode] = route["cached_tokens"] / route["input_tokens"]
            if mode is GatewayMode.ERRATUM:
                assert all(extends(later, earlier) for earlier, later in pairwise(upstream.bodies))
                assert (route["hit"], route["miss"]) == (8, 0)
                [found] = rewriting(gateway)["routes"]
                assert found["actions"] == {"announced": 1, "erratum": 8}
                assert found["counted_by_upstream"] == 8
                assert found["gained_tokens_estimate"] > 0
                name = found["route"]
                assert metric(gateway.url, f'pkv_actions_total{{action="erratum",route="{name}"}}') == 8
                assert metric(gateway.url, f'pkv_gained_tokens_estimate_total{{route="{name}"}}') > 0
    assert cached[GatewayMode.OBSERVE] < 0.1
    assert cached[GatewayMode.ERRATUM] > 0.8


@pytest.mark.parametrize("ask", [ask_openai, ask_stream, ask_anthropic, ask_responses])
def test_conversations_of_one_turn_find_the_policy_of_the_first_one(ask: Ask) -> None:
    cached = {}
    for sharing in ("none", "declared"):
        rules = rules_of({"volatile": [{"name": "the time", "pattern": "^Now: (.*)$"}], "share": sharing})
        upstream = CachingUpstream()
        with raw_upstream(upstream) as server, running(settings(server.url, rules=rules)) as gateway:
            for number in range(6):
                assert ask(gateway, at(str(number)), [{"role": "user", "content": f"question {number}"}]) == "Yes."
            settled(gateway, 6)
            cached[sharing] = [read / total for total, read in upstream.counts[1:]]
            if sharing == "declared":
                [found] = rewriting(gateway)["routes"]
                assert found["actions"] == {"announced": 1, "shared": 5}
                assert found["counted_by_upstream"] == 5
                assert found["gained_tokens_estimate"] > 0
    assert max(cached["none"]) < 0.1
    assert min(cached["declared"]) > 0.8


def test_the_answer_says_what_was_done() -> None:
    with raw_upstream(CachingUpstream()) as server, running(settings(server.url)) as gateway:
        seen = []
        said = [{"role": "user", "content": "hi"}]
        for minute in ("1", "2", "2"):
            body = {"model": "m", "messages": [{"role": "system", "content": at(minute)}, *said]}
            got = httpx2.post(f"{gateway.url}{CHAT}", json=body)
            seen.append(
                (got.headers["x-pkv-mode"], got.headers["x-pkv-action"], int(got.headers["x-pkv-saved-bytes"]) > 0)
            )
            assert float(got.headers["x-pkv-own-ms"]) >= 0
            said += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "so"}]
        assert seen == [("erratum", "announced", False), ("erratum", "erratum", True), ("erratum", "replayed", True)]
        got = httpx2.get(f"{gateway.url}/v1/models")
        assert "x-pkv-action" not in got.headers


def has_late(role: str) -> Callable[[Any], bool]:
    return lambda body: any(m["role"] == role and "[state" in m["content"] for m in body["messages"][1:])


def has_line(body: Any) -> bool:
    return "[state" in json.dumps(body["messages"][1:])


@pytest.mark.parametrize("status", ["400 Bad Request", "422 Unprocessable Entity", "500 Internal Server Error"])
def test_a_role_that_is_refused_is_found_out_once(status: str) -> None:
    upstream = CachingUpstream(refuses=has_late("system"), status=status)
    with raw_upstream(upstream) as server, running(settings(server.url, line_role=LineRole.SYSTEM)) as gateway:
        talk(gateway, ask_openai, 4)
        assert upstream.refused == 1
        assert [message["role"] for message in upstream.bodies[-1]["messages"]].count("system") == 1
        assert all(extends(later, earlier) for earlier, later in pairwise(upstream.bodies))
        settled(gateway, 4)
        verdicts = {row["about"]: row["verdict"] for row in rewriting(gateway)["upstream"]}
        assert verdicts == {"line as system": "refused", "line as user": "taken"}
        talk(gateway, ask_openai, 3, "another")
        assert upstream.refused == 1


def test_two_refused_roles_leave_a_line_in_the_users_message() -> None:
    upstream = CachingUpstream(refuses=lambda body: has_late("system")(body) or _two_users(body))
    with raw_upstream(upstream) as server, running(settings(server.url, line_role=LineRole.SYSTEM)) as gateway:
        talk(gateway, ask_openai, 4)
        assert upstream.refused == 2
        assert all(len(body["messages"]) % 2 == 0 for body in upstream.bodies), "roles take turns"
        assert "\n\n[state" in upstream.bodies[-1]["messages"][-1]["content"]


def _two_users(body: Any) -> bool:
    return any(one["role"] == other["role"] for one, other in pairwise(body["messages"]))


def test_where_every_line_is_refused_requests_go_through_as_they_came() -> None:
    upstream = CachingUpstream(refuses=has_line)
    with raw_upstream(upstream) as server, running(settings(server.url, line_role=LineRole.SYSTEM)) as gateway:
        for name in range(4):
            talk(gateway, ask_openai, 2, f"conversation {name}")
        assert len(upstream.bodies) == 8
        assert upstream.refused == 9, "three requests in three forms"
        assert not any(has_line(body) for body in upstream.bodies)
        assert {row["verdict"] for row in rewriting(gateway)["upstream"]} == {"refused"}


def test_where_the_announcement_is_refused_it_is_soon_given_up() -> None:
    upstream = CachingUpstream(refuses=lambda body: "[state" in json.dumps(body))
    with raw_upstream(upstream) as server, running(settings(server.url)) as gateway:
        for name in range(6):
            talk(gateway, ask_openai, 1, f"conversation {name}")
        assert upstream.refused == 3
        assert len(upstream.bodies) == 6
        assert {row["verdict"] for row in rewriting(gateway)["upstream"]} == {"the announcement is refused"}


def test_a_clients_own_error_is_passed_on_and_proves_nothing() -> None:
    upstream = CachingUpstream(refuses=lambda body: body["model"] == "wrong")
    with raw_upstream(upstream) as server, running(settings(server.url)) as gateway:
        said = [{"role": "user", "content": "hi"}]
        for minute in "12":
            body = {"model": "wrong", "messages": [{"role": "system", "content": at(minute)}, *said]}
            got = httpx2.post(f"{gateway.url}{CHAT}", json=body)
            assert (got.status_code, got.json()["error"]["message"]) == (400, "a template raised")
        assert rewriting(gateway)["upstream"] == []


def test_a_role_that_is_folded_into_the_head_is_found_out() -> None:
    upstream = CachingUpstream(folds=True)
    with raw_upstream(upstream) as server, running(settings(server.url, line_role=LineRole.SYSTEM)) as gateway:
        said: list[Any] = [{"role": "user", "content": "hi"}]
        for turn in range(8):
            ask_openai(gateway, at(str(turn)), said)
            settled(gateway, turn + 1)
            said += [
                {"role": "assistant", "content": "Yes."},
                {"role": "user", "content": f"more {turn} {RULES[:900]}"},
            ]
        verdicts = {row["about"]: row["verdict"] for row in rewriting(gateway)["upstream"]}
        assert verdicts == {"line as system": "folded", "line as user": "accepted"}
        roles = [message["role"] for message in upstream.bodies[-1]["messages"]]
        assert roles.count("system") <= 5, "what stands there stays"
        assert roles[-2:] == ["user", "user"]


def test_a_route_on_which_it_does_not_pay_is_switched_off(tmp_path: Path) -> None:
    upstream = CachingUpstream(reads=False)
    with raw_upstream(upstream) as server:
        with running(settings(server.url, state=tmp_path / "state")) as gateway:
            said: list[Any] = [{"role": "user", "content": "hi"}]
            for turn in range(10):
                body = {"model": "m", "messages": [{"role": "system", "content": at(str(turn % 7))}, *said]}
                got = httpx2.post(f"{gateway.url}{CHAT}", json=body)
                settled(gateway, turn + 1)
            assert (
                got.headers["x-pkv-action"]
                == "forwarded; why=rewriting is switched off here for now, because it did not pay"
            )
            assert upstream.bodies[-1] == body
            assert metric(gateway.url, f'pkv_rewriting_lost_tokens_estimate_total{{route="{CHAT}"}}') > 0
            assert {"of": f"{CHAT} m", "about": "off", "verdict": "rewriting lost tokens"} in rewriting(gateway)[
                "upstream"
            ]
        with running(settings(server.url, state=tmp_path / "state")) as gateway:
            talk(gateway, ask_openai, 2, "after a restart")
            assert not has_line(upstream.bodies[-1])


@pytest.mark.parametrize(
    ("of", "fault"),
    [(ConversationStore, "candidates"), (ConversationStore, "commit"), (Verdicts, "decide"), (Verdicts, "learned")],
)
def test_a_fault_of_the_store_harms_no_request(of: type, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the store fails (a full disk), requests are forwarded unchanged."""

    def breaks(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    upstream = CachingUpstream(refuses=has_late("system"))
    with raw_upstream(upstream) as server, running(settings(server.url)) as gateway:
        talk(gateway, ask_openai, 1)
        monkeypatch.setattr(of, fault, breaks)
        talk(gateway, ask_openai, 3, "another")
        said = [{"role": "user", "content": "hi"}]
        got = httpx2.post(f"{gateway.url}{CHAT}", json={"model": "m", "messages": said})
        assert got.status_code == 200
        if fault != "decide":
            assert got.headers["x-pkv-action"] == "forwarded; why=the gateway failed to rewrite the request"
            assert upstream.bodies[-1]["messages"] == said


def test_a_client_that_freezes_its_prompt_is_left_alone() -> None:
    upstream = CachingUpstream()
    with raw_upstream(upstream) as server, running(settings(server.url, rules=rules_of({}))) as gateway:
        said: list[Any] = [{"role": "user", "content": "hi"}]
        for _ in range(4):
            data = json.dumps(
                {"model": "m", "messages": [{"role": "system", "content": RULES}, *said]}, indent=2
            ).encode()
            got = httpx2.post(f"{gateway.url}{CHAT}", content=data)
            assert got.headers["x-pkv-action"] == "forwarded"
            assert server.received[-1].body == data
            said += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "so"}]


def test_two_servers_do_not_share_a_file(tmp_path: Path) -> None:
    in_a_file = GatewaySettings("http://127.0.0.1:1", port=0, mode=GatewayMode.ERRATUM, state=tmp_path / "state")
    with running(in_a_file), pytest.raises(InvalidArgumentError, match="another server"):
        gateway_app(in_a_file)
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0, "it holds text of prompts"


def test_tools_that_a_client_reorders_no_longer_break_the_prefix() -> None:
    """The cause that `observe` reports disappears, and the upstream finds the earlier turn in its cache."""
    found = {}
    for mode in (GatewayMode.OBSERVE, GatewayMode.ERRATUM):
        upstream = CachingUpstream()
        with raw_upstream(upstream) as server, running(settings(server.url, mode)) as gateway:
            said: list[Any] = [{"role": "user", "content": "hi"}]
            tools = [{"type": "function", "function": {"name": name * 9, "description": RULES}} for name in "abc"]
            for turn in range(3):
                messages = [{"role": "system", "content": RULES}, *said]
                body = {"model": "m", "messages": messages, "tools": tools[turn:] + tools[:turn]}
                assert httpx2.post(f"{gateway.url}{CHAT}", json=body).status_code == 200
                said += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": f"more {turn}"}]
            settled(gateway, 3)
            report = httpx2.get(f"{gateway.url}/pkv/report").json()["routes"][CHAT]
            found[mode] = ("tools reordered" in report["causes"], report["cached_tokens"] / report["input_tokens"])
    assert found[GatewayMode.OBSERVE][0]
    assert found[GatewayMode.OBSERVE][1] < 0.1
    assert not found[GatewayMode.ERRATUM][0]
    assert found[GatewayMode.ERRATUM][1] > 0.6


@pytest.mark.parametrize("where", ["before its answer", "within an event", "between two events"])
def test_an_upstream_that_dies_while_it_answers_leaves_the_session_intact(where: str) -> None:
    """The client asks again with the same clock or a later one. Every request extends those that the upstream got."""
    upstream = CachingUpstream()
    dies = {3, 5}

    async def dying(request: Received) -> AsyncIterator[bytes]:
        parts = [part async for part in upstream(request)]
        if len(upstream.bodies) not in dies:
            for part in parts:
                yield part
        elif where != "before its answer":
            yield EVENTS_HEAD
            yield parts[1] if where == "between two events" else parts[1][:-9]

    with raw_upstream(dying) as server, running(settings(server.url, line_role=LineRole.SYSTEM)) as gateway:
        said: list[Any] = [{"role": "user", "content": "hi"}]
        failed = 0
        for turn in range(8):
            try:
                got = ask_stream(gateway, at(str(turn)), said)
            except (openai.APIError, httpx2.TransportError):
                failed += 1
                continue
            assert got == "Yes."
            said += [{"role": "assistant", "content": got}, {"role": "user", "content": f"more {turn}"}]
        actions = {name.partition(";")[0]: n for name, n in rewriting(gateway)["routes"][0]["actions"].items()}
    assert failed == len(dies)
    assert len(upstream.bodies) == 8
    for earlier, later in pairwise(upstream.bodies):
        assert extends(later, earlier), "a line that was sent was lost"
    assert "reset" not in actions, "no session was begun anew"
    for turn, body in enumerate(upstream.bodies[1:], start=1):
        [latest] = [m["content"] for m in body["messages"] if m["role"] == "system"][-1:]
        assert f'"the time": "10:0{turn}"' in latest
