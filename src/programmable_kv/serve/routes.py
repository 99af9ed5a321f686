"""The routes under `/v1` that the gateway distinguishes: their labels, and the form of their errors."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Dialect(StrEnum):
    """The form in which a protocol writes errors."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"


@dataclass(frozen=True, slots=True)
class Route:
    """A path under `/v1`."""

    label: str
    """its name in metrics and reports; the number of labels is fixed"""
    dialect: Dialect = Dialect.OPENAI
    observed: bool = False
    """whether its requests have a prompt that the gateway reads"""
    typed_events: bool = False
    """whether the events of its streams have names"""
    salted: bool = True
    """whether its requests may make the upstream compute and cache a prompt; true of unknown routes, to be safe"""


OTHER = Route("/v1/*")
_ROUTES = {
    route.label: route
    for route in (
        Route("/v1/chat/completions", observed=True),
        Route("/v1/completions", observed=True),
        Route("/v1/responses", observed=True, typed_events=True),
        Route("/v1/messages", Dialect.ANTHROPIC, observed=True, typed_events=True),
        Route("/v1/messages/count_tokens", Dialect.ANTHROPIC, salted=False),
        Route("/v1/embeddings"),
        Route("/v1/models"),
    )
}


def route_of(path: str) -> Route:
    """The route of a path."""
    found = _ROUTES.get(path.rstrip("/"))
    if found is not None:
        return found
    return _MESSAGES_BELOW if path.startswith("/v1/messages/") else OTHER


_MESSAGES_BELOW = Route("/v1/messages/*", Dialect.ANTHROPIC)
