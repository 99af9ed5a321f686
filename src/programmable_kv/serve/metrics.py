"""Prometheus metrics of one gateway. No label holds anything that a client can choose freely."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from programmable_kv.serve.observation import Observation, Outcome
from programmable_kv.serve.remedies import Remedy
from programmable_kv.serve.report import ObserverState

_OWN = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)
_LONG = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0)


class Metrics:
    """What is counted, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "answered requests", "route", "status")
        self.refused = self._counter(
            "refused", "requests that this server answered with an error of its own", "route", "code"
        )
        self.upstream_failures = self._counter("upstream_failures", "failures of the upstream", "route", "code")
        self.upstream_answers = self._counter(
            "upstream_answers", "answers of each upstream, by the upstream's number", "upstream"
        )
        self.upstream_unreachable = self._counter(
            "upstream_unreachable", "failed connections to each upstream", "upstream"
        )
        self.upstream_reachable = Gauge(
            "pkv_upstream_reachable", "0 while requests skip an upstream", ("upstream",), registry=self.registry
        )
        self.client_gone = self._counter(
            "client_gone", "clients that disconnected before their answer was complete", "route"
        )
        self.own_seconds = self._histogram("own_seconds", "the gateway's own time before an answer begins", _OWN)
        self.headers_seconds = self._histogram(
            "upstream_headers_seconds", "time until the upstream's headers arrive", _LONG
        )
        self.seconds = self._histogram("request_seconds", "time until an answer is complete", _LONG)
        self.observed = self._counter("observed", "observed requests", "route", "outcome", "cause")
        self.input_tokens = self._counter("input_tokens", "input tokens, as counted by the upstream", "route")
        self.cached_tokens = self._counter(
            "cached_tokens", "input tokens read from the upstream's cache, as counted by the upstream", "route"
        )
        self.lost_tokens = self._counter(
            "lost_tokens_at_most",
            "upper bound on the input tokens that were recomputed although they were sent before",
            "route",
            "cause",
        )
        self.actions = self._counter("actions", "actions of the modes that rewrite", "route", "action")
        self.rebases = self._counter("rebases", "outcomes of rebases in the background", "route", "outcome")
        self.gained_tokens = self._counter(
            "gained_tokens_estimate",
            "estimate of the input tokens read from the upstream's cache because of rewriting, less those it added",
            "route",
        )
        self.rewriting_lost_tokens = self._counter(
            "rewriting_lost_tokens_estimate",
            "estimate of the input tokens that rewriting added and did not save",
            "route",
        )
        self.remediable_tokens = self._counter(
            "remediable_tokens_at_most",
            "upper bound on the recomputed input tokens that rewriting could have kept",
            "route",
        )

    def watch(self, name: str, what: str, read: Callable[[], float]) -> None:
        """A gauge that is read when somebody looks."""
        Gauge(f"pkv_{name}", what, registry=self.registry).set_function(read)

    def watch_observer(self, state: Callable[[], ObserverState]) -> None:
        """Gauges of the observer."""
        for name in ("queued_bytes", "sessions", "session_bytes", "evicted", "dropped", "failed", "unreadable"):
            self.watch(f"observer_{name}", f"the observer's {name}", _reader(state, name))

    def tell(self, observation: Observation) -> None:
        """Count an observation."""
        route = observation.route
        self.observed.labels(route, observation.outcome, observation.cause).inc()
        usage = observation.usage
        if usage is not None and usage.cached_known:
            self.input_tokens.labels(route).inc(usage.tokens)
            self.cached_tokens.labels(route).inc(usage.cached)
        if observation.outcome is Outcome.MISS and observation.lost_tokens:
            self.lost_tokens.labels(route, observation.cause).inc(observation.lost_tokens)
            if observation.remedy is not Remedy.NONE:
                self.remediable_tokens.labels(route).inc(observation.lost_tokens)

    def tell_gain(self, route: str, tokens: int) -> None:
        """Count what rewriting one request brought."""
        (self.gained_tokens if tokens >= 0 else self.rewriting_lost_tokens).labels(route).inc(abs(tokens))

    def tell_rebase(self, route: str, outcome: str) -> None:
        """Count what became of a rebase."""
        self.rebases.labels(route, outcome).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"pkv_{name}", what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"pkv_{name}", what, ("route",), buckets=buckets, registry=self.registry)


def _reader(state: Callable[[], ObserverState], name: str) -> Callable[[], float]:
    return lambda: float(getattr(state(), name))
