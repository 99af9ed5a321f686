"""The answer to a request that fits no route."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from programmable_kv.serve.refusal import NO_SUCH_ROUTE
from programmable_kv.serve.routes import route_of


def no_such_route(request: Request, _: Exception) -> Response:
    """The typed error. It also answers paths with a line break, which fit no route pattern."""
    dialect = route_of(request.scope["path"]).dialect
    headers = {name.decode(): value.decode() for name, value in NO_SUCH_ROUTE.headers(dialect)}
    return Response(NO_SUCH_ROUTE.body(dialect), NO_SUCH_ROUTE.status, headers)
