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
    """An object with these members, of which all are there but the optional ones."""
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
    """One operation. Every other status of 4xx, and 503, is a typed error."""
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
    """A whole description."""
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


def gateway_document() -> dict[str, Any]:
    """The gateway's own routes. Everything under `/v1` is the upstream's."""
    others = (
        "lost_money_at_most",
        "since",
        "currency",
        "routes",
        "sessions",
        "observer",
        "notes",
        "rewriting",
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
            "/pkv/report": {"get": operation("what was found about this tenant's requests", {200: content(report)})},
            "/pkv/miss": {"get": operation("the latest miss, with text of prompts", {200: content(miss)})},
        },
    )
