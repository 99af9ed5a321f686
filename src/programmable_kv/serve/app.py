"""The gateway as an ASGI application: its routes, and the parts that it is made of."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from programmable_kv.serve.access import Access
from programmable_kv.serve.address import Address
from programmable_kv.serve.admission import Admission
from programmable_kv.serve.aside import Aside
from programmable_kv.serve.checks import check_query
from programmable_kv.serve.endpoint import Routing
from programmable_kv.serve.fleet import Fleet
from programmable_kv.serve.forward import Forwarder
from programmable_kv.serve.metrics import Metrics
from programmable_kv.serve.notebooks.asking import Asking
from programmable_kv.serve.notebooks.composing import Composer
from programmable_kv.serve.notebooks.resource import BookResource, book_routes
from programmable_kv.serve.notebooks.shelf import BookShelf
from programmable_kv.serve.notebooks.stored import StoredTexts
from programmable_kv.serve.notebooks.telling import BookRewriter
from programmable_kv.serve.observer import Observer
from programmable_kv.serve.openapi import gateway_document
from programmable_kv.serve.page import page_routes
from programmable_kv.serve.refusal import RefusedError
from programmable_kv.serve.rewriting.heads import HeadStore
from programmable_kv.serve.rewriting.rewriter import Rewriter
from programmable_kv.serve.rewriting.store import ConversationStore
from programmable_kv.serve.rewriting.verdicts import Verdicts
from programmable_kv.serve.routes import Dialect, route_of
from programmable_kv.serve.salt import TenantSalt, secret_of
from programmable_kv.serve.settings import GatewaySettings, Limits
from programmable_kv.serve.state import counted
from programmable_kv.serve.states import open_state
from programmable_kv.serve.unrouted import no_such_route
from programmable_kv.serve.upstream import HttpUpstream

_JSON = "application/json"
_PROMETHEUS = "text/plain; version=1.0.0; charset=utf-8; escaping=allow-utf-8"


def gateway_app(settings: GatewaySettings) -> Starlette:
    """Make the application of a gateway."""
    limits = settings.limits
    state = open_state(settings.state, durable=False)  # first: it may be refused
    access = Access(settings.keys, settings.upstream_key)
    metrics = Metrics()
    observer = None
    if settings.observes:
        observer = Observer(max_bytes=limits.observed_bytes, max_queued_bytes=limits.queued_bytes, tell=metrics.tell)
        metrics.watch_observer(lambda: observer.state)
    admission = Admission(max_running=limits.max_running, max_waiting=limits.max_waiting, wait_s=limits.wait_s)
    metrics.watch("running", "requests being sent to the upstream or answered by it", lambda: float(admission.running))
    metrics.watch("waiting", "requests waiting for their turn", lambda: float(admission.waiting))
    fleet = Fleet([(address, _client(address, limits)) for address in settings.addresses], metrics)
    rewriter = None
    aside = Aside(state)
    salt = TenantSalt(secret_of(state)) if settings.salts else None
    store, verdicts = ConversationStore(state, most=limits.conversations), Verdicts(state)
    metrics.watch("conversations", "stored conversations", lambda: counted(store))
    if settings.rewrites:
        rewriter = Rewriter(
            store, verdicts, settings.rules, settings.mode, _subject(settings), metrics.tell_gain, metrics.tell_rebase,
            rebase_after=settings.rebase_after, heads=HeadStore(state), line_role=settings.line_role,
        )  # fmt: skip
    teller = BookRewriter(
        store, verdicts, _subject(settings), metrics.tell_gain, metrics.tell_rebase, rebase_after=settings.rebase_after,
        line_role=settings.line_role,
    )  # fmt: skip
    shelf = BookShelf(state, most=settings.max_notebooks)
    metrics.watch("notebooks", "stored notebooks", lambda: counted(shelf))
    tenants = {key.name for key in settings.keys}
    stored = StoredTexts(settings.skills, tenants) if settings.skills is not None else None
    books = Asking(shelf, teller, aside, Composer(stored) if stored is not None else None)
    resource = BookResource(shelf, teller, stored, most_bytes=limits.max_body_bytes)
    forwarder = Forwarder(settings, fleet, access, admission, metrics, observer, rewriter, salt, aside, books)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await forwarder.close()
            await fleet.close()
            if observer is not None:
                observer.close()
            await asyncio.to_thread(aside.close)
            state.close()

    def told(answer: Callable[[str], Response]) -> Callable[[Request], Response]:
        """A route that anybody who may use the gateway may read."""

        def respond(request: Request) -> Response:
            try:
                tenant = access.admit(tuple(request.scope["headers"])).tenant
                check_query(request, ())
            except RefusedError as error:
                refusal = error.refusal
                headers = {name.decode(): value.decode() for name, value in refusal.headers(Dialect.OPENAI)}
                return Response(refusal.body(Dialect.OPENAI), refusal.status, headers)
            return answer(tenant)

        return respond

    def report(tenant: str) -> Response:
        found: dict[str, Any] = observer.report(tenant).as_json() if observer is not None else {}
        found = {**found, "mode": settings.mode.value}
        if fleet.several:
            found["upstreams"] = fleet.health()
        if rewriter is not None:
            found["rewriting"] = rewriter.as_json(tenant)
        books_told = teller.as_json(tenant)
        if books_told["routes"]:
            found["notebooks"] = books_told
        return Response(json.dumps(found, indent=1, ensure_ascii=False), media_type=_JSON)

    def miss(tenant: str) -> Response:
        found = observer.latest_miss(tenant) if observer is not None else None
        return Response(json.dumps({} if found is None else asdict(found)), media_type=_JSON)

    return _Gateway(
        forwarder,
        routes=[
            *page_routes(),
            *book_routes(resource, Routing(access, limits, metrics, forwarder.rates)),
            Route("/v1/{rest:path}", forwarder),
            Route("/healthz", lambda _: _health(fleet)),
            Route("/metrics", told(lambda _: Response(metrics.text(), media_type=_PROMETHEUS))),
            Route("/pkv/report", told(report)),
            Route("/pkv/miss", told(miss)),
            Route("/openapi.json", told(lambda _: Response(json.dumps(gateway_document()), media_type=_JSON))),
        ],
        lifespan=lifespan,
        exception_handlers={404: no_such_route, 405: no_such_route},
    )


class _Gateway(Starlette):
    """Passes prompts to the forwarder directly: Starlette's middleware would handle every chunk of their answers."""

    def __init__(self, forwarder: Forwarder, **options: Any) -> None:
        super().__init__(**options)
        self._forwarder = forwarder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and route_of(scope["path"]).observed:
            await self._forwarder(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def _health(fleet: Fleet) -> Response:
    """Whether the gateway runs and which of several upstreams are reachable. Anybody may ask, so it shows no addresses."""
    if not fleet.several:
        return Response(b'{"status":"ok"}', media_type=_JSON)
    upstreams = fleet.health()
    status = "ok" if all(each["reachable"] for each in upstreams) else "degraded"
    return Response(json.dumps({"status": status, "upstreams": upstreams}), media_type=_JSON)


def _client(address: Address, limits: Limits) -> HttpUpstream:
    return HttpUpstream(address.url, connect_s=limits.connect_s, read_s=limits.read_s)


def _subject(settings: GatewaySettings) -> str:
    """The name under which verdicts about the upstreams are kept: one for all, as they are taken to be alike."""
    return ",".join(sorted((settings.upstream, *settings.more_upstreams)))
