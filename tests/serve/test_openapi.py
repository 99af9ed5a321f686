"""schemathesis checks the servers against their OpenAPI descriptions: no server errors, and answers as described."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from programmable_kv.bench.tiny_chat import tiny_chat_model
from programmable_kv.serve.local.openapi import local_document
from programmable_kv.serve.local.server import local_app
from programmable_kv.serve.openapi import gateway_document
from programmable_kv.serve.settings import GatewaySettings, LocalSettings
from serve.http_peers import running

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
SESSION = requests.Session()
SAID = [{"role": "user", "content": "so"}]
GOOD: dict[str, Any] = {
    "/v1/chat/completions": {"messages": SAID},
    "/v1/completions": {"prompt": "so"},
    "/v1/responses": {"input": "so"},
    "/v1/messages": {"messages": SAID},
}
LIMITS = {"/v1/responses": "max_output_tokens"}
FUZZED = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

local = schemathesis.openapi.from_dict(local_document())
gateway = schemathesis.openapi.from_dict(gateway_document())


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """Run a local server with a notebook."""
    model = tiny_chat_model(512)
    serving = LocalSettings(port=0, max_notebooks=4)
    with running(serving, local_app(model, serving)) as found:
        body = {"messages": [{"role": "system", "content": "It is {status}."}], "fields": {"status": "new"}}
        book = httpx2.post(f"{found.url}/v1/notebooks", json=body).json()
        yield {"url": found.url, "model": model.name, "id": book["id"], "notebook": book["model"]}


@pytest.fixture(scope="module")
def front() -> Iterator[dict[str, str]]:
    """Run a gateway with a notebook."""
    with running(GatewaySettings("http://127.0.0.1:1", port=0, max_notebooks=4)) as found:
        body = {"upstream_model": "m", "messages": [{"role": "system", "content": "It is {status}."}]}
        book = httpx2.post(f"{found.url}/v1/notebooks", json={**body, "fields": {"status": "new"}}).json()
        yield {"url": found.url, "id": book["id"]}


@pytest.mark.slow
@local.parametrize()
@FUZZED
def test_the_local_server_keeps_to_its_description(case: Any, server: dict[str, str]) -> None:
    """Two thirds of the cases name the existing model or notebook. Half of these put one drawn member into a valid
    request. All answers are short."""
    body, path = case.body, case.path
    if isinstance(body, dict) and body and path in GOOD:
        size, keep = len(str(body)), sorted(body)[len(str(body)) % len(body)]
        book = "notebook" if size % 2 and path != "/v1/completions" else "model"
        case.body = [body, {**body, "model": server[book]}, {**GOOD[path], keep: body[keep], "model": server[book]}][
            size % 3
        ]
        case.body = {**case.body, LIMITS.get(path, "max_tokens"): 2}
    elif isinstance(body, dict) and body and path.endswith("/fields"):
        case.body = {"status": next(iter(body.values()))} if len(str(body)) % 3 else body
    if "id" in (case.path_parameters or {}) and len(case.path_parameters["id"]) % 2 and case.method != "DELETE":
        case.path_parameters["id"] = server["id"]
    if "name" in (case.path_parameters or {}) and len(case.path_parameters["name"]) % 2:
        case.path_parameters["name"] = server["model"]
    response = case.call(base_url=server["url"], session=SESSION)
    case.validate_response(response, checks=CHECKS)
    if case.method == "POST" and response.status_code == 201:
        httpx2.delete(f"{server['url']}/v1/notebooks/{response.json()['id']}")


@gateway.parametrize()
@FUZZED
def test_the_gateways_own_routes_keep_to_their_description(case: Any, front: dict[str, str]) -> None:
    """Every other case uses the existing notebook."""
    body = case.body
    if isinstance(body, dict) and body and case.path.endswith("/fields"):
        case.body = {"status": next(iter(body.values()))} if len(str(body)) % 3 else body
    if "id" in (case.path_parameters or {}) and len(case.path_parameters["id"]) % 2 and case.method != "DELETE":
        case.path_parameters["id"] = front["id"]
    response = case.call(base_url=front["url"])
    case.validate_response(response, checks=CHECKS)
    if case.method == "POST" and response.status_code == 201:
        httpx2.delete(f"{front['url']}/v1/notebooks/{response.json()['id']}")


def test_the_descriptions_are_served(server: dict[str, str], front: dict[str, str]) -> None:
    assert httpx2.get(f"{server['url']}/openapi.json").json() == local_document()
    assert httpx2.get(f"{front['url']}/openapi.json").json() == gateway_document()


def test_every_route_of_the_local_server_is_described() -> None:
    serving = LocalSettings(port=0)
    app = local_app(tiny_chat_model(64), serving)
    with running(serving, app):
        paths = {route.path.replace(":path", "") for route in app.routes}  # type: ignore[attr-defined]
    own = {path for path in paths if path.startswith(("/v1", "/metrics", "/healthz"))} - {"/v1/{rest}"}
    assert own == set(local_document()["paths"])


def test_a_route_that_breaks_its_description_is_found(server: dict[str, str]) -> None:
    """The negative witness: the checks fail for a description that promises another answer."""
    wrong = local_document()
    wrong["paths"] = {
        "/healthz": {"get": {**wrong["paths"]["/healthz"]["get"], "responses": {"204": {"description": ""}}}}
    }
    schema = schemathesis.openapi.from_dict(wrong)
    case = schema["/healthz"]["GET"].Case()
    response = case.call(base_url=server["url"])
    with pytest.raises(FailureGroup) as found:
        case.validate_response(response, checks=CHECKS)
    assert "Undocumented status code" in str(found.value.exceptions[0])
