"""Mode `observe`: its findings, in the upstream's own numbers, and that it never delays or breaks a request."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from explain.corpus import QUIET, RULES, SHAPES, Shape, chat
from programmable_kv import explain_miss
from programmable_kv.explain.classes import CLASSES
from programmable_kv.serve import refusal
from programmable_kv.serve.access import ApiKey, new_key
from programmable_kv.serve.capture import Capture
from programmable_kv.serve.exchange import Exchange
from programmable_kv.serve.observation import Observation
from programmable_kv.serve.observer import Observer
from programmable_kv.serve.remedies import REMEDIES
from programmable_kv.serve.routes import route_of
from programmable_kv.serve.settings import GatewayMode, GatewaySettings
from serve.http_peers import (
    EVENTS_HEAD,
    LAST,
    Received,
    Running,
    answer,
    chunk,
    metric,
    raw_upstream,
    running,
    wait_until,
)

SECRET = "a-private-sentence"


def path_of(body: dict[str, Any]) -> str:
    if "input" in body:
        return "/v1/responses"
    if "prompt" in body:
        return "/v1/completions"
    return "/v1/messages" if "system" in body or "max_tokens" in body else "/v1/chat/completions"


def exchange(
    body: Any, answered: bytes = b"{}", *, tenant: str = "t", path: str = "", headers: tuple[tuple[bytes, bytes], ...] = (),
    encoding: str = "",
) -> Exchange:  # fmt: skip
    capture = Capture()
    capture.add(answered)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    path = path or path_of(body)
    return Exchange(tenant, route_of(path), headers, data, 1.8e9, capture, encoding)


def usage(tokens: int, cached: int) -> bytes:
    return json.dumps({"usage": {"prompt_tokens": tokens, "prompt_tokens_details": {"cached_tokens": cached}}}).encode()


@pytest.fixture
def seen() -> list[Observation]:
    return []


@pytest.fixture
def observer(seen: list[Observation]) -> Iterator[Observer]:
    found = Observer(max_bytes=10**8, max_queued_bytes=10**8, tell=seen.append)
    yield found
    found.close()


def settled(observer: Observer) -> None:
    wait_until(lambda: observer.state.queued == 0)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_shape_is_found_as_in_a_log(shape: Shape, observer: Observer, seen: list[Observation]) -> None:
    for number, body in enumerate(shape.log):
        observer.submit(exchange(body, usage(1000 + number, 0)))
    settled(observer)
    found = seen[-1]
    assert (found.cause, found.place, found.outcome) == (shape.cause, shape.place, "miss")
    assert found.lost_tokens == 1000 + len(shape.log) - 2, "what the upstream counted for the request before"
    assert found.fix


@pytest.mark.parametrize(("log", "cause"), [row[1:] for row in QUIET], ids=[row[0] for row in QUIET])
def test_a_quiet_log_stays_quiet(
    log: tuple[dict[str, Any], ...], cause: str, observer: Observer, seen: list[Observation]
) -> None:
    for body in log:
        observer.submit(exchange(body, usage(1000, 1000)))
    settled(observer)
    assert seen[-1].cause == cause
    assert seen[-1].outcome != "miss"
    assert observer.report("t").as_json()["routes"][path_of(log[0])]["lost_tokens_at_most"] == 0


def test_a_longer_log_is_explained_as_explain_miss_does(observer: Observer, seen: list[Observation]) -> None:
    turns = [f"Turn {n}: {chr(97 + n) * 40}" for n in range(8)]
    log = [chat(f"{RULES}It is 10:{30 + n}:12.", *turns[: 2 * n + 1]) for n in range(4)]
    log += [chat(RULES, f"Another question, number {n}: {'why? ' * n}") for n in range(1, 4)]
    log += [chat(f"{RULES}It is 10:59:12.", *turns)]
    for body in log:
        observer.submit(exchange(body, usage(500, 16)))
    settled(observer)
    lines = [{"request": body, "response": json.loads(usage(500, 16))} for body in log]
    report = explain_miss(*lines)
    assert [each.cause for each in seen] == [finding.cause for finding in report.findings]
    assert [each.lost_tokens for each in seen] == [finding.lost for finding in report.findings]


def test_every_remedy_is_for_a_class_that_exists() -> None:
    assert set(REMEDIES) <= {row.name for row in CLASSES if row.lost}


def test_without_the_upstreams_numbers_no_tokens_are_reported(observer: Observer) -> None:
    for minute in (1, 2, 3):
        observer.submit(exchange(chat(f"{RULES}It is 10:0{minute}:00.", "hi"), b'{"usage": {"prompt_tokens": 900}}'))
    settled(observer)
    route = observer.report("t").as_json()["routes"]["/v1/chat/completions"]
    assert (route["miss"], route["counted_by_upstream"], route["input_tokens"]) == (2, 0, 0)
    assert route["causes"]["clock"]["not_counted_by_upstream"] == 2
    assert route["lost_tokens_at_most"] == 0


def test_prefixes_are_not_shared_between_tenants(observer: Observer, seen: list[Observation]) -> None:
    for tenant in ("one", "two", "one"):
        observer.submit(exchange(chat(RULES, "hi"), tenant=tenant))
    settled(observer)
    assert [each.cause for each in seen] == ["first request", "first request", "repeated"]
    assert observer.report("one").as_json()["routes"]["/v1/chat/completions"]["requests"] == 2
    assert observer.report("three").as_json()["routes"] == {}
    assert observer.report("three").as_json()["sessions"] == []


def test_a_session_s_name_keeps_sub_agents_together(observer: Observer, seen: list[Observation]) -> None:
    headers = ((b"X-Claude-Code-Session-Id", b"session-secret"),)
    for turn in range(1, 4):
        for agent in ("main", "search"):
            said = [f"{agent} says {n}" for n in range(2 * turn - 1)]
            observer.submit(exchange(chat(f"You are {agent}. {RULES}", *said), headers=headers))
    settled(observer)
    assert [each.cause for each in seen[2:]] == ["appended"] * 4
    [session] = observer.report("t").as_json()["sessions"]
    assert session["hit"] == 4
    assert "session-secret" not in json.dumps(session)


def test_the_report_holds_no_text(observer: Observer) -> None:
    for minute in (1, 2):
        observer.submit(
            exchange(chat(f"{SECRET} {RULES}{SECRET} 10:0{minute}:00.", SECRET, metadata={"user_id": SECRET}))
        )
    settled(observer)
    assert SECRET not in json.dumps(observer.report("t").as_json())


def nested(depth: int) -> bytes:
    return b'{"messages":' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\xff\xfe", b"[]", b"null", b"{}", nested(100_000), b'{"messages": "x"}', b'{"messages": [1]}',
        b'{"messages": [{"role": 1}]}', b'{"messages": [], "tools": {"a": 1}}', b'{"messages": NaN}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"messages": [], "model": {"a": []}}',
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": {}}]}], "session_id": []}',
        b'{"messages": [{"role": "assistant", "tool_calls": [{"function": "x"}]}]}',
        b'{"input": [{"type": "reasoning", "summary": 1}]}',
    ],
    ids=range(16),
)  # fmt: skip
def test_hostile_bodies_end_nothing(body: bytes, observer: Observer, seen: list[Observation]) -> None:
    observer.submit(exchange(body, path="/v1/chat/completions"))
    observer.submit(exchange(chat(RULES, "hi")))
    settled(observer)
    state = observer.state
    assert state.observed + state.unreadable + state.failed == 2
    assert seen[-1].route == "/v1/chat/completions"
    json.dumps(observer.report("t").as_json()).encode()


def test_what_waits_is_bounded(seen: list[Observation]) -> None:
    go = threading.Event()

    def slowly(observation: Observation) -> None:
        go.wait(10)
        seen.append(observation)

    body = chat(RULES, "hi")
    one = exchange(body).nbytes
    observer = Observer(max_bytes=10**8, max_queued_bytes=3 * one, tell=slowly)
    for _ in range(10):
        observer.submit(exchange(body))
    assert observer.state.queued_bytes <= 3 * one
    assert observer.state.dropped == 7
    go.set()
    observer.close()
    assert len(seen) == 3
    assert observer.state.queued_bytes == 0


@pytest.mark.parametrize(
    ("data", "encoding", "expected"),
    [
        (usage(10, 4), "", 10),
        (gzip.compress(usage(10, 4), mtime=0), "gzip", 10),
        (b"\x28\xb5\x2f\xfd", "zstd", None),
        (b"not gzip", "gzip", None),
        (b'data: {"choices":[]}\n\ndata: ' + usage(10, 4) + b"\n\ndata: [DONE]\n\n", "", 10),
        (b"event: x\r\ndata: {\"response\": " + usage(10, 4) + b"}\r\n\r\n", "", 10),
        (b'{"usage": 3}', "", None), (b"[1]", "", None), (b"", "", None), (b'{"usage"', "", None),
    ],
)  # fmt: skip
def test_usage_is_read_from_answers(data: bytes, encoding: str, expected: int | None) -> None:
    capture = Capture()
    for start in range(0, len(data), 7):
        capture.add(data[start : start + 7])
    found = capture.usage(encoding)
    assert (found.tokens if found else None) == expected


def test_a_long_answer_is_kept_in_part_and_its_usage_is_found() -> None:
    start = b'data: {"message": {"usage": {"input_tokens": 7, "cache_read_input_tokens": 5}}}\n\n'
    capture = Capture()
    capture.add(start)
    for _ in range(3000):
        capture.add(b'data: {"delta": "' + b"x" * 2000 + b'"}\n\n')
    assert capture.cut
    assert capture.nbytes < 3 * 2**20
    found = capture.usage()
    assert found is not None
    assert (found.tokens, found.cached) == (12, 5)


STREAMED = [
    {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m",
     "choices": [{"index": 0, "delta": {"role": "assistant", "content": "Yes."}}]},
    {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [],
     "usage": {"prompt_tokens": 2000, "completion_tokens": 1, "total_tokens": 2001,
               "prompt_tokens_details": {"cached_tokens": 16}}},
]  # fmt: skip
COMPLETE = {
    "id": "c", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Yes."}}],
    "usage": {"prompt_tokens": 2000, "completion_tokens": 1, "total_tokens": 2001,
              "prompt_tokens_details": {"cached_tokens": 16}},
}  # fmt: skip
MESSAGE = {
    "id": "m", "type": "message", "role": "assistant", "model": "m", "content": [{"type": "text", "text": "Yes."}],
    "stop_reason": "end_turn", "stop_sequence": None,
    "usage": {"input_tokens": 1500, "output_tokens": 1, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 500},
}  # fmt: skip
RESPONSE = {
    "id": "r", "object": "response", "created_at": 1, "model": "m", "status": "completed", "parallel_tool_calls": True,
    "tool_choice": "auto", "tools": [],
    "output": [{"id": "o", "type": "message", "role": "assistant", "status": "completed",
                "content": [{"type": "output_text", "text": "Yes.", "annotations": []}]}],
    "usage": {"input_tokens": 2000, "input_tokens_details": {"cached_tokens": 16}, "output_tokens": 1,
              "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 2001},
}  # fmt: skip


async def server(request: Received) -> AsyncIterator[bytes]:
    if request.target.startswith(b"/v1/chat") and request.json.get("stream"):
        yield EVENTS_HEAD
        for event in STREAMED:
            yield chunk(b"data: " + json.dumps(event).encode() + b"\n\n")
            await asyncio.sleep(0.01)
        yield chunk(b"data: [DONE]\n\n") + LAST
    elif request.target.startswith(b"/v1/chat"):
        yield answer(json.dumps(COMPLETE).encode())
    elif request.target.startswith(b"/v1/messages"):
        yield answer(json.dumps(MESSAGE).encode())
    elif request.target.startswith(b"/v1/responses"):
        yield answer(json.dumps(RESPONSE).encode())
    else:
        yield answer(b'{"object": "list", "data": []}')


@pytest.fixture
def gateway() -> Iterator[Running]:
    with raw_upstream(server) as upstream, running(GatewaySettings(upstream.url, port=0)) as found:
        yield found


def ask_chat(gateway: Running, system: str) -> str | None:
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="k")
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Is it?"}]
    return client.chat.completions.create(model="m", messages=messages).choices[0].message.content  # type: ignore[arg-type]


def ask_stream(gateway: Running, system: str) -> str | None:
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="k")
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Is it?"}]
    parts = client.chat.completions.create(  # type: ignore[call-overload]
        model="m", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    return "".join(part.choices[0].delta.content for part in parts if part.choices)


def ask_responses(gateway: Running, system: str) -> str | None:
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="k")
    return client.responses.create(model="m", instructions=system, input="Is it?").output_text


def ask_messages(gateway: Running, system: str) -> str | None:
    client = anthropic.Anthropic(base_url=gateway.url, api_key="k")
    messages: Any = [{"role": "user", "content": "Is it?"}]
    return client.messages.create(model="m", max_tokens=5, system=system, messages=messages).content[0].text  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("ask", "route"),
    [
        (ask_chat, "/v1/chat/completions"), (ask_stream, "/v1/chat/completions"), (ask_responses, "/v1/responses"),
        (ask_messages, "/v1/messages"),
    ],
)  # fmt: skip
def test_a_clock_in_the_system_prompt_is_found_through_real_clients(
    gateway: Running, ask: Callable[[Running, str], str | None], route: str
) -> None:
    for minute in (1, 2, 3):
        assert ask(gateway, f"It is 2026-11-26 10:0{minute}:00.\n{RULES}") == "Yes."
    wait_until(lambda: metric(gateway.url, f'pkv_observed_total{{cause="clock",outcome="miss",route="{route}"}}') == 2)
    report = httpx2.get(f"{gateway.url}/pkv/report").json()
    found = report["routes"][route]
    cached = 0 if route == "/v1/messages" else 16
    assert (found["requests"], found["new"], found["miss"]) == (3, 1, 2)
    assert (found["input_tokens"], found["cached_tokens"]) == (6000, 3 * cached)
    assert found["lost_tokens_at_most"] == found["remediable_tokens_at_most"] == 2 * (2000 - cached)
    clock = found["causes"]["clock"]
    assert (clock["requests"], clock["would"], clock["place"]) == (2, "erratum", "system prompt")
    assert report["sessions"][0]["miss"] == 2
    assert metric(gateway.url, f'pkv_lost_tokens_at_most_total{{cause="clock",route="{route}"}}') == 2 * (2000 - cached)


def test_models_are_listed_and_not_observed(gateway: Running) -> None:
    assert list(openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="k").models.list()) == []
    assert httpx2.get(f"{gateway.url}/pkv/report").json()["routes"] == {}


@pytest.mark.parametrize("fault", ["_observe", "_request", "submit"])
def test_a_fault_of_the_observer_harms_no_request(
    fault: str, gateway: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: object) -> None:
        raise RuntimeError("broken on purpose")

    assert ask_chat(gateway, RULES) == "Yes."
    wait_until(lambda: metric(gateway.url, "pkv_observer_sessions") == 1)
    monkeypatch.setattr(Observer, fault, breaks)
    for ask in (ask_chat, ask_stream, ask_messages):
        assert ask(gateway, RULES) == "Yes."
    if fault != "submit":
        wait_until(lambda: metric(gateway.url, "pkv_observer_failed") == 3)
    monkeypatch.undo()
    assert ask_chat(gateway, RULES) == "Yes."
    line = 'pkv_observed_total{cause="likely the server",outcome="miss",route="/v1/chat/completions"}'
    wait_until(lambda: metric(gateway.url, line) == 1)


def test_a_slow_observer_is_not_in_the_way(gateway: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(Observer, "_observe", lambda *_: go.wait(10) and None)
    for _ in range(5):
        assert ask_chat(gateway, RULES) == "Yes."
    assert not go.is_set()
    go.set()


def test_in_mode_pass_nothing_is_observed() -> None:
    with (
        raw_upstream(server) as upstream,
        running(GatewaySettings(upstream.url, port=0, mode=GatewayMode.PASS)) as gateway,
    ):
        assert ask_chat(gateway, RULES) == "Yes."
        assert httpx2.get(f"{gateway.url}/pkv/report").json() == {"mode": "pass"}
        assert httpx2.get(f"{gateway.url}/v1/models").headers["x-pkv-mode"] == "pass"
        assert not any(thread.name == "programmable-kv-observer" for thread in threading.enumerate())


def test_requests_that_the_upstream_refused_are_not_taken_for_sent() -> None:
    async def refuses(_: Received) -> AsyncIterator[bytes]:
        yield answer(b"{}", "400 Bad Request")

    with raw_upstream(refuses) as upstream, running(GatewaySettings(upstream.url, port=0)) as gateway:
        httpx2.post(f"{gateway.url}/v1/chat/completions", json=chat(RULES, "hi"))
        assert httpx2.get(f"{gateway.url}/pkv/report").json()["observer"]["observed"] == 0


def test_each_tenant_sees_its_own_report() -> None:
    made = {name: new_key(name) for name in ("one", "two")}
    keys = tuple(ApiKey(name, line.partition(":")[2]) for name, (_, line) in made.items())
    with (
        raw_upstream(server) as upstream,
        running(GatewaySettings(upstream.url, port=0, keys=keys)) as gateway,
    ):

        def report(name: str) -> Any:
            return httpx2.get(f"{gateway.url}/pkv/report", headers={"x-api-key": made[name][0]}).json()

        client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=made["one"][0])
        client.responses.create(model="m", instructions=RULES, input="hi")
        wait_until(lambda: bool(report("one")["routes"]))
        assert report("two")["routes"] == {}
        assert report("two")["sessions"] == []


def test_the_page_shows_a_report_as_it_is(gateway: Running) -> None:
    """These three requests give the report that `docs/serving.md` shows."""
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    shown = json.loads(page.partition("```json\n")[2].partition("```")[0])
    for minute in (1, 2, 3):
        ask_chat(gateway, f"It is 2026-11-26 10:0{minute}:00.\n{RULES}")
    wait_until(lambda: httpx2.get(f"{gateway.url}/pkv/report").json()["observer"]["observed"] == 3)
    report = httpx2.get(f"{gateway.url}/pkv/report").json()
    assert {key: report[key] for key in shown} == shown


def test_the_page_lists_every_code_of_the_gateway() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    sources = Path(refusal.__file__).parent.rglob("*.py")
    codes = {
        code for path in sources for code in re.findall(r'Refusal\(\s*\d+,\s*"(\w+)"', path.read_text(encoding="utf-8"))
    }
    assert len(codes) > 8
    assert [code for code in codes if f"`{code}`" not in page] == []
