"""One upstream, or several alike. Requests with the same key go to the same upstream while it can be reached."""

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
"""seconds for which an unreachable upstream is left out; then one request tries it"""
_REMEMBERED = 16_384
"""how many keys' latest upstreams are remembered"""


@dataclass(slots=True)
class Member:
    """One upstream of a fleet."""

    number: int
    """its place on the command line, from 1; clients see this number, not the address"""
    address: Address
    client: Upstream = field(repr=False)
    reachable: bool = True
    _skipped_until: float = 0.0

    def skipped(self, now: float) -> bool:
        """Whether requests pass over it now."""
        return not self.reachable and now < self._skipped_until

    def skip(self, now: float) -> None:
        """Leave it out for a while."""
        self._skipped_until = now + SKIP_S

    def weight(self, key: bytes) -> bytes:
        """Its weight for a key. The upstream with the greatest weight serves the key (rendezvous hashing), so only an added
        or removed upstream's own keys move."""
        return blake2b(self.address.plain.encode(), key=key, digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Sent:
    """An answer, and the upstream that gave it."""

    answer: UpstreamAnswer
    member: Member
    moved: bool
    """whether the latest request with the same key went to another upstream, which has the prefix cached"""


class Fleet:
    """All upstreams of a gateway. For one event loop."""

    def __init__(self, members: Sequence[tuple[Address, Upstream]], metrics: Metrics) -> None:
        """
        Args:
            members: at least one; no address twice.
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
        """Whether there is a choice."""
        return len(self.members) > 1

    async def send(self, key: bytes, build: Callable[[Address], UpstreamRequest]) -> Sent:
        """Send a request to its key's upstream, or to the next one where no connection can be made. Nothing is sent twice.

        Args:
            key: at most 64 bytes.
            build: makes the request for an upstream.

        Raises:
            RefusedError: no upstream can be reached, or one broke off before it answered.
        """
        refusal: RefusedError | None = None
        for member in self._order(key):
            if not member.reachable:  # the next requests do not wait for what this one finds out
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
        """Whether each upstream could be reached when it was last tried. Shows no addresses."""
        return [{"upstream": member.number, "reachable": member.reachable} for member in self.members]

    def _order(self, key: bytes) -> list[Member]:
        """The upstreams in the order in which a key prefers them; those that are left out now come last."""
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
            _LOG.warning("upstream %d is left out for %.0f s at a time: %s", member.number, SKIP_S, why)
        member.reachable = False
        member.skip(time.monotonic())

    def _remember(self, key: bytes, member: Member) -> bool:
        """Note where a key went. Returns whether it went elsewhere before."""
        if not self.several:
            return False
        before = self._latest.pop(key, member.number)
        self._latest[key] = member.number
        if len(self._latest) > _REMEMBERED:
            self._latest.popitem(last=False)
        return before != member.number


def _reader(member: Member) -> Callable[[], float]:
    return lambda: float(member.reachable)
