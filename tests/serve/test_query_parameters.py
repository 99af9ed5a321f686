"""Query parameters: our own routes refuse unknown ones. All other routes leave them to the protocol or the upstream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import openai
import pytest

from programmable_kv.bench.tiny_chat import tiny_chat_model
from programmable_kv.serve.access import ApiKey, new_key
from programmable_kv.serve.local.server import FORMS, local_app
from programmable_kv.serve.settings import GatewaySettings, LocalSettings
from serve.http_peers import RawUpstream, Received, answer, raw_upstream, running

BOOK: dict[str, Any] = {
    "messages": [{"role": "system", "content": "Shipped orders stay. The order is {status}, for {customer}."}],
    "fields": {"status": "pending", "customer": "somebody"},
}
SAID = {"messages": [{"role": "user", "content": "Is it so?"}], "max_tokens": 2}


async def answers(_: Received) -> AsyncIterator[bytes]:
    yield answer(b'{"usage": {}}')


@pytest.fixture(scope="module")
def upstream() -> Iterator[RawUpstream]:
    with raw_upstream(answers) as found:
        yield found


@pytest.fixture(scope="module", params=["gateway", "local"])
def http(request: pytest.FixtureRequest, upstream: RawUpstream) -> Iterator[httpx2.Client]:
    """A client of each kind of server."""
    settings: Any = GatewaySettings(upstream.url, port=0)
    app = None
    if request.param == "local":
        settings = LocalSettings(port=0)
        app = local_app(tiny_chat_model(512), settings)
    with running(settings, app) as server, httpx2.Client(base_url=server.url, timeout=30) as found:
        yield found


@pytest.fixture(scope="module")
def book(http: httpx2.Client) -> str:
    got = http.post("/v1/notebooks", json=BOOK if is_local(http) else {**BOOK, "upstream_model": "m"})
    assert got.status_code == 201, got.text
    return str(got.json()["id"])


def is_local(http: httpx2.Client) -> bool:
    return http.get("/pkv/report").status_code == 404


def refused(got: httpx2.Response, name: str, takes: str) -> None:
    assert got.status_code == 400, got.text
    error = got.json()["error"]
    assert error["code"] == "unknown_query_parameter"
    assert error["message"] == f"unknown query parameter {name!r}; this route takes {takes}"


def test_a_misspelt_mode_is_refused_and_edits_nothing(http: httpx2.Client, book: str) -> None:
    fields = f"/v1/notebooks/{book}/fields"
    refused(http.patch(f"{fields}?mod=erratum", json={"status": "lost"}), "mod", "mode")
    refused(http.patch(f"{fields}?mode=erratum&Mode", json={"status": "lost"}), "Mode", "mode")
    found = http.get(f"/v1/notebooks/{book}").json()
    assert (found["fields"]["status"], found["version"]) == ("pending", 1)
    got = http.patch(f"{fields}?mode=erratum", json={"status": "shipped"})
    assert (got.status_code, got.json()["account"]["mode_asked"]) == (200, "erratum")


def test_routes_of_our_own_take_no_others(http: httpx2.Client, book: str) -> None:
    refused(http.get("/v1/notebooks?limit=2"), "limit", "none")
    refused(http.post("/v1/notebooks?mode=full", json=BOOK), "mode", "none")
    refused(http.get(f"/v1/notebooks/{book}?version=1"), "version", "none")
    refused(http.post(f"/v1/notebooks/{book}/fork?version=1"), "version", "none")
    refused(http.delete(f"/v1/notebooks/{book}?force"), "force", "none")
    more = [f"/v1/notebooks/{book}/tokens"] if is_local(http) else ["/pkv/report", "/pkv/miss"]
    for path in ("/metrics", "/openapi.json", *more):
        refused(http.get(f"{path}?since=1"), "since", "none")
        assert http.get(path).status_code == 200
    assert http.get("/healthz?time=1").status_code == 200, "a probe keeps caches away with a parameter"
    assert http.get("/?from=mail").status_code == 200
    assert len(http.get("/v1/notebooks").json()["data"]) == 1


@pytest.mark.parametrize("path", FORMS)
def test_routes_of_the_protocols_take_any(http: httpx2.Client, upstream: RawUpstream, path: str) -> None:
    body = {
        "/v1/completions": {"prompt": "so", "max_tokens": 2},
        "/v1/responses": {"input": "so", "max_output_tokens": 2},
    }.get(path, SAID)
    got = http.post(f"{path}?beta=true", json={"model": "tiny random llama", **body})
    assert got.status_code == 200, got.text
    if not is_local(http):
        assert upstream.received[-1].target == f"{path}?beta=true".encode()


def test_clients_list_models_with_parameters_of_theirs(http: httpx2.Client, upstream: RawUpstream) -> None:
    if is_local(http):
        client = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="k", max_retries=0)
        assert [each.id for each in client.models.list(extra_query={"limit": 20})] == ["tiny random llama"]
    else:
        assert http.get("/v1/models?limit=20").status_code == 200
        assert upstream.received[-1].target == b"/v1/models?limit=20"


def test_who_may_not_use_it_is_told_that_first() -> None:
    _, line = new_key("one")
    settings = GatewaySettings("http://127.0.0.1:1", port=0, keys=(ApiKey("one", line.partition(":")[2]),))
    with running(settings) as gateway:
        for path in ("/v1/notebooks", "/pkv/report"):
            assert httpx2.get(f"{gateway.url}{path}?a=1").status_code == 401
