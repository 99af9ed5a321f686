"""With every chat template, the system prompt and every line of the gateway reach the model, in the right order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from programmable_kv.serve.aside import Aside
from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.prober import Prober, renderings
from programmable_kv.serve.refusal import UPSTREAM_UNREACHABLE, RefusedError
from programmable_kv.serve.rewriting.conversation import Form
from programmable_kv.serve.rewriting.forms import LineRole
from programmable_kv.serve.settings import GatewaySettings
from serve.caching_upstream import CachingUpstream
from serve.http_peers import Running, raw_upstream, running, wait_until
from serve.rewriting_peers import CHAT, CLOCK, RULES, Peer, at, chat, claude, codex, extends
from serve.templated_upstream import TEMPLATES, TemplatedUpstream

FAMILIES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
NO_SYSTEM_PROMPT = {"gemma", "mistral_v1"}
"""These templates refuse the client's own system prompt."""
ONLY_INLINE = {"llama2", "mistral_v3", "command_r"}
WITH_TOOLS = {"chatml", "ending", "llama3", "llama31", "qwen25", "qwen3", "shouting", "today", "trimming"}
AS_USER = {"alpaca", "deepseek_r1", "nemotron", "vicuna", "yi"}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}},
    }
]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "callnumb1", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
}
RESULT = {"role": "tool", "tool_call_id": "callnumb1", "name": "look", "content": "It is there."}


def find_out(peer: Peer, upstream: TemplatedUpstream) -> dict[str, str]:
    """Probe the upstream, as a gateway does after its first request. Returns the verdicts."""
    work = peer.works[-1]
    probe = peer.rewriter.probe_of(work)
    assert probe is not None
    found = asyncio.run(renderings(probe, upstream.ask))
    peer.rewriter.accepted.rendered(work.route, work.model, found)
    return found


def form_of(peer: Peer) -> Form:
    note = peer.works[-1].plan.note
    assert note is not None
    return note.form


def expect(family: str) -> Form:
    if family in AS_USER:
        return Form.USER
    return Form.INLINE if family in ONLY_INLINE else Form.SYSTEM


def conversation(peer: Peer, upstream: TemplatedUpstream | None, **more: Any) -> Iterator[tuple[Any, Form | None]]:
    """Yield the body sent, and the form of the new line, for four turns with a changing clock."""
    said: list[Any] = ["question0"]
    for turn in range(4):
        body = peer.send(chat(at(str(turn)), *said, **more))
        if turn == 0 and upstream is not None:
            find_out(peer, upstream)
        note = peer.works[-1].plan.note
        yield body, note.form if note is not None else None
        said += [f"answer{turn}", f"question{turn + 1}"]


def in_order(text: str, turns: int) -> bool:
    """Whether a text has, once each: the policy, and every question followed by the line with the time of its turn."""
    words = ["You are a shop's agent.", *(word for n in range(turns) for word in (f"question{n}", f"10:0{n}"))]
    read = text.casefold().replace("now: 10:00", "now", 1)
    words = [word.casefold() for word in words if word != "10:00"]
    places = [read.find(word) for word in words]
    return all(read.count(word) == 1 for word in words) and (places == sorted(places) or _moved_head(places))


def _moved_head(places: list[int]) -> bool:
    """Whether only the system prompt is moved: Mistral's template puts it before the latest question."""
    return places[1:] == sorted(places[1:]) and places[0] < places[-2]


@pytest.mark.parametrize("family", [each for each in FAMILIES if each not in NO_SYSTEM_PROMPT])
def test_every_line_reaches_the_model(family: str) -> None:
    upstream, peer = TemplatedUpstream(family), Peer(line_role=LineRole.AUTO)
    forms = []
    for turn, (body, form) in enumerate(conversation(peer, upstream)):
        assert in_order(upstream.render(body), turn + 1), upstream.render(body)
        forms.append(form)
    assert forms == [None, *3 * [expect(family)]]


@pytest.mark.parametrize("family", FAMILIES)
def test_system_messages_are_lost_or_moved_where_nobody_looks(family: str) -> None:
    """The negative witness: without probing, the check of the test above fails for some templates."""
    upstream, peer = TemplatedUpstream(family), Peer(line_role=LineRole.SYSTEM)
    seen = []
    for turn, (body, _) in enumerate(conversation(peer, None)):
        try:
            seen.append(in_order(upstream.render(body), turn + 1))
        except Exception:
            seen.append(False)
    assert all(seen) == (family not in NO_SYSTEM_PROMPT | AS_USER | ONLY_INLINE)


@pytest.mark.parametrize("family", [each for each in FAMILIES if each not in NO_SYSTEM_PROMPT])
def test_a_line_behind_a_tools_result_reaches_the_model(family: str) -> None:
    upstream, peer = TemplatedUpstream(family), Peer(line_role=LineRole.AUTO)
    peer.send(chat(at("0"), "question0", tools=TOOLS))
    find_out(peer, upstream)
    own = chat(at("1"), "question0", CALL, RESULT, tools=TOOLS)
    body = peer.send(own)
    note = peer.works[-1].plan.note
    try:
        plain = upstream.render(own)
    except Exception:
        assert note is None or note.form is Form.USER, "nothing is known, and the client's own request is refused"
        return
    if family == "mistral_v3":
        assert (peer.action, peer.why) == ("reset", "the upstream accepts no line")
        return
    assert note is not None
    assert note.form is (Form.SYSTEM if family in WITH_TOOLS else Form.USER)
    text, plain = upstream.render(body).casefold(), plain.casefold()
    assert text.count('"10:01"') == 1
    for said in ("you are a shop's agent.", "question0", "it is there."):
        assert text.count(said) == plain.count(said), "what the template writes of the client's own request"
        assert text.find(said) < text.find('"10:01"')


def test_tools_may_bring_another_template() -> None:
    """A verdict from a conversation without tools does not hold for one with tools."""
    upstream, peer = TemplatedUpstream("granite"), Peer(line_role=LineRole.AUTO)
    peer.send(chat(at("0"), "question0", tools=TOOLS))
    assert find_out(peer, upstream) == {"line as system, rendered": "intact", "line as user, rendered": "intact"}
    peer.send(chat(at("1"), "question0", "answer0", "question1", tools=TOOLS))
    assert form_of(peer) is Form.INLINE
    peer.send(chat(at("1"), "other"))
    peer.send(chat(at("2"), "other", "answer0", "question1"))
    assert form_of(peer) is Form.SYSTEM


def test_until_it_is_known_a_line_is_part_of_a_users_message() -> None:
    peer = Peer(line_role=LineRole.AUTO)
    peer.send(chat(at("0"), "question0"))
    body = peer.send(chat(at("1"), "question0", "answer0", "question1"))
    assert [each["role"] for each in body["messages"]] == ["system", "user", "assistant", "user"]
    assert body["messages"][-1]["content"].startswith("question1\n\n[state ")
    later = peer.send(chat(at("2"), "question0", "answer0", "question1", CALL, RESULT))
    assert extends(later, body)
    assert later["messages"][-1]["role"] == "user", "there is no other place behind a tool's result"


def test_a_request_with_a_template_of_its_own_is_not_what_was_rendered() -> None:
    upstream, peer = TemplatedUpstream("qwen25"), Peer(line_role=LineRole.AUTO)
    peer.send(chat(at("0"), "question0"))
    find_out(peer, upstream)
    peer.send(chat(at("1"), "question0", "answer0", "question1", chat_template="{{ messages }}"))
    assert form_of(peer) is Form.INLINE


def test_another_role_of_the_system_prompt_is_looked_at_for_itself() -> None:
    """A template may support the role `system` and drop messages of an unknown role."""
    upstream, peer = TemplatedUpstream("deepseek_r1"), Peer(line_role=LineRole.AUTO)

    def developed(minute: str, *turns: Any) -> Any:
        body = chat(at(minute), *turns)
        body["messages"][0]["role"] = "developer"
        return body

    peer.send(developed("0", "question0"))
    assert find_out(peer, upstream) == {}
    upstream, peer = TemplatedUpstream("qwen25"), Peer(line_role=LineRole.AUTO)
    peer.send(chat(at("0"), "question0"))
    find_out(peer, upstream)
    peer.send(developed("0", "other"))
    peer.send(developed("1", "other", "answer0", "question1"))
    assert form_of(peer) is not Form.SYSTEM


def test_lines_of_an_earlier_template_are_not_sent_again() -> None:
    """If a server restarts with a template that drops the earlier lines, the gateway resets the conversation."""
    peer = Peer(line_role=LineRole.AUTO)
    peer.send(chat(at("0"), "question0"))
    find_out(peer, TemplatedUpstream("qwen25"))
    said: list[Any] = ["question0", "answer0", "question1"]
    body = peer.send(chat(at("1"), *said))
    assert body["messages"][-1]["role"] == "system"
    upstream = TemplatedUpstream("deepseek_r1")
    find_out(peer, upstream)
    body = peer.send(chat(at("1"), *said, "answer1", "question2"))
    assert (peer.action, peer.why) == ("reset", "an earlier line does not reach the model")
    assert "Now: 10:01" in upstream.render(body)


def test_an_answer_that_proves_nothing_is_no_verdict() -> None:
    """The server is busy, or its answers contain no rendering."""
    upstream, peer = TemplatedUpstream("qwen25"), Peer(line_role=LineRole.AUTO)
    peer.send(chat(at("0"), "question0"))
    probe = peer.rewriter.probe_of(peer.works[-1])
    assert probe is not None
    asked: list[str] = []

    async def busy(path: str, data: bytes) -> tuple[int, bytes]:
        asked.append(path)
        return (503, b"") if len(asked) > 4 else await upstream.ask(path, data)

    with pytest.raises(Exception, match="tokenize"):
        asyncio.run(renderings(probe, busy))
    for answer in ("", "[]", "null", "{}", '{"tokens": []}', '{"tokens": "x"}', '{"prompt": "Gone."}', '{"prompt": 1}'):

        async def says(_: str, __: bytes, answer: str = answer) -> tuple[int, bytes]:
            return 200, answer.encode()

        assert asyncio.run(renderings(probe, says)) == {}


def test_it_is_asked_once_in_a_while_and_soon_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream, peer = TemplatedUpstream("qwen25"), Peer(line_role=LineRole.AUTO)
    peer.send(chat(at("0"), "question0"))
    asked: list[str] = []
    now = [1000.0]
    monkeypatch.setattr("programmable_kv.serve.prober.time", SimpleNamespace(monotonic=lambda: now[0]))

    async def answers(path: str, data: bytes) -> tuple[int, bytes]:
        asked.append(path)
        return await upstream.ask(path, data)

    async def fails(path: str, _: bytes) -> tuple[int, bytes]:
        asked.append(path)
        raise RefusedError(UPSTREAM_UNREACHABLE)

    async def main() -> None:
        prober = Prober(Aside(None))

        async def looked(ask: Any, *, after_s: float, times: int = 3) -> int:
            now[0] += after_s
            asked.clear()
            for _ in range(times):
                prober.look(peer.works[-1], ask)
                await asyncio.sleep(0)
            await asyncio.gather(*prober._running)
            return len(asked)

        assert await looked(fails, after_s=0) == 1
        assert await looked(answers, after_s=59) == 0
        assert await looked(answers, after_s=2) == 18, "nine conversations, each rendered and read"
        assert await looked(answers, after_s=3500) == 0
        assert await looked(answers, after_s=200) == 18
        await prober.close()

    asyncio.run(main())
    assert set(peer.rewriter.as_json("t")["upstream"][0]) == {"of", "about", "verdict"}
    declared = Peer(line_role=LineRole.USER)
    declared.send(chat(at("0"), "question0"))
    frozen = Peer(line_role=LineRole.AUTO)
    frozen.send(chat(RULES, "question0"))
    for each in (declared, frozen):
        assert each.rewriter.probe_of(each.works[-1]) is None, "there is nothing to find out"


def gateway_of(url: str, **more: Any) -> GatewaySettings:
    return GatewaySettings(url, port=0, mode=GatewayMode.ERRATUM, rules=CLOCK, **more)


def ask(gateway: Running, path: str, body: Any) -> None:
    got = httpx2.post(f"{gateway.url}{path}", json=body, headers={"content-type": "application/json; charset=utf-8"})
    assert got.status_code == 200, got.text


def found_out(gateway: Running) -> dict[str, str]:
    rows = httpx2.get(f"{gateway.url}/pkv/report").json()["rewriting"]["upstream"]
    return {row["about"]: row["verdict"] for row in rows if row["about"].endswith("rendered")}


@pytest.mark.parametrize("like", ["vllm", "llama-server"])
def test_a_gateway_asks_its_upstream_when_the_first_request_was_answered(like: str) -> None:
    upstream = TemplatedUpstream("qwen25", like=like)
    with raw_upstream(upstream) as server, running(gateway_of(server.url)) as gateway:
        ask(gateway, CHAT, chat(at("0"), "question0"))
        wait_until(lambda: len(found_out(gateway)) == 6)
        assert set(found_out(gateway).values()) == {"intact"}
        before = len(server.rendered)
        ask(gateway, CHAT, chat(at("1"), "question0", "answer0", "question1"))
        assert upstream.bodies[-1]["messages"][-1]["role"] == "system"
        assert len(server.rendered) == before, "it is asked once"
        assert len(upstream.bodies) == 2, "and nothing of it is a prompt that is computed"


def test_a_gateway_in_front_of_a_hosted_api_writes_lines_into_users_messages() -> None:
    upstream = CachingUpstream()
    with raw_upstream(upstream) as server, running(gateway_of(server.url)) as gateway:
        ask(gateway, CHAT, chat(at("0"), "question0"))
        wait_until(lambda: len(server.rendered) == 4)
        ask(gateway, CHAT, chat(at("1"), "question0", "answer0", "question1"))
        assert "\n\n[state " in upstream.bodies[-1]["messages"][-1]["content"]
        assert found_out(gateway) == {}
    with raw_upstream(upstream) as server, running(gateway_of(server.url, line_role=LineRole.SYSTEM)) as gateway:
        ask(gateway, CHAT, chat(at("0"), "question0"))
        ask(gateway, CHAT, chat(at("1"), "question0", "answer0", "question1"))
        assert upstream.bodies[-1]["messages"][-1]["role"] == "system", "its operator says that it may stand there"
        assert server.rendered == []


class ScaledOut(TemplatedUpstream):
    """Like vLLM started with --enable-scale-out: it also renders the other protocols, each in its own way."""

    def told(self, path: str, body: Any) -> tuple[int, Any]:
        if not path.endswith("/render"):
            return super().told(path, body)
        if body.get("tools"):
            return 501, {}
        head = body.get("system") or body.get("instructions")
        inner = self.messages_of(body["messages" if "system" in body else "input"], head)
        status, found = super().told("/tokenize", {"messages": inner})
        return status, {"token_ids": found.get("tokens")}

    def messages_of(self, listed: list[Any], head: str) -> list[Any]:
        inside = [each["content"] for each in listed if each["role"] == "system"]
        return [{"role": "system", "content": "".join([head, *inside])}, *(m for m in listed if m["role"] != "system")]


@pytest.mark.parametrize(("path", "make"), [("/v1/messages", claude), ("/v1/responses", codex)])
def test_each_protocol_is_proven_by_its_own_rendering(path: str, make: Any) -> None:
    """A server may keep the places of system messages in one protocol, and merge them into the head in another."""

    class Kept(ScaledOut):
        def messages_of(self, listed: list[Any], head: str) -> list[Any]:
            return [{"role": "system", "content": head}, *listed]

    for kind, role in ((TemplatedUpstream, "user"), (ScaledOut, "user"), (Kept, "system")):
        upstream = kind("qwen25")
        peer = Peer(line_role=LineRole.AUTO)
        peer.send(make(at("0"), "question0"), route=path)
        found = find_out(peer, upstream)
        body = peer.send(make(at("1"), "question0", "answer0", "question1"), route=path)
        last = body["messages" if path.endswith("messages") else "input"][-1]
        assert last["role"] == role, (kind, found)
        assert "[state " in json.dumps(last)


@pytest.mark.parametrize("family", ["deepseek_r1", "llama2", "mistral_v3", "qwen25", "yi"])
def test_an_edit_of_a_notebook_reaches_the_model(family: str) -> None:
    """This holds from the first question on, before anything is known about the template."""
    upstream = TemplatedUpstream(family)
    with raw_upstream(upstream) as server, running(GatewaySettings(server.url, port=0)) as gateway:
        system = {"role": "system", "content": f"The order is {{status}}.\n{RULES}"}
        book = httpx2.post(
            f"{gateway.url}/v1/notebooks",
            json={"upstream_model": "m", "messages": [system], "fields": {"status": "pending"}},
        ).json()
        said: list[dict[str, str]] = []
        for turn, status in enumerate(("shipped", "delayed", "lost")):
            got = httpx2.patch(f"{gateway.url}/v1/notebooks/{book['id']}/fields", json={"status": status})
            assert got.status_code == 200
            said.append({"role": "user", "content": f"question{turn}"})
            ask(gateway, CHAT, {"model": book["model"], "messages": said})
            read = upstream.render(upstream.bodies[-1])
            assert read.count("You are a shop's agent.") == 1
            assert read.find(f'"{status}"') > read.find(f"question{turn}") > 0
            said.append({"role": "assistant", "content": "Yes."})
            wait_until(lambda: len(server.rendered) >= 6)
