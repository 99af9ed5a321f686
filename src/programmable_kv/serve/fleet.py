"""One or several equal upstreams. Requests with the same key go to the same upstream while it can be reached."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from programmable_kv.serve.address import Address
from programmable_kv.serve.metrics import Metrics
from programmable_kv.serve.refusal import UPSTREAM_UNREACHABLE, RefusedError
from programmable_kv.serve.upstream import Upstream, UpstreamAnswer, UpstreamRequest

_LOG = logging.getLogger("programmable_kv.serve")
SKIP_S = 10.0
"""Seconds for which requests skip an unreachable upstream. Then one request tries it."""
_REMEMBERED = 16_384
"""The number of keys whose latest upstream is remembered."""


@dataclass(slots=True)
class Member:
    """One upstream of a fleet."""

    number: int
    """Its position on the command line, from 1. Clients see this number instead of the address."""
    address: Address
    client: Upstream = field(repr=False)
    reachable: bool = True
    _skipped_until: float = 0.0

    def skipped(self, now: float) -> bool:
        """Whether requests skip this upstream now."""
        return not self.reachable and now < self._skipped_until

    def skip(self, now: float) -> None:
        """Skip this upstream for the next `SKIP_S` seconds."""
        self._skipped_until = now + SKIP_S

    def weight(self, key: bytes) -> bytes:
        """The weight of this upstream for a key. The upstream with the greatest weight serves the key (rendezvous
        hashing). So when an upstream is added or removed, only the keys that it serves move."""
        return blake2b(self.address.plain.encode(), key=key, digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Sent:
    """An answer, and the upstream that gave it."""

    answer: UpstreamAnswer
    member: Member
    moved: bool
    """Whether the previous request with this key went to another upstream, which has the prefix in its cache."""


class Fleet:
    """All upstreams of a gateway. Use it from one event loop."""

    def __init__(self, members: Sequence[tuple[Address, Upstream]], metrics: Metrics) -> None:
        """
        Args:
            members: at least one upstream, all with different addresses.
        """
        self.members = tuple(
            Member(number, address, client) for number, (address, client) in enumerate(members, start=1)
        )
        self._metrics = metrics
        self._latest: OrderedDict[bytes, int] = OrderedDict()
        for member in self.members:
            metrics.upstream_reachable.labels(str(member.number)).set_function(_reader(member))

    @property
    def several(self) -> bool:
        """Whether the fleet has more than one upstream."""
        return len(self.members) > 1

    async def send(self, key: bytes, build: Callable[[Address], UpstreamRequest]) -> Sent:
        """Send a request to its key's upstream, or to the next one if no connection can be made. Nothing is sent twice.

        Args:
            key: at most 64 bytes.
            build: makes the request for an upstream.

        Raises:
            RefusedError: no upstream can be reached, or the connection broke before the upstream answered.
        """
        refusal: RefusedError | None = None
        for member in self._order(key):
            if not member.reachable:  # other requests skip it while this one tries
                member.skip(time.monotonic())
            try:
                answer = await member.client.send(build(member.address))
            except RefusedError as error:
                if error.refusal.code != UPSTREAM_UNREACHABLE.code:
                    raise
                self._unreachable(member, error.refusal.message)
                refusal = error
                continue
            self._reached(member)
            return Sent(answer, member, self._remember(key, member))
        assert refusal is not None, "a fleet has members"
        raise refusal

    async def close(self) -> None:
        """Close all connections."""
        for member in self.members:
            await member.client.close()

    def health(self) -> list[dict[str, Any]]:
        """Whether each upstream could be reached at the latest try, without addresses."""
        return [{"upstream": member.number, "reachable": member.reachable} for member in self.members]

    def _order(self, key: bytes) -> list[Member]:
        """The upstreams by descending weight for a key; upstreams to skip come last."""
        now = time.monotonic()
        preferred = sorted(self.members, key=lambda member: member.weight(key), reverse=True)
        return sorted(preferred, key=lambda member: member.skipped(now))

    def _reached(self, member: Member) -> None:
        self._metrics.upstream_answers.labels(str(member.number)).inc()
        if not member.reachable:
            member.reachable = True
            _LOG.warning("upstream %d can be reached again", member.number)

    def _unreachable(self, member: Member, why: str) -> None:
        self._metrics.upstream_unreachable.labels(str(member.number)).inc()
        if member.reachable and self.several:
            _LOG.warning("upstream %d is skipped for %.0f s at a time: %s", member.number, SKIP_S, why)
        member.reachable = False
        member.skip(time.monotonic())

    def _remember(self, key: bytes, member: Member) -> bool:
        """Record the upstream of a key's request. Returns whether the previous request went to another one."""
        if not self.several:
            return False
        before = self._latest.pop(key, member.number)
        self._latest[key] = member.number
        if len(self._latest) > _REMEMBERED:
            self._latest.popitem(last=False)
        return before != member.number


def _reader(member: Member) -> Callable[[], float]:
    return lambda: float(member.reachable)
