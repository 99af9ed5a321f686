"""How many requests each tenant may make: a bucket that fills evenly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from programmable_kv.serve.refusal import Refusal, RefusedError

_BURST_S = 10.0
"""as many requests at once as come in so many seconds"""


class Rates:
    """Rates of all tenants, for one event loop."""

    def __init__(
        self, per_minute: float | None, own: Mapping[str, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Args:
            per_minute: requests of a tenant without a rate of its own; None is no limit.
            own: tenants that have one.
        """
        self._per_minute = per_minute
        self._own = own
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        """tenant -> requests that it may make, and when that was so"""

    def take(self, tenant: str) -> None:
        """Count one request.

        Raises:
            RefusedError: the tenant made too many.
        """
        rate = self._own.get(tenant, self._per_minute)
        if rate is None:
            return
        now = self._clock()
        most = max(1.0, rate * _BURST_S / 60)
        left, since = self._buckets.get(tenant, (most, now))
        left = min(most, left + (now - since) * rate / 60)
        if left < 1:
            self._buckets[tenant] = (left, now)
            wait = max(1, math.ceil((1 - left) * 60 / rate))
            raise RefusedError(Refusal(429, "rate_limited", f"more than {rate:g} requests a minute: try again", wait))
        self._buckets[tenant] = (left - 1, now)
