"""The routes of notebooks, which gateways and local servers share."""

from __future__ import annotations

from typing import Protocol

from starlette.responses import Response
from starlette.routing import Route

from programmable_kv.serve.endpoint import Call, Routing


class NotebookHandlers(Protocol):
    """The handlers of the notebooks' routes."""

    async def create(self, call: Call) -> Response: ...

    async def listed(self, call: Call) -> Response: ...

    async def read(self, call: Call) -> Response: ...

    async def edit(self, call: Call) -> Response: ...

    async def fork(self, call: Call) -> Response: ...

    async def delete(self, call: Call) -> Response: ...


def notebook_routes(by: NotebookHandlers, routing: Routing) -> list[Route]:
    """Return the routes of notebooks."""
    return [
        routing.route("POST", "/v1/notebooks", by.create),
        routing.route("GET", "/v1/notebooks", by.listed),
        routing.route("GET", "/v1/notebooks/{id}", by.read),
        routing.route("DELETE", "/v1/notebooks/{id}", by.delete),
        routing.route("PATCH", "/v1/notebooks/{id}/fields", by.edit, ("mode",)),
        routing.route("POST", "/v1/notebooks/{id}/fork", by.fork),
    ]
