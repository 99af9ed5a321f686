"""Probes of the gateway: whom it asks, with what, and what it concludes. A temporary error is never a verdict."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import pytest

from programmable_kv.serve.aside import Aside
from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.prober import Ask, Prober, renderings
from programmable_kv.serve.rewriting.conversation import Form
from programmable_kv.serve.rewriting.forms import LineRole
from programmable_kv.serve.rewriting.rendering import Probe
from programmable_kv.serve.settings import GatewaySettings
from serve.caching_upstream import CachingUpstream
from serve.http_peers import raw_upstream, running, wait_until
from serve.rewriting_peers import CHAT, CLOCK, RESPONSES, Peer, at, chat, codex
from serve.templated_upstream import TemplatedUpstream

CALL = {"id": "callnumb1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
RESULT = {"role": "tool", "tool_call_id": "callnumb1", "name": "look", "content": "It is there."}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}},
    }
]
PROBE = Probe(CHAT, "m", "system")
INTACT = dict.fromkeys(
    (
        f"line as {role}{where}"
        for role in ("system", "user")
        for where in (", rendered", " beside tools, rendered", " behind a tool result, reasoning rendered")
    ),
    "intact",
)


def called(**more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [CALL], **more}


def behind_a_result(peer: Peer, *said: Any) -> tuple[Any, Any]:
    """Send a request with a changed time after a tool's result. Returns the client's body and the upstream's."""
    came = chat(at("1"), *said, RESULT, tools=TOOLS)
    return came, peer.send(came)


def begun(line_role: LineRole = LineRole.AUTO) -> Peer:
    peer = Peer(line_role=line_role)
    peer.send(chat(at("0"), "question0", tools=TOOLS))
    return peer


def form_of(peer: Peer) -> Form | None:
    note = peer.works[-1].plan.note
    return note.form if note is not None else None


@pytest.mark.parametrize("line_role", [LineRole.AUTO, LineRole.USER])
@pytest.mark.parametrize(
    "more",
    [{"reasoning_content": "my plan"}, {"reasoning": "my plan"}, {"content": "<think>\nmy plan\n</think>\n\nI look."}],
)
def test_no_user_message_hides_the_models_reasoning(more: dict[str, Any], line_role: LineRole) -> None:
    """Qwen3's template shows reasoning only after the last user message. A hosted API shows no rendering."""
    peer = begun(line_role)
    came, body = behind_a_result(peer, "question0", called(**more))
    assert peer.action == "reset"
    assert body["messages"][1:] == came["messages"][1:]
    if "reasoning" not in more:  # this template does not read the member `reasoning`
        assert "my plan" in TemplatedUpstream("qwen3").render(body)


def test_reasoning_items_are_not_hidden_either() -> None:
    peer = Peer(line_role=LineRole.AUTO)
    peer.send(codex(at("0"), "question0"), route=RESPONSES)
    call = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c", "output": "It is there."}
    thought = {"type": "reasoning", "id": "rs_1", "summary": []}
    body = codex(at("1"), "question0")
    peer.send({**body, "input": [*body["input"], thought, call, result]}, route=RESPONSES)
    assert (peer.action, form_of(peer)) == ("reset", None)


def test_without_reasoning_a_user_message_stands_there() -> None:
    peer = begun()
    behind_a_result(peer, "question0", called())
    assert form_of(peer) is Form.USER
    peer = begun()
    behind_a_result(
        peer, "question0", called(reasoning_content="my plan"), RESULT, {"role": "user", "content": "more"}, called()
    )
    assert form_of(peer) is Form.USER, "the client's own message stands behind the reasoning"


@pytest.mark.parametrize("family", ["chatml", "llama31", "qwen25", "qwen3"])
def test_a_proven_line_leaves_the_reasoning_where_it_is(family: str) -> None:
    upstream, peer = TemplatedUpstream(family), begun()
    found = asyncio.run(renderings(PROBE, upstream.ask))
    hides = {"line as user behind a tool result, reasoning rendered": "lost"} if family == "qwen3" else {}
    assert found == INTACT | hides
    peer.rewriter.accepted.rendered(CHAT, "m", found)
    came, body = behind_a_result(peer, "question0", called(reasoning_content="my plan"))
    assert form_of(peer) is Form.SYSTEM
    assert upstream.render(body).count("my plan") == upstream.render(came).count("my plan") == (family == "qwen3")


class Failing:
    """An upstream that answers some requests with an error."""

    def __init__(self, upstream: TemplatedUpstream, fails: Any) -> None:
        self.upstream, self.fails, self.asked = upstream, fails, 0

    async def ask(self, path: str, data: bytes) -> tuple[int, bytes]:
        self.asked += 1
        status = self.fails(self.asked, path, data.decode())
        return (status, b"{}") if status else await self.upstream.ask(path, data)


@pytest.mark.parametrize("status", [400, 422, 500])
def test_an_error_that_passes_is_no_verdict(status: int) -> None:
    upstream = TemplatedUpstream("qwen25")
    for at_request in range(1, 19):
        failing = Failing(upstream, lambda n, path, data, at=at_request: status if n == at else 0)
        try:
            found = asyncio.run(renderings(PROBE, failing.ask))
        except Exception:
            continue  # the gateway asks again soon
        assert found.items() <= INTACT.items()
        assert failing.asked >= at_request
        if status == 500:
            assert found == INTACT, "the same is asked again at once"


def test_a_refusal_that_repeats_is_a_verdict_and_a_fault_never_is() -> None:
    upstream = TemplatedUpstream("qwen25")

    def of(status: int) -> Any:
        return lambda n, path, data: status if path == "/tokenize" and '"user", "content": "It is qzline' in data else 0

    as_user = {about: "lost" for about in INTACT if "as user" in about}
    assert asyncio.run(renderings(PROBE, Failing(upstream, of(400)).ask)) == INTACT | as_user
    assert asyncio.run(renderings(PROBE, Failing(upstream, of(500)).ask)) == {
        about: "intact" for about in INTACT if about not in as_user
    }
    with pytest.raises(Exception, match="tokenize"):  # after the second request it refuses everything
        asyncio.run(renderings(PROBE, Failing(upstream, lambda n, path, data: 400 if n > 2 else 0).ask))


async def looked(prober: Prober, peer: Peer, ask: Ask, *, tenant: str = "t", model: str = "m") -> int:
    """The number of requests that one call of `look` makes."""
    peer.send({**chat(at("0"), "question0"), "model": model}, tenant=tenant)
    asked = 0

    async def counted(path: str, data: bytes) -> tuple[int, bytes]:
        nonlocal asked
        asked += 1
        return await ask(path, data)

    prober.look(peer.works[-1], counted)
    await asyncio.gather(*prober._running)
    return asked


def test_names_that_no_model_has_are_not_asked_about() -> None:
    async def main() -> None:
        upstream, peer, prober = TemplatedUpstream("qwen25"), Peer(line_role=LineRole.AUTO), Prober(Aside(None))
        assert await looked(prober, peer, upstream.ask, model="x" * 257) == 0
        assert not prober._next, "and nothing is kept of them"
        assert await looked(prober, peer, upstream.ask, model="x" * 256) > 0

    asyncio.run(main())


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_one_client_may_not_ask_another_may(status: int) -> None:
    async def denies(path: str, data: bytes) -> tuple[int, bytes]:
        return status, b"{}"

    async def main() -> None:
        upstream, peer, prober = TemplatedUpstream("qwen25"), Peer(line_role=LineRole.AUTO), Prober(Aside(None))
        assert await looked(prober, peer, denies, tenant="a") > 0
        assert await looked(prober, peer, upstream.ask, tenant="a") == 0
        assert await looked(prober, peer, upstream.ask, tenant="b") > 0
        assert await looked(prober, peer, upstream.ask, tenant="c") == 0, "what was found out holds for all"

    asyncio.run(main())


def test_a_request_that_is_refused_begins_nothing() -> None:
    unknown = CachingUpstream(refuses=lambda body: body["model"] != "m", status="404 Not Found")
    with raw_upstream(unknown) as server, running(_gateway_of(server.url)) as gateway:
        got = httpx2.post(f"{gateway.url}{CHAT}", json={**chat(at("0"), "question0"), "model": "made-up"})
        assert got.status_code == 404
        assert httpx2.post(f"{gateway.url}{CHAT}", json=chat(at("0"), "question0")).status_code == 200
        wait_until(lambda: len(server.rendered) == 4)
        assert {each.json["model"] for each in server.rendered} == {"m"}


def test_it_asks_with_a_clients_credentials_and_nothing_else_of_its_headers() -> None:
    sent = {
        "authorization": "Bearer secret", "x-api-key": "secret", "api-key": "secret", "idempotency-key": "one",
        "x-request-id": "two", "cookie": "three", "content-type": "application/json; charset=utf-8",
    }  # fmt: skip
    upstream = TemplatedUpstream("qwen25")
    with raw_upstream(upstream) as server, running(_gateway_of(server.url)) as gateway:
        body = json.dumps(chat(at("0"), "question0"))
        assert httpx2.post(f"{gateway.url}{CHAT}", content=body, headers=sent).status_code == 200
        wait_until(lambda: len(server.rendered) == 18)
        for each in server.rendered:
            names = {name.lower() for name, _ in each.headers}
            assert names - {b"connection"} == {
                b"host", b"content-length", b"content-type", b"authorization", b"x-api-key", b"api-key",
            }  # fmt: skip
            assert each.header(b"authorization") == [b"Bearer secret"]


def _gateway_of(url: str) -> GatewaySettings:
    return GatewaySettings(url, port=0, mode=GatewayMode.ERRATUM, rules=CLOCK)
