"""The finding about one request, and sums of findings over requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from programmable_kv.explain.pieces import Usage
from programmable_kv.explain.report import RequestFinding
from programmable_kv.serve.remedies import Remedy, remedy_of


class Outcome(StrEnum):
    """Whether a request reuses the prefix that an earlier request sent."""

    HIT = "hit"
    """The request keeps the prefix."""
    MISS = "miss"
    """The prefix was, or will be, recomputed."""
    NEW = "new"
    """No earlier request sent a prefix."""
    UNKNOWN = "unknown"
    """The server stores the conversation, so the request does not contain text to compare."""


_NEW = ("first request", "new conversation")
_UNKNOWN = ("stored conversation",)


@dataclass(frozen=True, slots=True)
class Observation:
    """The finding about one request. It contains no text of the prompt."""

    tenant: str
    route: str
    outcome: Outcome
    cause: str
    place: str
    path: str
    fix: str
    usage: Usage | None
    """The upstream's usage numbers; None if it sent none."""
    lost_tokens: int | None
    """An upper bound on the tokens that were recomputed although an earlier request sent them; None if the upstream
    does not say how many were cached."""
    lost_money: float | None = None
    """An upper bound on the cost of the lost tokens; None without a miss, or if the tokens or the price are unknown."""

    @classmethod
    def of(cls, finding: RequestFinding, fix: str, usage: Usage | None, *, tenant: str, route: str) -> Observation:
        """Make an observation from a finding of `explain`."""
        outcome = Outcome.MISS if finding.missed else Outcome.HIT
        if not finding.missed and finding.cause in (*_NEW, *_UNKNOWN):
            outcome = Outcome.NEW if finding.cause in _NEW else Outcome.UNKNOWN
        known = usage is not None and usage.cached_known
        lost = finding.lost if known else None
        money = finding.money if known and finding.missed else None
        return cls(tenant, route, outcome, finding.cause, finding.place, finding.path, fix, usage, lost, money)

    @property
    def remedy(self) -> Remedy:
        """The change by which a gateway could have kept the prefix."""
        return remedy_of(self.cause) if self.outcome is Outcome.MISS else Remedy.NONE


@dataclass(frozen=True, slots=True)
class Miss:
    """A miss with the text around the first difference. Only its tenant sees it, and only the latest one is kept."""

    route: str
    cause: str
    place: str
    path: str
    lost: int | None
    before: str = field(repr=False)
    after: str = field(repr=False)
    fix: str


@dataclass(slots=True)
class CauseTally:
    """Sums over the requests with one class of cause."""

    requests: int = 0
    lost_tokens_at_most: int = 0
    uncounted: int = 0
    """Misses for which the upstream did not say how many tokens were cached."""
    remedy: Remedy = Remedy.NONE
    place: str = ""
    """The place of the first difference in the latest miss."""
    path: str = ""
    fix: str = ""


@dataclass(slots=True)
class Tally:
    """Sums over requests. Tokens are the upstream's own numbers, only of requests for which it sent them."""

    requests: int = 0
    hit: int = 0
    miss: int = 0
    new: int = 0
    unknown: int = 0
    counted: int = 0
    """Requests for which the upstream sent the number of input tokens and how many of them were cached."""
    input_tokens: int = 0
    cached_tokens: int = 0
    lost_tokens_at_most: int = 0
    remediable_tokens_at_most: int = 0
    """The lost tokens that a rewriting gateway could have kept. The line that it would append is not subtracted."""
    lost_money_at_most: float = 0.0
    """The cost of the lost tokens of models with a known price."""
    causes: dict[str, CauseTally] = field(default_factory=dict)

    def add(self, observation: Observation) -> None:
        """Add one observation to the sums."""
        self.requests += 1
        setattr(self, observation.outcome, getattr(self, observation.outcome) + 1)
        usage = observation.usage
        if usage is not None and usage.cached_known:
            self.counted += 1
            self.input_tokens += usage.tokens
            self.cached_tokens += usage.cached
        cause = self.causes.setdefault(observation.cause, CauseTally())
        cause.requests += 1
        if observation.outcome is not Outcome.MISS:
            return
        lost = observation.lost_tokens
        cause.uncounted += lost is None
        cause.lost_tokens_at_most += lost or 0
        cause.remedy, cause.place, cause.path = observation.remedy, observation.place, observation.path
        cause.fix = observation.fix
        self.lost_tokens_at_most += lost or 0
        self.lost_money_at_most += observation.lost_money or 0.0
        if observation.remedy is not Remedy.NONE:
            self.remediable_tokens_at_most += lost or 0

    def as_json(self) -> dict[str, Any]:
        """The sums as JSON data. The cause with the most lost tokens comes first."""
        ranked = sorted(self.causes.items(), key=lambda item: (-item[1].lost_tokens_at_most, -item[1].requests))
        return {
            "requests": self.requests,
            "hit": self.hit,
            "miss": self.miss,
            "new": self.new,
            "unknown": self.unknown,
            "counted_by_upstream": self.counted,
            "input_tokens": self.input_tokens,
            "cached_tokens": self.cached_tokens,
            "lost_tokens_at_most": self.lost_tokens_at_most,
            "remediable_tokens_at_most": self.remediable_tokens_at_most,
            "lost_money_at_most": round(self.lost_money_at_most, 6),
            "causes": {name: _cause(tally) for name, tally in ranked},
        }


def _cause(tally: CauseTally) -> dict[str, Any]:
    found: dict[str, Any] = {"requests": tally.requests}
    if tally.fix:
        found |= {
            "lost_tokens_at_most": tally.lost_tokens_at_most,
            "not_counted_by_upstream": tally.uncounted,
            "would": tally.remedy,
            "place": tally.place,
            "path": tally.path,
            "fix": tally.fix,
        }
    return found
