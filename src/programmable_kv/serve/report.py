"""The report of a gateway, which `/pkv/report` shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

_NOTES = (
    "Tokens are the upstream's own usage numbers. A stream has them only if the client asks for them "
    "(stream_options.include_usage), and cached tokens only if the server reports them.",
    "Lost tokens are an upper bound: text that is new in both requests cannot be distinguished from text that is not.",
    "Requests are compared as the upstream received them. `would` says what would have kept the prefix: `erratum` (the earlier "
    "text again, and one appended line), `resend` (the earlier form or order again), `none`.",
)


@dataclass(frozen=True, slots=True)
class ObserverState:
    """What the observer did, and what it keeps in memory."""

    observed: int = 0
    unreadable: int = 0
    """requests whose body is compressed, is not JSON, or has no prompt"""
    dropped: int = 0
    """requests left out because too much was waiting"""
    failed: int = 0
    """requests at which the observer itself failed"""
    queued: int = 0
    queued_bytes: int = 0
    sessions: int = 0
    session_bytes: int = 0
    evicted: int = 0
    """conversations forgotten to make room"""


@dataclass(frozen=True, slots=True)
class GatewayReport:
    """One tenant's report. It has no text of a prompt in it."""

    since: float
    """seconds since the epoch"""
    routes: Mapping[str, Mapping[str, Any]]
    sessions: tuple[Mapping[str, Any], ...] = field(repr=False)
    """the latest conversations first"""
    observer: ObserverState
    currency: str = "USD"

    def as_json(self) -> dict[str, Any]:
        """As data."""
        return {
            "since": datetime.fromtimestamp(self.since, UTC).isoformat(timespec="seconds"),
            "lost_money_at_most": {self.currency: sum(route["lost_money_at_most"] for route in self.routes.values())},
            "routes": self.routes,
            "sessions": list(self.sessions),
            "observer": asdict(self.observer),
            "notes": list(_NOTES),
        }
