"""Measures whether rewriting pays, by the upstream's usage numbers: tokens gained from its cache, minus those added."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from programmable_kv.explain.pieces import Usage
from programmable_kv.explain.prices import read_prices
from programmable_kv.explain.upstream import was_unread
from programmable_kv.serve.rewriting.conversation import Form
from programmable_kv.serve.rewriting.plan import Action, Plan

_WINDOW = 16
"""How many of the latest counted requests are judged."""
_LEAST = 8
"""The fewest counted requests that are judged."""
_LEAST_TURNS = 64
"""The fewest tokens of conversation that are judged. Cache blocks and breakpoints leave so few unread anyway."""
_STRIKES = 2
"""How many new lines in one form, each with a prefix that was not read, make the form count as folded into the head."""


@dataclass(frozen=True, slots=True)
class Gain:
    """What one rewritten request gained."""

    cached: int
    """Tokens that the upstream read from its cache."""
    direct: int
    """Estimate of the tokens that it would have read from its cache for the client's own request."""
    added: int
    """Estimate of the lines' tokens."""

    @property
    def tokens(self) -> int:
        return self.cached - self.direct - self.added


@dataclass(slots=True)
class RouteGains:
    """The gains of one tenant, route and model: sums, and the latest ones."""

    actions: dict[str, int] = field(default_factory=dict)
    counted: int = 0
    cached: int = 0
    added: int = 0
    gained: int = 0
    saved_bytes: int = 0
    owed: int = 0
    """Input tokens computed in the background that `latest` does not include yet: only clients' requests are judged."""
    latest: deque[Gain] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    strikes: dict[Form, int] = field(default_factory=dict)

    @property
    def loses(self) -> bool:
        """Whether the latest requests lost more than they gained."""
        return len(self.latest) >= _LEAST and sum(gain.tokens for gain in self.latest) < 0


class Judge:
    """Adds up what rewriting gained. Thread-safe."""

    def __init__(
        self, decide: Callable[[str, str, Form, str], None], switch_off: Callable[[str, str, str], None]
    ) -> None:
        """
        Args:
            decide: called with route, model, form and verdict when a form is accepted, or is folded into the head.
            switch_off: called with a tenant, a route and a model for which rewriting loses tokens.
        """
        self._decide = decide
        self._switch_off = switch_off
        self._gains: dict[tuple[str, str, str], RouteGains] = {}
        self._lock = threading.Lock()
        self._prices = read_prices(None)

    def acted(self, tenant: str, route: str, model: str, plan: Plan) -> None:
        """Count what was done with one request."""
        with self._lock:
            gains = self._gains.setdefault((tenant, route, model), RouteGains())
            gains.actions[plan.action] = gains.actions.get(plan.action, 0) + 1
            gains.saved_bytes += plan.saved_bytes

    def judge(
        self, tenant: str, route: str, model: str, plan: Plan, sent_bytes: int, usage: Usage | None
    ) -> Gain | None:
        """Evaluate the upstream's usage numbers for a rewritten request; None if they say nothing about it.

        Args:
            sent_bytes: the length of the body that was sent.
        """
        kept = (
            plan.action in (Action.ERRATUM, Action.REPLAYED, Action.REBASE, Action.SHARED) and plan.head_bytes > 0
        )  # otherwise it was sent as new
        if not kept or usage is None or not usage.cached_known:
            return None
        per_byte = usage.tokens / max(1, sent_bytes)
        direct = round((plan.head_bytes + plan.turns_bytes - plan.saved_bytes) * per_byte)
        added = round(plan.added_bytes * per_byte)
        gain = Gain(usage.cached, min(usage.cached, max(0, direct)), added)
        with self._lock:
            gains = self._gains.setdefault((tenant, route, model), RouteGains())
            gains.counted += 1
            gains.cached += usage.cached
            gains.added += added
            gains.gained += gain.tokens
            gains.latest.append(replace(gain, added=gain.added + gains.owed))
            gains.owed = 0
            loses = gains.loses
            verdict = self._form(gains, plan, usage, per_byte)
            if loses:
                gains.latest.clear()
        if verdict and plan.note is not None:
            self._decide(route, model, plan.note.form, verdict)
        if loses:
            self._switch_off(tenant, route, model)
        return gain

    def spent(self, tenant: str, route: str, model: str, tokens: int) -> None:
        """Count input tokens that were computed in the background, for a rebase."""
        with self._lock:
            gains = self._gains.setdefault((tenant, route, model), RouteGains())
            gains.gained -= tokens
            gains.owed += tokens

    def _form(self, gains: RouteGains, plan: Plan, usage: Usage, per_byte: float) -> str:
        """The verdict on a new line's form: accepted if the upstream read the conversation before it from its cache,
        and folded if it repeatedly read only the head.

        If it did not even read the head, or the conversation is short, the numbers say nothing about the form.
        """
        head, turns = plan.head_bytes * per_byte, plan.turns_bytes * per_byte
        if plan.note is None or turns < _LEAST_TURNS or was_unread(usage.cached, round(head)):
            return ""
        form = plan.note.form
        if not was_unread(usage.cached - round(head), round(turns)):
            gains.strikes.pop(form, None)
            return "accepted"
        gains.strikes[form] = gains.strikes.get(form, 0) + 1
        return "folded" if gains.strikes[form] >= _STRIKES else ""

    def money(self, tenant: str) -> dict[str, float]:
        """Estimate of what the gained tokens are worth, by currency, for the models that have a price."""
        with self._lock:
            worth = 0.0
            for (owner, _, model), gains in self._gains.items():
                price = self._prices.price_of(model, gains.cached // max(1, gains.counted))
                if owner == tenant and price is not None:
                    worth += gains.gained * (price.input - price.read) / self._prices.per_tokens
            return {self._prices.currency: round(worth, 6)}

    def used(self, tenant: str) -> list[tuple[str, str]]:
        """The routes and models that a tenant used."""
        with self._lock:
            return sorted((route, model) for owner, route, model in self._gains if owner == tenant)

    def as_json(self, tenant: str) -> list[dict[str, Any]]:
        """What rewriting gained for one tenant."""
        with self._lock:
            return [
                {
                    "route": route,
                    "model": model,
                    "actions": dict(sorted(gains.actions.items())),
                    "counted_by_upstream": gains.counted,
                    "cached_tokens": gains.cached,
                    "added_tokens_estimate": gains.added,
                    "gained_tokens_estimate": gains.gained,
                    "saved_bytes_at_most": gains.saved_bytes,
                }
                for (owner, route, model), gains in sorted(self._gains.items())
                if owner == tenant
            ]
