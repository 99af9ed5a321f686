"""What was found about one request, and sums of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from programmable_kv.explain.pieces import Usage
from programmable_kv.explain.report import RequestFinding
from programmable_kv.serve.remedies import Remedy, remedy_of


class Outcome(StrEnum):
    """What became of the prefix that was sent before."""

    HIT = "hit"
    """the request kept it"""
    MISS = "miss"
    """it was, or will be, computed again"""
    NEW = "new"
    """there was none"""
    UNKNOWN = "unknown"
    """the server holds the conversation: there is nothing to compare"""


_NEW = ("first request", "new conversation")
_UNKNOWN = ("stored conversation",)


@dataclass(frozen=True, slots=True)
class Observation:
    """One request. It holds no text of the prompt."""

    tenant: str
    route: str
    outcome: Outcome
    cause: str
    place: str
    path: str
    fix: str
    usage: Usage | None
    """the upstream's own numbers; None where it sent none"""
    lost_tokens: int | None
    """at most; None where the upstream's numbers do not say"""
    lost_money: float | None = None
    """what those cost, at most; None where that or the model's price is not known"""

    @classmethod
    def of(cls, finding: RequestFinding, fix: str, usage: Usage | None, *, tenant: str, route: str) -> Observation:
        """From a finding of `explain`."""
        outcome = Outcome.MISS if finding.missed else Outcome.HIT
        if not finding.missed and finding.cause in (*_NEW, *_UNKNOWN):
            outcome = Outcome.NEW if finding.cause in _NEW else Outcome.UNKNOWN
        known = usage is not None and usage.cached_known
        lost = finding.lost if known else None
        money = finding.money if known and finding.missed else None
        return cls(tenant, route, outcome, finding.cause, finding.place, finding.path, fix, usage, lost, money)

    @property
    def remedy(self) -> Remedy:
        """What would have kept the prefix."""
        return remedy_of(self.cause) if self.outcome is Outcome.MISS else Remedy.NONE


@dataclass(frozen=True, slots=True)
class Miss:
    """A miss with the text around the first difference: only for whoever sent it, and only the latest."""

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
    """Requests of one class."""

    requests: int = 0
    lost_tokens_at_most: int = 0
    uncounted: int = 0
    """misses among them of which the upstream's numbers say nothing"""
    remedy: Remedy = Remedy.NONE
    place: str = ""
    """where the last of them differed"""
    path: str = ""
    fix: str = ""


@dataclass(slots=True)
class Tally:
    """Sums over requests. Tokens are the upstream's own numbers, and only of requests that it counted."""

    requests: int = 0
    hit: int = 0
    miss: int = 0
    new: int = 0
    unknown: int = 0
    counted: int = 0
    """requests for which the upstream told its input and how much of it was cached"""
    input_tokens: int = 0
    cached_tokens: int = 0
    lost_tokens_at_most: int = 0
    remediable_tokens_at_most: int = 0
    """of those lost, what a gateway that rewrites could have kept, less the line that it appends"""
    lost_money_at_most: float = 0.0
    """of those lost whose model has a price"""
    causes: dict[str, CauseTally] = field(default_factory=dict)

    def add(self, observation: Observation) -> None:
        """Count one more."""
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
        """As data, the dearest cause first."""
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
