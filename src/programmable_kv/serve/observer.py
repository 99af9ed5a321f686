"""Mode `observe`: a thread compares each request with earlier ones of its conversation, after the answer was sent."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

from programmable_kv.errors import InvalidRequestError
from programmable_kv.explain.explain import finding_of
from programmable_kv.explain.logs import LogReader
from programmable_kv.explain.measure import Basis, Meter
from programmable_kv.explain.pieces import Request
from programmable_kv.explain.prices import read_prices
from programmable_kv.serve.exchange import Exchange
from programmable_kv.serve.headers import readable, value_of
from programmable_kv.serve.observation import Miss, Observation, Outcome, Tally
from programmable_kv.serve.report import GatewayReport, ObserverState
from programmable_kv.serve.sessions import Sessions

_LOG = logging.getLogger("programmable_kv.serve")
_KEPT_OF_BODY = ("cache_control",)
"""The keys of a body that the classes of causes read, besides its pieces and options."""


class Observer:
    """Compares submitted exchanges in bounded memory, and sums up the findings.

    `submit` costs almost nothing and raises nothing. The comparing runs in the observer's own thread.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        max_queued_bytes: int,
        tell: Callable[[Observation], None] = lambda _: None,
    ) -> None:
        """
        Args:
            max_bytes: the most memory for earlier requests.
            max_queued_bytes: the most bytes of exchanges that may wait. Further ones are dropped and counted.
            tell: called with every observation, in the observer's thread.
        """
        self._max_queued_bytes = max_queued_bytes
        self._tell = tell
        self._sessions = Sessions(max_bytes)
        self._routes: dict[tuple[str, str], Tally] = {}
        """(tenant, route) -> sums. They outlive the conversations."""
        self._misses: dict[str, Miss] = {}
        self._since = time.time()
        self._numbers = 0
        self._state = ObserverState()
        self._lock = threading.Lock()
        self._queue: SimpleQueue[Exchange | None] = SimpleQueue()
        self._meter = Meter(Basis.UPSTREAM)
        self._prices = read_prices(None)
        self._thread = threading.Thread(target=self._work, name="programmable-kv-observer", daemon=True)
        self._thread.start()

    def submit(self, exchange: Exchange) -> None:
        """Queue an exchange, or drop and count it if too much waits already."""
        with self._lock:
            if self._state.queued_bytes + exchange.nbytes > self._max_queued_bytes:
                self._state = replace(self._state, dropped=self._state.dropped + 1)
                return
            self._state = replace(
                self._state,
                queued=self._state.queued + 1,
                queued_bytes=self._state.queued_bytes + exchange.nbytes,
            )
        self._queue.put(exchange)

    @property
    def state(self) -> ObserverState:
        """What the observer did, and what it keeps in memory."""
        return self._state

    def report(self, tenant: str, *, sessions: int = 50) -> GatewayReport:
        """The findings about one tenant's requests, with its latest conversations."""
        with self._lock:
            routes = {route: tally.as_json() for (owner, route), tally in self._routes.items() if owner == tenant}
            latest: list[dict[str, Any]] = []
            for session in self._sessions.of_tenant(tenant):
                if len(latest) == sessions:
                    break
                latest.append({"session": session.public_name, **session.tally.as_json()})
            return GatewayReport(self._since, routes, tuple(latest), self._state, self._prices.currency)

    def latest_miss(self, tenant: str) -> Miss | None:
        """The tenant's latest miss, with text from its prompts."""
        return self._misses.get(tenant)

    def close(self, timeout_s: float = 5.0) -> None:
        """Let the thread finish the waiting exchanges and end. Return after `timeout_s` at the latest."""
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while (exchange := self._queue.get()) is not None:
            observation = None
            try:
                observation = self._observe(exchange)
                if observation is not None:
                    self._tell(observation)
            except Exception as error:  # a request that cannot be observed must not end the thread
                _LOG.warning("could not observe a request (%s)", type(error).__name__)
                self._count(failed=self._state.failed + 1)
            finally:
                with self._lock:
                    self._state = replace(
                        self._state,
                        queued=self._state.queued - 1,
                        queued_bytes=self._state.queued_bytes - exchange.nbytes,
                        sessions=len(self._sessions),
                        session_bytes=self._sessions.nbytes,
                        evicted=self._sessions.evicted,
                    )

    def _observe(self, exchange: Exchange) -> Observation | None:
        request = self._request(exchange)
        if exchange.settle is not None:
            exchange.settle(request.usage if request is not None else None)
        if request is None:
            self._count(unreadable=self._state.unreadable + 1)
            return None
        session = self._sessions.find(exchange.tenant, request)
        history = self._sessions.history(session, request)
        finding, row = finding_of(request, history, self._meter, self._prices)
        tenant, route = exchange.tenant, exchange.route.label
        observation = Observation.of(finding, row.fix, request.usage, tenant=tenant, route=route)
        if observation.outcome is Outcome.MISS:
            lost = observation.lost_tokens
            where = (route, finding.cause, finding.place, finding.path)
            self._misses[tenant] = Miss(*where, lost, finding.before, finding.after, row.fix)
        with self._lock:
            self._sessions.keep(session, request)
            session.tally.add(observation)
            self._routes.setdefault((tenant, route), Tally()).add(observation)
            self._state = replace(self._state, observed=self._state.observed + 1)
        return observation

    def _request(self, exchange: Exchange) -> Request | None:
        """The request as pieces; None if it cannot be read."""
        if value_of(exchange.headers, b"content-encoding") not in (None, b"identity"):
            return None
        try:
            body = json.loads(exchange.body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(body, Mapping):
            return None
        headers = readable(exchange.headers)
        entry: dict[str, Any] = {
            "url": exchange.route.label, "headers": headers, "body": body, "timestamp": exchange.time,
        }  # fmt: skip
        reader = LogReader()
        try:
            reader.add(entry, "")
        except InvalidRequestError:
            return None
        [request] = reader.requests
        self._numbers += 1
        kept = {key: body[key] for key in _KEPT_OF_BODY if key in body}
        return replace(request, number=self._numbers, usage=exchange.answer.usage(exchange.encoding), body=kept)

    def _count(self, **changes: int) -> None:
        with self._lock:
            self._state = replace(self._state, **changes)
