"""Requests under `/v1` go to the upstream byte for byte, and the answers come back the same way while they arrive."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import quote

from starlette.types import Receive, Scope, Send

from programmable_kv.explain.pieces import Usage
from programmable_kv.serve.access import Access, Admitted, rates_of
from programmable_kv.serve.address import Address
from programmable_kv.serve.admission import Admission, Uploads
from programmable_kv.serve.affinity import key_of_request, key_of_rewriting
from programmable_kv.serve.aside import Aside
from programmable_kv.serve.capture import Capture
from programmable_kv.serve.exchange import Exchange
from programmable_kv.serve.fleet import Fleet, Sent
from programmable_kv.serve.headers import Headers, credentials_of, downwards, upwards, value_of
from programmable_kv.serve.incoming import check_length, read_body, while_connected
from programmable_kv.serve.metrics import Metrics
from programmable_kv.serve.modes import GatewayMode
from programmable_kv.serve.notebooks.asking import Asking
from programmable_kv.serve.observer import Observer
from programmable_kv.serve.prober import Prober
from programmable_kv.serve.rates import Rates
from programmable_kv.serve.refusal import Refusal, RefusedError
from programmable_kv.serve.reply import ClientGoneError, Reply
from programmable_kv.serve.rewriting.plan import Action, Plan
from programmable_kv.serve.rewriting.rewriter import REFUSALS, Rewriter, Rewriting
from programmable_kv.serve.routes import Route, route_of
from programmable_kv.serve.salt import TenantSalt
from programmable_kv.serve.settings import GatewaySettings
from programmable_kv.serve.stopwatch import Stopwatch
from programmable_kv.serve.upstream import UpstreamAnswer, UpstreamRequest
from programmable_kv.serve.warmer import Warmer

_LOG = logging.getLogger("programmable_kv.serve")
_UPSTREAM_FAULTS = (502, 504)
"""statuses of refusals that are the upstream's fault"""
_LONG_BODY = 64 * 2**10
_SUCCESS = range(200, 300)


@dataclass(slots=True)
class _Job:
    """One request while it is worked on."""

    scope: Scope
    headers: Headers
    route: Route
    reply: Reply
    watch: Stopwatch = field(default_factory=Stopwatch)
    time: float = field(default_factory=time.time)
    work: Rewriting | None = None
    """what is done with it in a mode that rewrites"""
    key: bytes = b""
    """decides which of several upstreams it goes to"""
    sent: Sent | None = None
    """the answer, and which upstream gave it"""


class Forwarder:
    """An ASGI application for everything under `/v1`."""

    def __init__(
        self,
        settings: GatewaySettings,
        fleet: Fleet,
        access: Access,
        admission: Admission,
        metrics: Metrics,
        observer: Observer | None,
        rewriter: Rewriter | None,
        salt: TenantSalt | None,
        aside: Aside,
        books: Asking,
    ) -> None:
        self._limits = settings.limits
        self._mode = settings.mode
        self._modes = settings.rules.routes
        self._fleet = fleet
        self._access = access
        self._admission = admission
        self._uploads = Uploads(settings.limits.max_running + settings.limits.max_waiting)
        self._metrics = metrics
        self._observer = observer
        self._rewriter = rewriter
        self._aside = aside
        self._books = books
        self._warmer = Warmer(fleet, admission, aside)
        self._prober = Prober(aside)
        self._salt = salt
        self.rates = Rates(settings.limits.per_minute, rates_of(settings.keys))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        job = _Job(scope, tuple(scope["headers"]), route_of(scope["path"]), Reply(send, self._limits.stall_s))
        label = job.route.label
        try:
            await self._answer(job, receive)
        except ClientGoneError:
            self._metrics.client_gone.labels(label).inc()
        except RefusedError as error:
            await self._refuse(job, error.refusal)
        finally:
            seconds = job.watch.total
            self._metrics.seconds.labels(label).observe(seconds)
            self._metrics.requests.labels(label, str(job.reply.status or "none")).inc()
            _LOG.info("%s %s %s %.1f ms", scope["method"], label, job.reply.status, 1000 * seconds)

    async def _answer(self, job: _Job, receive: Receive) -> None:
        admitted = self._access.admit(job.headers)
        self.rates.take(admitted.tenant)
        _check_path(job.scope["path"])
        check_length(job.headers, self._limits.max_body_bytes)
        with self._uploads.one(admitted.tenant), job.watch.waiting("body"):
            body = await read_body(receive, self._limits.max_body_bytes, self._limits.body_s)
        with job.watch.waiting("place"):
            await self._admission.enter()
        try:
            await while_connected(self._exchange(job, admitted, body), receive, job.reply)
        finally:
            self._admission.leave()

    async def _exchange(self, job: _Job, admitted: Admitted, body: bytes) -> None:
        if job.route.observed and job.scope["method"] == "POST":
            job.work = await self._begun(admitted.tenant, job, body)
        status = None
        try:
            answer = await self._send(job, admitted, body)
            status = answer.status
            try:
                await self._pass_on(job, answer, admitted.tenant, body if job.work is None else job.work.body)
            finally:
                await answer.close()
        finally:
            self._rebase(job, admitted, status)

    def _rebase(self, job: _Job, admitted: Admitted, status: int | None) -> None:
        """Where a rebase is due, let the upstream compute the conversation's new prefix in the background."""
        work = job.work
        if work is None or work.warming is None:
            return
        if status not in _SUCCESS:
            self._warmer.give_up(work)
            return
        data = self._salting(job, admitted)(work.warming.body) or work.warming.body
        self._warmer.warm(work, job.key, partial(_request, job.scope, admitted.headers, data, True))

    def _salting(self, job: _Job, admitted: Admitted) -> Callable[[bytes], bytes | None]:
        """What puts the tenant's salt into a body; returns None where none is due. Raises as `TenantSalt.salted`."""
        salt = self._salt
        if salt is None or not job.route.salted or job.scope["method"] != "POST":
            return lambda _: None
        packed = value_of(job.headers, b"content-encoding") not in (None, b"identity")
        empty = not job.route.observed  # nothing is computed for an empty request that, say, cancels another
        return lambda data: None if empty and not data else salt.salted(data, admitted.tenant, packed=packed)

    async def close(self) -> None:
        """Stop what runs in the background."""
        await self._prober.close()
        await self._warmer.close()

    async def _begun(self, tenant: str, job: _Job, body: bytes) -> Rewriting | None:
        """How a request is rewritten; None where it is forwarded as it came.

        A fault in this, or a full disk, is logged, and the request is forwarded as it came. Requests to a notebook fail
        instead, because only the gateway knows what the notebook says.

        Raises:
            RefusedError: the notebook does not exist, or the request does not fit a notebook.
        """
        work = await self._books.begin(tenant, job.route.label, job.headers, body)
        rewriter = self._rewriter
        if work is not None or rewriter is None:
            return work
        begin = partial(rewriter.begin, tenant, job.route.label, job.headers, body)
        try:
            if len(body) > _LONG_BODY or self._aside.waits:  # others are not kept waiting
                return await self._aside.run_long(begin, undo=rewriter.abandoned)
            return begin()
        except Exception as error:
            _LOG.warning("could not rewrite a request (%s)", type(error).__name__)
            return Rewriting(
                tenant,
                job.route.label,
                Plan(Action.FORWARDED, "the gateway failed to rewrite the request"),
                body,
                rewriter,
            )

    async def _send(self, job: _Job, admitted: Admitted, body: bytes) -> UpstreamAnswer:
        """Send a request. Where the upstream refuses a rewritten one, send it in another form, and last as it came."""
        work = job.work
        job.key = await self._key(job, admitted, body) if self._fleet.several else b""
        while True:
            data = body if work is None else work.body
            if work is not None:
                data = await self._books.composed(work, data, partial(self._asked, job, admitted))
            salting = self._salting(job, admitted)
            salted = await asyncio.to_thread(salting, data) if len(data) > _LONG_BODY else salting(data)
            rewritten = salted is not None or data is not body
            build = partial(_request, job.scope, admitted.headers, data if salted is None else salted, rewritten)
            with job.watch.waiting("upstream"):
                job.sent = await self._fleet.send(job.key, build)
            answer = job.sent.answer
            if work is None or not await self._again(work, answer.status):
                break
            await answer.close()
        if work is not None:
            self._metrics.actions.labels(job.route.label, work.plan.action).inc()
            if answer.status in _SUCCESS:  # a name that a client made up, or a key that is not taken, begins nothing
                self._prober.look(work, partial(self._told_by, job, admitted))
        return answer

    async def _again(self, work: Rewriting, status: int) -> bool:
        """Whether the upstream refused a rewritten request and another body is left to try. A fault ends the trying."""
        try:
            return await self._aside.run(_refused, work, status)
        except Exception as error:
            _LOG.warning("could not store which requests the upstream accepts (%s)", type(error).__name__)
        if not work.rewritten or status not in REFUSALS:
            return False
        work.plan = Plan(Action.RESET, "the state cannot be reached")  # its own request may be taken
        return True

    async def _asked(self, job: _Job, admitted: Admitted, path: str, data: bytes) -> bytes | None:
        """The body of the upstream's answer to a request of the gateway's own; None where the answer is an error."""
        status, found = await self._told_by(job, admitted, path, data)
        return found if status in _SUCCESS else None

    async def _told_by(self, job: _Job, admitted: Admitted, path: str, data: bytes) -> tuple[int, bytes]:
        """The status and body of the upstream's answer to a request of the gateway's own. It is sent with the client's
        credentials, but without the client's other headers, which are about the client's request."""
        scope = {**job.scope, "path": path, "raw_path": path.encode(), "query_string": b""}
        headers = (*credentials_of(admitted.headers), (b"content-type", b"application/json"))
        sent = await self._fleet.send(job.key, partial(_request, scope, headers, data, True))
        try:
            found = b"".join([chunk async for chunk in sent.answer.chunks()])
        finally:
            await sent.answer.close()
        return sent.answer.status, found

    async def _pass_on(self, job: _Job, answer: UpstreamAnswer, tenant: str, body: bytes) -> None:
        capture = Capture()
        observing = self._observer is not None and self._mode_of(job.route) is not GatewayMode.PASS
        observed = observing and job.route.observed and answer.status in _SUCCESS
        try:
            await job.reply.start(answer.status, (*downwards(answer.headers), *self._told(job)))
            async for chunk in answer.chunks():
                if observed:
                    capture.add(chunk)
                await job.reply.pass_on(chunk)
            await job.reply.end()
        finally:  # also where the client or the upstream went away: the prompt was read
            if observed:
                encoding = (value_of(answer.headers, b"content-encoding") or b"").decode("latin-1").strip().lower()
                settle = self._settling(job)
                self._observe(Exchange(tenant, job.route, job.headers, body, job.time, capture, encoding, settle))

    def _observe(self, exchange: Exchange) -> None:
        """Hand an exchange to the observer. A fault there cannot harm the answer, which is complete."""
        assert self._observer is not None
        try:
            self._observer.submit(exchange)
        except Exception as error:
            _LOG.warning("could not observe a request (%s)", type(error).__name__)

    def _settling(self, job: _Job) -> Callable[[Usage | None], object] | None:
        work = job.work
        if work is None or job.sent is None or job.sent.moved:
            return None  # what another upstream's cache holds says nothing about rewriting
        return lambda usage: work.by.settle(work, usage)

    def _mode_of(self, route: Route) -> GatewayMode:
        return (
            self._modes.get(route.label, self._mode) if self._rewriter is None else self._rewriter.mode_of(route.label)
        )

    def _told(self, job: _Job) -> Headers:
        """The gateway's own headers."""
        label, watch = job.route.label, job.watch
        self._metrics.own_seconds.labels(label).observe(watch.own)
        self._metrics.headers_seconds.labels(label).observe(watch.waited("upstream"))
        return (
            (b"x-pkv-mode", self._mode_of(job.route).value.encode()),
            (b"x-pkv-did", b"forwarded"),
            *_action(job.work),
            *self._which(job),
            (b"x-pkv-own-ms", f"{1000 * watch.own:.2f}".encode()),
            (b"x-pkv-waited-ms", f"{1000 * watch.waited('place'):.2f}".encode()),
        )

    def _which(self, job: _Job) -> Headers:
        """Which of several upstreams answered."""
        if job.sent is None or not self._fleet.several:
            return ()
        return ((b"x-pkv-upstream", str(job.sent.member.number).encode()),)

    async def _key(self, job: _Job, admitted: Admitted, body: bytes) -> bytes:
        """What decides which upstream a request goes to."""
        known = key_of_rewriting(job.work) if job.work is not None else None
        if known is not None:
            return known
        find = partial(key_of_request, admitted.tenant, job.headers, body, prompt=job.route.observed)
        return await asyncio.to_thread(find) if len(body) > _LONG_BODY else find()

    async def _refuse(self, job: _Job, refusal: Refusal) -> None:
        """Say why there is no answer, or no more of it."""
        label, dialect = job.route.label, job.route.dialect
        if refusal.status in _UPSTREAM_FAULTS:
            self._metrics.upstream_failures.labels(label, refusal.code).inc()
        else:
            self._metrics.refused.labels(label, refusal.code).inc()
        _LOG.warning("%s %s: %s", job.scope["method"], label, refusal.message)
        if job.reply.status is None:
            await job.reply.start(refusal.status, refusal.headers(dialect))
            await job.reply.end(refusal.body(dialect))
        elif job.reply.takes_event:
            await job.reply.end(refusal.event(job.route))
        # Otherwise the answer stays without its end: the server closes the connection, and the client sees that it was cut.


def _refused(work: Rewriting, status: int) -> bool:
    if work.by.refused(work, status):
        return True
    work.by.answered(work, status)
    return False


def _request(scope: Scope, headers: Headers, data: bytes, rewritten: bool, address: Address) -> UpstreamRequest:
    """A request for an upstream: path and query as the client sent them, behind the upstream's own path."""
    path = scope.get("raw_path") or quote(scope["path"]).encode()
    query = scope.get("query_string", b"")
    target = address.base_path + path + (b"?" + query if query else b"")
    return UpstreamRequest(scope["method"], target, upwards(headers, address.host, data, rewritten=rewritten), data)


def _action(work: Rewriting | None) -> Headers:
    """Headers that say what a rewriting mode did, and how many bytes a prefix cache finds again because of it."""
    if work is None:
        return ()
    plan = work.plan
    said = f"{plan.action}; why={plan.why}" if plan.why else str(plan.action)
    found = ((b"x-pkv-action", said.encode()), (b"x-pkv-saved-bytes", str(plan.saved_bytes).encode()))
    skills = ((b"x-pkv-skills", work.skills.encode("ascii", "replace")),) if work.skills else ()
    warming = ((b"x-pkv-rebase", b"warming"),) if work.warming is not None else ()
    return (*found, *skills, *warming)


def _check_path(path: str) -> None:
    """Refuse paths that may lead out of `/v1` at the upstream.

    Raises:
        RefusedError: a step of the path is `.` or `..`.
    """
    if any(step in (".", "..") for step in path.split("/")):
        raise RefusedError(Refusal(400, "invalid_path", "a path must not have the segments '.' or '..'"))
