"""OpenAPI descriptions: of the gateway's own routes, and what they share with those of the local server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
ANY: Schema = {"type": "object"}
MAYBE_TEXT: Schema = {"type": ["string", "null"]}
_ERROR = {"message": TEXT, "type": TEXT, "code": TEXT, "param": {"type": "null"}}


def record(properties: Mapping[str, Schema], *optional: str, open_ended: bool = False) -> Schema:
    """An object with these members. All but the optional ones are required."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": open_ended}


def listed(of: Schema) -> Schema:
    """A list."""
    return {"type": "array", "items": of}


OPENAI_ERROR = record({"error": record(_ERROR)})
ANTHROPIC_ERROR = record({"type": {"const": "error"}, "error": record({"type": TEXT, "message": TEXT}), "code": TEXT})


def content(schema: Schema, kind: str = "application/json") -> dict[str, Any]:
    """A body of one media type."""
    return {"content": {kind: {"schema": schema}}}


def operation(
    summary: str,
    answers: Mapping[int, Mapping[str, Any]],
    *,
    body: Schema | None = None,
    parameters: tuple[Mapping[str, Any], ...] = (),
    error: Schema = OPENAI_ERROR,
) -> dict[str, Any]:
    """One operation. Statuses 4xx and 503 are typed errors."""
    refused = {"description": "a typed error", **content(error)}
    responses = {str(status): {"description": "", **answer} for status, answer in answers.items()}
    found: dict[str, Any] = {"summary": summary, "responses": {**responses, "4XX": refused, "503": refused}}
    if body is not None:
        found["requestBody"] = {"required": True, **content(body)}
    if parameters:
        found["parameters"] = list(parameters)
    return found


def parameter(name: str, place: str, schema: Schema = TEXT) -> dict[str, Any]:
    """A parameter in the path, the query or the headers."""
    return {"name": name, "in": place, "required": place == "path", "schema": schema}


def document(title: str, paths: Mapping[str, Any]) -> dict[str, Any]:
    """A whole OpenAPI description."""
    from programmable_kv import __version__

    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


HEALTHY = operation(
    "whether the server runs",
    {200: content(record({"status": {"enum": ["ok", "degraded"]}, "upstreams": listed(ANY)}, "upstreams"))},
)
METRICS = operation("metrics for Prometheus", {200: content(TEXT, "text/plain")})


LIST = record({"object": {"const": "list"}, "data": listed(ANY)}, open_ended=True)
TEXTS: Schema = {"type": ["string", "array"], "items": record({"type": {"const": "text"}, "text": TEXT})}
MESSAGE: Schema = record({"role": {"enum": ["system", "user", "assistant", "tool"]}, "content": TEXTS}, open_ended=True)
_VALUE = {"type": ["string", "number", "boolean"]}
_FIELD = {
    "anyOf": [
        _VALUE,
        record({"value": _VALUE, "kind": TEXT, "max_length": COUNT, "charset": TEXT}, "kind", "max_length", "charset"),
    ]
}
_MADE_OF: Mapping[str, Schema] = {
    "messages": listed(MESSAGE),
    "fields": {"type": "object", "additionalProperties": _FIELD},
    "tools": {"type": ["array", "null"], "items": ANY},
    "template_kwargs": {"type": ["object", "null"]},
}
SOURCE = record(_MADE_OF, "fields", "tools", "template_kwargs")
"""what a notebook is made from"""
_LIMITS: Mapping[str, Schema] = {
    "among": listed(TEXT), "at_least": {"type": "number"}, "at_most": {"type": "number"}, "charset": TEXT, "max_length": COUNT,
}  # fmt: skip
_TYPE = record({"kind": TEXT, **_LIMITS}, *_LIMITS)
_SHOWN: Mapping[str, Schema] = {
    "id": TEXT, "object": {"const": "notebook"}, "model": TEXT, "version": COUNT,
    "fields": {"type": "object", "additionalProperties": TEXT},
    "types": {"type": "object", "additionalProperties": _TYPE}, "account": ANY,
}  # fmt: skip
NOTEBOOK = record({**_SHOWN, "tokens": COUNT}, "account")
_GATEWAY_SOURCE = record(
    {"upstream_model": {**TEXT, "minLength": 1}, **_MADE_OF, "skills": {"type": "object", "additionalProperties": TEXT}},
    "fields", "tools", "template_kwargs", "skills",
)  # fmt: skip
_USAGE = record(dict.fromkeys(("requests", "counted_by_upstream", "input_tokens", "cached_tokens"), COUNT))
_GATEWAY_NOTEBOOK = record({**_SHOWN, "upstream_model": TEXT, "skills": ANY, "usage": _USAGE}, "account")
NOTEBOOK_ID = parameter("id", "path")


def notebook_paths(source: Schema, notebook: Schema) -> dict[str, Any]:
    """The routes of notebooks that every server has."""
    match = parameter("if-match", "header")
    none: dict[str, Any] = {}
    return {
        "/v1/notebooks": {
            "get": operation("list this tenant's notebooks", {200: content(LIST)}),
            "post": operation("create a notebook", {201: content(notebook)}, body=source),
        },
        "/v1/notebooks/{id}": {
            "get": operation("read a notebook", {200: content(notebook)}, parameters=(NOTEBOOK_ID,)),
            "delete": operation("delete a notebook", {204: none}, parameters=(NOTEBOOK_ID, match)),
        },
        "/v1/notebooks/{id}/fields": {
            "patch": operation(
                "edit fields",
                {200: content(notebook)},
                body={"type": "object", "additionalProperties": _VALUE},
                parameters=(NOTEBOOK_ID, match, parameter("mode", "query")),
            )
        },
        "/v1/notebooks/{id}/fork": {
            "post": operation("make an independent copy", {201: content(notebook)}, parameters=(NOTEBOOK_ID,))
        },
    }


def gateway_document() -> dict[str, Any]:
    """The gateway's own routes. Everything under `/v1` but notebooks is the upstream's."""
    others = (
        "lost_money_at_most",
        "since",
        "currency",
        "routes",
        "sessions",
        "observer",
        "notes",
        "rewriting",
        "notebooks",
        "upstreams",
    )
    report = record({"mode": TEXT, **{name: {} for name in others}}, *others)
    texts = dict.fromkeys(("route", "cause", "place", "path", "before", "after", "fix"), TEXT)
    miss = record({**texts, "lost_tokens": {"type": ["integer", "null"]}}, *texts, "lost_tokens")
    return document(
        "programmable-kv gateway",
        {
            "/healthz": {"get": HEALTHY},
            "/metrics": {"get": METRICS},
            **notebook_paths(_GATEWAY_SOURCE, _GATEWAY_NOTEBOOK),
            "/pkv/report": {"get": operation("report on this tenant's requests", {200: content(report)})},
            "/pkv/miss": {"get": operation("the latest miss, with text of prompts", {200: content(miss)})},
        },
    )
