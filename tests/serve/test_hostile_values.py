"""Two hundred hostile values through the notebooks' API: the server refuses each, or stores and returns it exactly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from programmable_kv import Model
from programmable_kv.bench.tiny_chat import tiny_chat_model
from programmable_kv.serve.local.server import local_app
from programmable_kv.serve.settings import LocalSettings
from serve.hostile import hostile
from serve.http_peers import Running, running

SYSTEM = "You are a shop's agent. The order is {status}, its note is {note}. Never cancel a shipped order."
USER = "The customer asks: {question}"
OTHERS = {"note": "none", "question": "where is it?"}

VALUES = hostile()
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_chat_model(4096)


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Running]:
    settings = LocalSettings(port=0, max_notebooks=4)
    with running(settings, local_app(model, settings)) as found:
        yield found


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, timeout=60) as found:
        yield found


def post(http: httpx2.Client, method: str, path: str, body: Any) -> httpx2.Response:
    """Send a body as ASCII with escapes. Halves of surrogate pairs cannot be sent in any other way."""
    return http.request(method, path, content=json.dumps(body), headers={"content-type": "application/json"})


def made(http: httpx2.Client, status: Any) -> httpx2.Response:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
    body = {"messages": messages, "fields": {"status": status, **OTHERS}}
    return post(http, "POST", "/v1/notebooks", body)


def text_of(http: httpx2.Client, path: str) -> str:
    return "".join(run["text"] for run in http.get(f"{path}/tokens").json()["runs"])


def rendered(value: str) -> str:
    """The whole expected text with a value in it. Everything around the value is always the same."""
    system = SYSTEM.format(status=value, note=OTHERS["note"])
    said = [("system", system), ("user", USER.format(question=OTHERS["question"]))]
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in said)


def test_there_are_two_hundred() -> None:
    assert len({json.dumps(value) for value in VALUES}) >= 200


def refused(got: httpx2.Response) -> bool:
    """Whether the server refused a request. Checks that it did so with a typed error."""
    if 400 <= got.status_code < 500:
        assert got.json()["error"]["code"]
        return True
    assert got.status_code < 300, got.text[:300]
    return False


def test_a_hostile_value_is_refused_or_is_data_in_its_place(http: httpx2.Client) -> None:
    taken = 0
    for value in VALUES:
        got = made(http, value)
        if refused(got):
            continue
        taken += 1
        path = f"/v1/notebooks/{got.json()['id']}"
        found = http.get(path).json()["fields"]
        assert {name: found[name] for name in OTHERS} == OTHERS, repr(value)[:80]
        _check_same(found["status"], value["value"] if isinstance(value, dict) else value)
        assert text_of(http, path) == rendered(found["status"]), repr(value)[:80]
        assert http.delete(path).status_code == 204
    assert 60 <= taken < len(VALUES), f"{taken} were taken: the test sees both"


def test_an_edit_to_a_hostile_value_changes_nothing_else(http: httpx2.Client) -> None:
    path = f"/v1/notebooks/{made(http, 'pending').json()['id']}"
    for value in VALUES:
        before, text = http.get(path).json(), text_of(http, path)
        got = post(http, "PATCH", f"{path}/fields?mode=full", {"status": value})
        after = http.get(path).json()
        if refused(got):
            assert (after, text_of(http, path)) == (before, text), repr(value)[:80]
            continue
        assert {name: after["fields"][name] for name in OTHERS} == OTHERS, repr(value)[:80]
        _check_same(after["fields"]["status"], value)
        assert text_of(http, path) == rendered(after["fields"]["status"]), repr(value)[:80]
    answer = post(
        http, "POST", "/v1/chat/completions",
        {"model": f"notebook:{path.rpartition('/')[2]}", "messages": [{"role": "assistant", "content": "x"}], "max_tokens": 2},
    )  # fmt: skip
    assert answer.status_code == 200
    assert http.delete(path).status_code == 204


def test_hostile_names_of_fields_are_typed_errors_or_names(http: httpx2.Client) -> None:
    for value in [each for each in VALUES if isinstance(each, str)]:
        body = {"messages": [{"role": "system", "content": SYSTEM}], "fields": {value: "x"}}
        refused(post(http, "POST", "/v1/notebooks", body))
        path = f"/v1/notebooks/{made(http, 'pending').json()['id']}"
        before = http.get(path).json()
        assert refused(post(http, "PATCH", f"{path}/fields", {value: "x"})) or value in before["fields"]
        http.delete(path)


def test_hostile_questions_in_every_protocol_are_answered_or_typed_errors(http: httpx2.Client, model: Model) -> None:
    """Hostile messages are data too."""
    forms: list[tuple[str, Any]] = [
        ("/v1/chat/completions", lambda text: {"messages": [{"role": "user", "content": text}], "max_tokens": 1}),
        ("/v1/responses", lambda text: {"input": [{"role": "user", "content": text}], "max_output_tokens": 1}),
        ("/v1/messages", lambda text: {"messages": [{"role": "user", "content": text}], "max_tokens": 1}),
    ]
    for number, value in enumerate(VALUES):
        path, body = forms[number % 3]
        got = post(http, "POST", path, {"model": model.name, **body(value)})
        assert got.status_code == 200 or 400 <= got.status_code < 500, (path, repr(value)[:80], got.text[:200])


def _check_same(found: str, value: Any) -> None:
    """Check that the value read back equals the given one."""
    if isinstance(value, str):
        assert found == value, repr(value)[:80]
    elif value is None:
        assert found == "none"
    else:
        assert json.loads(found.lower() if isinstance(value, bool) else found) == value, (found, value)
