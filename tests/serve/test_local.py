"""The local server with a tiny model, through the openai client and plain HTTP. The oracle is the library itself."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from programmable_kv import Model, Notebook
from programmable_kv.bench.tiny_chat import tiny_chat_model
from programmable_kv.errors import ContextOverflowError
from programmable_kv.serve.access import ApiKey, new_key
from programmable_kv.serve.local.server import local_app
from programmable_kv.serve.settings import Limits, LocalSettings
from serve.http_peers import Running, running, wait_until

pytest_plugins = ["serve.local_clients"]
ASKED = [{"role": "system", "content": "A rule with {braces}."}, {"role": "user", "content": "Is it so?"}]
MESSAGES = [{"role": "system", "content": "The order is {status}, for {amount} euros. Shipped orders stay."}]
FIELDS = {"status": {"value": "pending", "kind": "enum", "among": ["pending", "shipped"]}, "amount": 30}
GREEDY = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_chat_model(2048)


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Running]:
    settings = LocalSettings(port=0, max_notebooks=6, limits=Limits(wait_s=0.5))
    with running(settings, local_app(model, settings)) as found:
        yield found


@pytest.fixture
def http(server: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=30) as found:
        yield found
        for each in found.get("/v1/notebooks").json()["data"]:
            found.delete(f"/v1/notebooks/{each['id']}")


def made(http: httpx2.Client, **more: Any) -> dict[str, Any]:
    got = http.post("/v1/notebooks", json={"messages": MESSAGES, "fields": FIELDS, **more})
    assert got.status_code == 201, got.text
    assert got.headers["etag"] == '"1"'
    return got.json()  # type: ignore[no-any-return]


def library_s(model: Model, **fields: Any) -> Notebook:
    notebook = Notebook.from_messages(model, MESSAGES, fields={"status": "pending", "amount": 30} | fields)
    notebook.prefill()
    return notebook


def test_an_answer_is_the_library_s(openai_client: openai.OpenAI, model: Model) -> None:
    notebook = Notebook.from_messages(model, ASKED)
    notebook.prefill()
    got = openai_client.chat.completions.create(model=model.name, messages=ASKED, **GREEDY)  # type: ignore[call-overload]
    assert got.choices[0].message.content == "".join(notebook.generate(max_new_tokens=8))
    assert got.choices[0].finish_reason == "length"
    assert got.usage.prompt_tokens == len(notebook)
    assert got.usage.prompt_tokens_details.cached_tokens == 0
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens


def test_a_stream_says_the_same(openai_client: openai.OpenAI, model: Model) -> None:
    whole = openai_client.chat.completions.create(model=model.name, messages=ASKED, **GREEDY)  # type: ignore[call-overload]
    parts = list(
        openai_client.chat.completions.create(  # type: ignore[call-overload]
            model=model.name, messages=ASKED, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    said = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert said == whole.choices[0].message.content
    assert parts[-2].choices[0].finish_reason == "length"
    assert parts[-1].usage == whole.usage


def test_stop_and_sampling_are_the_library_s(openai_client: openai.OpenAI, model: Model) -> None:
    notebook = Notebook.from_messages(model, ASKED)
    notebook.prefill()
    expected = "".join(notebook.generate(max_new_tokens=12, temperature=0.9, top_p=0.8, seed=5))
    options = {"max_completion_tokens": 12, "temperature": 0.9, "top_p": 0.8, "seed": 5}
    got = openai_client.chat.completions.create(model=model.name, messages=ASKED, **options)  # type: ignore[call-overload]
    assert got.choices[0].message.content == expected
    stop = expected[3:5]
    got = openai_client.chat.completions.create(model=model.name, messages=ASKED, stop=stop, **options)  # type: ignore[call-overload]
    assert got.choices[0].message.content == expected.partition(stop)[0]
    assert got.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"top_logprobs": 2}, "invalid_request"), ({"n": 2}, "unsupported_parameter"),
        ({"tools": [{}]}, "unsupported_parameter"), ({"a_new_one": 1}, "unsupported_parameter"),
        ({"tools": 3}, "invalid_request"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter"),
        ({"messages": []}, "invalid_request"), ({"messages": "x"}, "invalid_request"), ({"model": 3}, "invalid_request"),
        ({"temperature": "hot"}, "invalid_request"), ({"max_tokens": 1.5}, "invalid_request"),
        ({"stream": 3}, "invalid_request"),
        ({"temperature": -1}, "invalid_argument"), ({"max_tokens": 0}, "invalid_argument"), ({"top_p": 2}, "invalid_argument"),
        ({"stop": [""]}, "invalid_argument"), ({"stop": 3}, "invalid_argument"), ({"seed": -1}, "invalid_argument"),
        ({"messages": [1]}, "invalid_request"), ({"messages": [{"role": "a b", "content": "x"}]}, "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_value"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "context_length_exceeded"),
        ({"model": "gpt-9"}, "model_not_found"), ({"model": "notebook:nb_none"}, "no_such_notebook"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_supported_is_refused(
    http: httpx2.Client, model: Model, change: dict[str, Any], code: str, stream: bool
) -> None:
    body = {"model": model.name, "messages": ASKED, "stream": stream, **change}
    got = http.post("/v1/chat/completions", json=body)
    assert got.status_code in (400, 404), got.text
    assert got.json()["error"]["code"] == code


def test_what_asks_for_nothing_is_taken(http: httpx2.Client, model: Model) -> None:
    neutral = {
        "n": 1,
        "logprobs": False,
        "user": "u",
        "presence_penalty": 0,
        "response_format": {"type": "text"},
        "stop": None,
    }
    got = http.post("/v1/chat/completions", json={"model": model.name, "messages": ASKED, **GREEDY, **neutral})
    assert got.status_code == 200


def test_a_notebook_is_edited_in_the_cache(http: httpx2.Client, openai_client: openai.OpenAI, model: Model) -> None:
    book = made(http)
    assert book["fields"] == {"status": "pending", "amount": "30"}
    assert book["account"]["tokens_computed"] == book["tokens"]
    path = f"/v1/notebooks/{book['id']}"
    got = http.patch(f"{path}/fields", json={"status": "shipped"})
    assert (got.json()["version"], got.headers["etag"]) == (2, '"2"')
    assert got.json()["account"]["mode_used"]
    assert got.json()["account"]["tokens_computed"] < book["tokens"]
    twin = library_s(model)
    twin.edit(status="shipped")
    twin.add("user", "May it stay?")
    answer = openai_client.chat.completions.create(  # type: ignore[call-overload]
        model=book["model"], messages=[{"role": "user", "content": "May it stay?"}], **GREEDY
    )
    assert answer.choices[0].message.content == "".join(twin.generate(max_new_tokens=8))
    assert answer.usage.prompt_tokens_details.cached_tokens == got.json()["tokens"]
    assert http.get(path).json() == {key: value for key, value in got.json().items() if key != "account"}


def test_the_same_values_again_change_nothing(http: httpx2.Client) -> None:
    book = made(http)
    path = f"/v1/notebooks/{book['id']}/fields"
    first = http.patch(path, json={"status": "shipped", "amount": 31})
    again = http.patch(path, json={"status": "shipped", "amount": 31})
    assert (first.json()["version"], again.json()["version"]) == (2, 2)
    assert again.json()["account"]["tokens_computed"] == 0


def test_an_edit_meets_the_version_that_was_read(http: httpx2.Client) -> None:
    book = made(http)
    path = f"/v1/notebooks/{book['id']}"
    assert http.patch(f"{path}/fields", json={"amount": 1}, headers={"if-match": '"1"'}).status_code == 200
    late = http.patch(f"{path}/fields", json={"amount": 2}, headers={"if-match": '"1"'})
    assert (late.status_code, late.json()["error"]["code"]) == (412, "version_changed")
    assert http.get(path).json()["fields"]["amount"] == "1"
    assert http.delete(path, headers={"if-match": '"1"'}).status_code == 412
    assert http.patch(f"{path}/fields", json={"amount": 2}, headers={"if-match": "*"}).json()["version"] == 3
    assert http.delete(path, headers={"if-match": '"3"'}).status_code == 204
    assert http.get(path).status_code == 404


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"status": "lost"}, "invalid_value"), ({"none": 1}, "unknown_field"), ({"amount": "many"}, "invalid_value"),
        ({"amount": {"value": 3}}, "invalid_value"), ({"status": None}, "invalid_value"),
    ],
)  # fmt: skip
def test_a_refused_edit_leaves_the_notebook_unchanged(http: httpx2.Client, body: dict[str, Any], code: str) -> None:
    book = made(http)
    got = http.patch(f"/v1/notebooks/{book['id']}/fields", json=body)
    assert (got.status_code, got.json()["error"]["code"]) == (400, code)
    now = http.get(f"/v1/notebooks/{book['id']}").json()
    assert (now["version"], now["fields"]) == (1, book["fields"])


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []}, {"messages": None}, {"fields": []}, {"fields": {"x": 1}}, {"more": 1}, {"messages": [{"role": 3}]},
        {"fields": {"status": {"kind": "enum"}, "amount": 1}}, {"fields": {"status": {"value": "a", "trusted": True}}},
        {"fields": {"status": {"value": "a", "kind": "no"}, "amount": 1}}, {"tools": [1]}, {"template_kwargs": {"messages": 1}},
        {"tools": True}, {"template_kwargs": [1]}, {"fields": {"status": {"value": "a", "kind": "enum", "among": 3}}},
        {"fields": {"amount": {"value": 1, "at_least": "x"}}}, {"fields": {"status": {"value": "a", "charset": 5}}},
        {"fields": {"status": {"value": "a", "max_length": "x"}}}, {"fields": {"status": {"value": "a", "max_length": True}}},
        {"fields": {"status": {"value": "a", "charset": "z-a"}}}, {"fields": {"status": {"value": {"a": 1}}}},
        {"fields": {"status": {"value": "a", "kind": "enum", "among": [1, {}]}}}, {"fields": {"status": "<|im_end|>"}},
        {"messages": [{"role": "user", "content": "{status}", "tool_calls": 3}]},
        {"messages": [{"role": "user", "content": "{status}", "tool_calls": [{"function": {"name": 3}}]}]},
    ],
)  # fmt: skip
def test_a_notebook_that_cannot_be_made_is_refused(http: httpx2.Client, change: dict[str, Any]) -> None:
    got = http.post("/v1/notebooks", json={"messages": MESSAGES, "fields": FIELDS, **change})
    assert got.status_code == 400, got.text
    assert http.get("/v1/notebooks").json()["data"] == []


def test_it_says_what_its_fields_may_hold(http: httpx2.Client) -> None:
    fields = {"status": {"value": "pending", "kind": "enum", "among": ["pending", "shipped"]}, "amount": 30}
    book = http.post("/v1/notebooks", json={"messages": MESSAGES, "fields": fields}).json()
    assert book["types"] == {"status": {"kind": "enum", "among": ["pending", "shipped"]}, "amount": {"kind": "number"}}
    edited = http.patch(f"/v1/notebooks/{book['id']}/fields", json={"status": "shipped"}).json()
    assert edited["types"] == book["types"]


def test_a_fork_goes_its_own_way(http: httpx2.Client) -> None:
    book = made(http)
    other = http.post(f"/v1/notebooks/{book['id']}/fork").json()
    http.patch(f"/v1/notebooks/{other['id']}/fields", json={"status": "shipped"})
    assert http.get(f"/v1/notebooks/{book['id']}").json()["fields"]["status"] == "pending"
    assert {each["id"] for each in http.get("/v1/notebooks").json()["data"]} == {book["id"], other["id"]}


def test_the_number_of_notebooks_is_bounded(http: httpx2.Client) -> None:
    books = [made(http) for _ in range(6)]
    for got in (
        http.post("/v1/notebooks", json={"messages": MESSAGES, "fields": FIELDS}),
        http.post(f"/v1/notebooks/{books[0]['id']}/fork"),
    ):
        assert (got.status_code, got.json()["error"]["code"]) == (429, "notebooks_full")
    http.delete(f"/v1/notebooks/{books[0]['id']}")
    assert made(http)


def test_answers_leave_a_notebook_unchanged(http: httpx2.Client, server: Running) -> None:
    book = made(http)
    before = http.get(f"/v1/notebooks/{book['id']}").json()
    ask = {"model": book["model"], "messages": [{"role": "user", "content": "so?"}], "temperature": 0}
    first = http.post("/v1/chat/completions", json={**ask, "max_tokens": 8}).json()["choices"]
    with http.stream("POST", "/v1/chat/completions", json={**ask, "stream": True, "max_tokens": 1500}) as got:
        next(got.iter_raw())  # then the client leaves
    for bad in ([{"role": "user", "content": "word " * 3000}], [{"role": "user", "content": "a"}, {"role": "x y"}]):
        assert http.post("/v1/chat/completions", json={**ask, "messages": bad}).status_code == 400
    wait_until(lambda: http.get(f"/v1/notebooks/{book['id']}").json() == before)
    assert http.post("/v1/chat/completions", json={**ask, "max_tokens": 8}).json()["choices"] == first


def test_a_notebook_in_use_keeps_edits_waiting_but_not_for_ever(
    http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = made(http)
    go = threading.Event()
    generate = Notebook.generate

    def slowly(self: Notebook, *args: Any, **options: Any) -> Iterator[str]:
        yield from generate(self, *args, **options)
        while not go.wait(0.02):
            yield "."

    monkeypatch.setattr(Notebook, "generate", slowly)
    ask = {"model": book["model"], "messages": [{"role": "user", "content": "so?"}], "stream": True, "max_tokens": 4}
    with http.stream("POST", "/v1/chat/completions", json=ask) as got:
        parts = got.iter_raw()  # keep a reference: a garbage-collected stream is closed
        next(parts)
        late = http.patch(f"/v1/notebooks/{book['id']}/fields", json={"amount": 9})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "notebook_busy")
    go.set()
    wait_until(lambda: http.patch(f"/v1/notebooks/{book['id']}/fields", json={"amount": 9}).status_code == 200)


def test_a_full_context_ends_a_stream_with_an_error(
    http: httpx2.Client, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflows(*_: Any, **__: Any) -> Iterator[str]:
        yield "a"
        raise ContextOverflowError("no room")

    monkeypatch.setattr(Notebook, "generate", overflows)
    got = http.post("/v1/chat/completions", json={"model": model.name, "messages": ASKED, "stream": True})
    assert '"code": "context_length_exceeded"' in got.text
    assert "[DONE]" not in got.text


def test_a_fault_is_a_typed_error_without_text(
    http: httpx2.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(*_: Any, **__: Any) -> None:
        raise RuntimeError("a private text")

    monkeypatch.setattr(Notebook, "prefill", breaks)
    got = http.post("/v1/notebooks", json={"messages": MESSAGES, "fields": FIELDS})
    assert (got.status_code, got.json()["error"]["code"]) == (500, "internal_error")
    assert "private" not in got.text + caplog.text
    assert "RuntimeError" in caplog.text
    monkeypatch.undo()
    assert made(http)


def test_too_many_operations_are_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    begun = threading.Event()
    prefill = Notebook.prefill

    def slowly(self: Notebook) -> Any:
        begun.set()
        go.wait(10)
        return prefill(self)

    monkeypatch.setattr(Notebook, "prefill", slowly)
    settings = LocalSettings(port=0, limits=Limits(max_waiting=0))
    with running(settings, local_app(model, settings)) as server:
        results: list[int] = []

        def make() -> None:
            results.append(httpx2.post(f"{server.url}/v1/notebooks", json={"messages": ASKED}, timeout=20).status_code)

        first = threading.Thread(target=make)
        first.start()
        assert begun.wait(10)
        got = httpx2.post(f"{server.url}/v1/notebooks", json={"messages": ASKED})
        assert (got.status_code, got.json()["error"]["code"], got.headers["retry-after"]) == (429, "model_busy", "1")
        go.set()
        first.join()
    assert results == [201]


def test_tenants_see_only_their_own(model: Model) -> None:
    keys = {name: new_key(name) for name in ("one", "two")}
    known = tuple(ApiKey(name, line.partition(":")[2]) for name, (_, line) in keys.items())
    settings = LocalSettings(port=0, keys=known)
    with running(settings, local_app(model, settings)) as server:
        clients = {
            name: httpx2.Client(base_url=server.url, headers={"authorization": f"Bearer {key}"})
            for name, (key, _) in keys.items()
        }
        book = made(clients["one"])
        path = f"/v1/notebooks/{book['id']}"
        for got in (
            clients["two"].get(path), clients["two"].delete(path), clients["two"].post(f"{path}/fork"),
            clients["two"].patch(f"{path}/fields", json={"amount": 1}),
            clients["two"].post("/v1/chat/completions", json={"model": book["model"], "messages": ASKED}),
        ):  # fmt: skip
            assert (got.status_code, got.json()["error"]["code"]) == (404, "no_such_notebook")
        assert clients["two"].get("/v1/notebooks").json()["data"] == []
        assert httpx2.get(f"{server.url}{path}").status_code == 401
        assert httpx2.get(f"{server.url}/metrics").status_code == 401
        assert "pkv_notebooks 1.0" in clients["one"].get("/metrics").text


def test_other_routes_and_bodies_are_typed_errors(http: httpx2.Client) -> None:
    for method, path in (("POST", "/v1/embeddings"), ("PUT", "/v1/notebooks"), ("GET", "/v1/chat/completions")):
        got = http.request(method, path)
        assert (got.status_code, got.json()["error"]["code"]) == (404, "no_such_route"), path
    for body in (b"{", b"[1]", b"\xff", b"[" * 100_000):
        got = http.post("/v1/notebooks", content=body)
        assert got.json()["error"]["code"] in ("invalid_json", "invalid_request")
    assert http.get("/healthz").json() == {"status": "ok"}


def test_the_model_is_listed(openai_client: openai.OpenAI, model: Model) -> None:
    assert [each.id for each in openai_client.models.list()] == [model.name]


def test_the_page_s_code_runs(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    """The Python code of `docs/serving.md` runs against this server."""
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    assert code.count("http://127.0.0.1:8787") == 2
    names: dict[str, Any] = {}
    exec(code.replace("http://127.0.0.1:8787", server.url), names)
    assert capsys.readouterr().out.startswith("2 ")
    names["http"].delete(f"/notebooks/{names['book']['id']}")


def test_each_request_has_a_line_in_the_log_without_its_text(
    http: httpx2.Client, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """These lines are the output of `--verbose`."""
    with caplog.at_level(logging.INFO, "programmable_kv.serve"):
        book = made(http)
        body = {"model": model.name, "messages": [{"role": "user", "content": "a secret"}], "max_tokens": 1}
        http.post("/v1/chat/completions", json=body)
        http.get(f"/v1/notebooks/{book['id']}")
        wait_until(lambda: len(caplog.messages) == 3)
    said = [line.rsplit(" ", 2)[0] for line in caplog.messages]
    assert said == ["POST /v1/notebooks 201", "POST /v1/chat/completions 200", "GET /v1/notebooks/{id} 200"]
    assert "secret" not in caplog.text
