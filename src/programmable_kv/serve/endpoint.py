"""What all routes that a server answers itself share: access, reading of JSON, and typed errors."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from programmable_kv.errors import (
    ContextOverflowError,
    InputError,
    ProgrammableKVError,
    QueueFullError,
)
from programmable_kv.serve.access import Access
from programmable_kv.serve.checks import check_query
from programmable_kv.serve.incoming import check_length, read_body, while_connected
from programmable_kv.serve.metrics import Metrics
from programmable_kv.serve.rates import Rates
from programmable_kv.serve.reading import LONG_BODY, json_of
from programmable_kv.serve.refusal import NO_SUCH_ROUTE, STATE_UNAVAILABLE, Refusal, RefusedError
from programmable_kv.serve.reply import ClientGoneError, Reply
from programmable_kv.serve.routes import route_of
from programmable_kv.serve.settings import Limits
from programmable_kv.serve.state import StateUnavailableError
from programmable_kv.serve.stopwatch import Stopwatch

_LOG = logging.getLogger("programmable_kv.serve")


@dataclass(frozen=True, slots=True)
class Call:
    """One request."""

    tenant: str
    request: Request
    body: Mapping[str, Any] = field(repr=False)


Handler = Callable[[Call], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An ASGI application for one route."""

    label: str
    handle: Handler
    access: Access
    limits: Limits
    metrics: Metrics
    rates: Rates
    query: tuple[str, ...] | None
    """query parameters that the route takes; None takes any, for protocols whose clients add their own"""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        watch = Stopwatch()
        answered: list[Response] = []
        try:
            call = await self._call(scope, receive)
            try:
                await while_connected(self._answer(call, answered), receive, Reply(send))
            except ProgrammableKVError as error:
                raise RefusedError(refusal_of(error)) from error
            except (RefusedError, ClientGoneError):
                raise
            except Exception as error:  # a fault of ours: the client gets a typed error, the log its class and no text
                _LOG.error("a request failed (%s)", type(error).__name__)
                raise RefusedError(
                    Refusal(500, "internal_error", "the server failed to process this request")
                ) from error
            response = answered[0]
        except ClientGoneError:
            self.metrics.client_gone.labels(self.label).inc()
            return
        except RefusedError as error:
            refusal = error.refusal
            self.metrics.refused.labels(self.label, refusal.code).inc()
            dialect = route_of(scope["path"]).dialect
            headers = {name.decode(): value.decode() for name, value in refusal.headers(dialect)}
            response = Response(refusal.body(dialect), refusal.status, headers)
        await response(scope, receive, send)
        seconds = watch.total
        self.metrics.requests.labels(self.label, str(response.status_code)).inc()
        self.metrics.seconds.labels(self.label).observe(seconds)
        _LOG.info("%s %s %s %.1f ms", scope["method"], self.label, response.status_code, 1000 * seconds)

    async def _call(self, scope: Scope, receive: Receive) -> Call:
        headers = tuple(scope["headers"])
        tenant = self.access.admit(headers).tenant
        self.rates.take(tenant)
        request = Request(scope)
        if self.query is not None:
            check_query(request, self.query)
        check_length(headers, self.limits.max_body_bytes)
        data = await read_body(receive, self.limits.max_body_bytes, self.limits.body_s)
        body = await asyncio.to_thread(_object_of, data) if len(data) > LONG_BODY else _object_of(data)
        return Call(tenant, request, body)

    async def _answer(self, call: Call, answered: list[Response]) -> None:
        answered.append(await self.handle(call))


@dataclass(frozen=True, slots=True)
class Routing:
    """Makes the routes of one server, with the same access, limits and metrics."""

    access: Access
    limits: Limits
    metrics: Metrics
    rates: Rates

    def route(self, method: str, path: str, handle: Handler, query: tuple[str, ...] | None = ()) -> Route:
        """One route for one method. `query` names the query parameters that it takes; None takes any."""
        return Route(path, self._endpoint(path, handle, query), methods=[method])

    def nothing(self, path: str, label: str) -> Route:
        """A route that answers every method with 404 `no_such_route`."""
        return Route(path, self._endpoint(label, _nothing, None))

    def _endpoint(self, label: str, handle: Handler, query: tuple[str, ...] | None) -> Endpoint:
        return Endpoint(label, handle, self.access, self.limits, self.metrics, self.rates, query)


async def _nothing(_: Call) -> Response:
    raise RefusedError(NO_SUCH_ROUTE)


def _object_of(data: bytes) -> Mapping[str, Any]:
    """
    Raises:
        RefusedError: the body is not a JSON object, or has half of a surrogate pair in it.
    """
    body: Any = {}
    if data:
        try:
            body = json_of(data)
        except (ValueError, RecursionError) as error:
            raise RefusedError(Refusal(400, "invalid_json", "the body is not JSON")) from error
        _check_text(body, data)
    if not isinstance(body, Mapping):
        raise RefusedError(Refusal(400, "invalid_request", "the body must be a JSON object"))
    return body


def _check_text(body: Any, data: bytes) -> None:
    """
    Raises:
        RefusedError: a text has half of a surrogate pair. JSON can write one; UTF-8 cannot, and no tokenizer reads it.
    """
    if b"\\u" in data:
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise RefusedError(
                Refusal(400, "invalid_request", "a text has an unpaired surrogate: remove it")
            ) from error


def refusal_of(error: ProgrammableKVError) -> Refusal:
    """The HTTP error for an error of the library. Its message says what was found, what was expected, and what to do."""
    if isinstance(error, QueueFullError):
        return Refusal(429, "model_busy", str(error), 1)
    if isinstance(error, StateUnavailableError):
        return STATE_UNAVAILABLE
    if isinstance(error, ContextOverflowError):
        return Refusal(400, "context_length_exceeded", str(error))
    code = type(error).__name__.removesuffix("Error")
    snake = "".join(f"_{char.lower()}" if char.isupper() else char for char in code).lstrip("_")
    return Refusal(400 if isinstance(error, InputError) else 422, snake, str(error))
