"""The local server as an ASGI application. It serves one model in every protocol, and notebooks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict
from typing import Any, cast

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from programmable_kv.errors import ProgrammableKVError
from programmable_kv.model_queue import ModelQueue
from programmable_kv.models.load import Model
from programmable_kv.notebook.html import MEANINGS, token_runs
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.serve.access import Access, rates_of
from programmable_kv.serve.endpoint import Call, Handler, Routing, refusal_of
from programmable_kv.serve.local.answers import Answer, Piece
from programmable_kv.serve.local.chat import ChatForm
from programmable_kv.serve.local.completions import CompletionForm
from programmable_kv.serve.local.forms import Form
from programmable_kv.serve.local.kept import NotebookShelf
from programmable_kv.serve.local.messages import MessageForm
from programmable_kv.serve.local.notebooks import Entry, NotebookStore
from programmable_kv.serve.local.openapi import local_document
from programmable_kv.serve.local.responses import ResponseForm
from programmable_kv.serve.metrics import Metrics
from programmable_kv.serve.notebooks.routes import notebook_routes
from programmable_kv.serve.page import page_routes
from programmable_kv.serve.rates import Rates
from programmable_kv.serve.refusal import Refusal, RefusedError
from programmable_kv.serve.routes import OTHER, route_of
from programmable_kv.serve.routes import Route as ApiRoute
from programmable_kv.serve.settings import LocalSettings
from programmable_kv.serve.state import counted
from programmable_kv.serve.states import open_state
from programmable_kv.serve.unrouted import no_such_route
from programmable_kv.states import TokenState

_LOG = logging.getLogger("programmable_kv.serve")
_NOTEBOOK = "notebook:"
FORMS: Mapping[str, Callable[[Mapping[str, Any]], Form]] = {
    "/v1/chat/completions": ChatForm,
    "/v1/completions": CompletionForm,
    "/v1/responses": ResponseForm,
    "/v1/messages": MessageForm,
}
"""path -> the class that reads and writes its protocol"""
_PROMETHEUS = "text/plain; version=1.0.0; charset=utf-8; escaping=allow-utf-8"


class LocalServer:
    """The handlers of the routes of one model."""

    def __init__(self, model: Model, settings: LocalSettings) -> None:
        self._state = open_state(settings.state, durable=True)
        self._model = model
        self._queue = ModelQueue(max_waiting=settings.limits.max_waiting)
        self._wait_s = settings.limits.wait_s
        shelf = NotebookShelf(self._state)
        wait_s = settings.limits.wait_s
        self.notebooks = NotebookStore(model, self._queue, shelf, most=settings.max_notebooks, wait_s=wait_s)

    @property
    def waiting(self) -> int:
        """The number of operations that wait for the model."""
        return self._queue.waiting

    def close(self) -> None:
        """Let the model's running operations end, accept no more, and close the state."""
        self._queue.close()
        self._state.close()

    async def models(self, _: Call) -> Response:
        """`GET /v1/models`, in a form that OpenAI's and Anthropic's clients read."""
        model = self._as_json()
        ends = {"first_id": model["id"], "last_id": model["id"], "has_more": False}
        return JSONResponse({"object": "list", "data": [model], **ends})

    async def model(self, call: Call) -> Response:
        """`GET /v1/models/{name}`."""
        self._check_model(call.request.path_params["name"])
        return JSONResponse(self._as_json())

    def answering(self, form: Callable[[Mapping[str, Any]], Form]) -> Handler:
        """Make a protocol's handler. It waits for the first piece, so that it can refuse before the answer begins."""

        async def respond(call: Call) -> Response:
            made = form(call.body)
            answer = Answer(made.ask)
            pieces = self._pieces(call.tenant, answer)
            first = await anext(pieces, None)
            if made.ask.stream:
                return _Stream(made, answer, first, pieces, route_of(call.request.url.path))
            async with aclosing(pieces):
                found = [*([] if first is None else [first]), *[piece async for piece in pieces]]
            return JSONResponse(made.whole(answer, found))

        return respond

    async def create(self, call: Call) -> Response:
        """`POST /v1/notebooks`."""
        entry, account = await self.notebooks.create(call.tenant, call.body)
        return _told(entry, entry.as_json(account), 201)

    async def listed(self, call: Call) -> Response:
        """`GET /v1/notebooks`."""
        found = [entry.as_json() for entry in await self.notebooks.of_tenant(call.tenant)]
        return JSONResponse({"object": "list", "data": found})

    async def read(self, call: Call) -> Response:
        """`GET /v1/notebooks/{id}`."""
        entry = await self._entry(call)
        return _told(entry, entry.as_json())

    async def tokens(self, call: Call) -> Response:
        """`GET /v1/notebooks/{id}/tokens`: the text by the state of its tokens."""
        async with self.notebooks.use(await self._entry(call)) as notebook:
            runs = await self._queue.run(token_runs, notebook)
        found = {state: sum(run.tokens for run in runs if run.state is state) for state in TokenState}
        states = {state: {"tokens": n, "meaning": MEANINGS[state]} for state, n in found.items() if n}
        return JSONResponse({"runs": [asdict(run) for run in runs], "states": states})

    async def edit(self, call: Call) -> Response:
        """`PATCH /v1/notebooks/{id}/fields`."""
        entry = await self._entry(call)
        headers, query = call.request.headers, call.request.query_params
        account = await self.notebooks.edit(entry, call.body, headers.get("if-match"), query.get("mode"))
        return _told(entry, entry.as_json(account))

    async def fork(self, call: Call) -> Response:
        """`POST /v1/notebooks/{id}/fork`."""
        entry, account = await self.notebooks.fork(await self._entry(call))
        return _told(entry, entry.as_json(account), 201)

    async def delete(self, call: Call) -> Response:
        """`DELETE /v1/notebooks/{id}`."""
        await self.notebooks.delete(await self._entry(call), call.request.headers.get("if-match"))
        return Response(status_code=204)

    async def _entry(self, call: Call) -> Entry:
        return await self.notebooks.get(call.tenant, call.request.path_params["id"])

    async def _pieces(self, tenant: str, answer: Answer) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of an answer. If a caller closes the generator early, the notebook is unchanged."""
        asked = answer.ask.model
        if asked.startswith(_NOTEBOOK):
            entry = await self.notebooks.get(tenant, asked.removeprefix(_NOTEBOOK))
            entry.check_tools(answer.ask.tools)
            async with (
                self.notebooks.use(entry) as notebook,
                aclosing(self._drawn(answer.of_notebook, notebook)) as pieces,
            ):
                async for piece in pieces:
                    yield piece
            return
        self._check_model(asked)
        async with aclosing(self._drawn(answer.of_model, self._model)) as pieces:
            async for piece in pieces:
                yield piece

    def _check_model(self, name: str) -> None:
        if name != self._model.name:
            raise RefusedError(
                Refusal(
                    404, "model_not_found", f"unknown model: this server has only {self._model.name!r} and notebook:ID"
                )
            )

    def _as_json(self) -> dict[str, Any]:
        name = self._model.name
        known = {"object": "model", "created": 0, "owned_by": "programmable-kv"}
        return {"id": name, **known, "type": "model", "display_name": name, "created_at": "1970-01-01T00:00:00Z"}

    def _drawn(self, pieces: Callable[[Any], Iterator[Piece]], of: Notebook | Model) -> AsyncGenerator[Piece, None]:
        return cast("AsyncGenerator[Piece, None]", self._queue.stream(pieces, of))


class _Stream(StreamingResponse):
    """An answer as a stream of events. The notebook is released however the stream ends, even if it never began."""

    def __init__(
        self, form: Form, answer: Answer, first: Piece | None, pieces: AsyncGenerator[Piece, None], route: ApiRoute
    ) -> None:
        super().__init__(_events(form, answer, first, pieces, route), media_type="text/event-stream")
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._pieces.aclose()


def local_app(model: Model, settings: LocalSettings) -> Starlette:
    """Make the application that serves one model."""
    access, metrics = Access(settings.keys), Metrics()
    rates = Rates(settings.limits.per_minute, rates_of(settings.keys))
    server = LocalServer(model, settings)
    metrics.watch("waiting", "operations waiting for the model", lambda: float(server.waiting))
    metrics.watch("notebooks", "stored notebooks", lambda: counted(server.notebooks))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(server.close)

    routing = Routing(access, settings.limits, metrics, rates)
    route = routing.route

    async def measured(_: Call) -> Response:
        return Response(await asyncio.to_thread(metrics.text), media_type=_PROMETHEUS)

    async def described(_: Call) -> Response:
        return JSONResponse(local_document())

    return Starlette(
        routes=[
            *page_routes(local=True),
            route("GET", "/v1/models", server.models, None),
            route("GET", "/v1/models/{name:path}", server.model, None),
            *(route("POST", path, server.answering(form), None) for path, form in FORMS.items()),
            *notebook_routes(server, routing),
            route("GET", "/v1/notebooks/{id}/tokens", server.tokens),
            route("GET", "/metrics", measured),
            route("GET", "/openapi.json", described),
            Route("/healthz", _healthy),
            routing.nothing("/v1/{rest:path}", OTHER.label),
        ],
        lifespan=lifespan,
        exception_handlers={404: no_such_route, 405: no_such_route},
    )


async def _events(
    form: Form, answer: Answer, first: Piece | None, pieces: AsyncIterator[Piece], route: ApiRoute
) -> AsyncIterator[bytes]:
    for event in form.begin(answer):
        yield event
    try:
        if first is not None:
            for event in form.said(answer, first):
                yield event
        async for piece in pieces:
            for event in form.said(answer, piece):
                yield event
    except ProgrammableKVError as error:  # the context is full
        refusal = refusal_of(error)
        _LOG.warning("an answer ended early (%s)", refusal.code)
        yield refusal.event(route)
        return
    for event in form.finish(answer):
        yield event


def _told(entry: Entry, data: Mapping[str, Any], status: int = 200) -> Response:
    return JSONResponse(data, status, {"etag": entry.etag})


def _healthy(_: Request) -> Response:
    return JSONResponse({"status": "ok"})
