"""Measures how much of a request a cache supplied and how much was recomputed, in the best unit that the log allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from programmable_kv.explain.difference import Difference, common_length
from programmable_kv.explain.pieces import Kind, Piece, Request
from programmable_kv.explain.tokens import TokenCounter


class Basis(StrEnum):
    """The source of a report's numbers."""

    UPSTREAM = "the upstream's own usage numbers"
    TOKENIZER = "the named model's tokenizer and chat template"
    BLOCKS = "the trace's hashed blocks"
    BYTES = "bytes of text, since token counts are unknown"

    @property
    def unit(self) -> str:
        return "bytes" if self is Basis.BYTES else "tokens"


@dataclass(frozen=True, slots=True)
class Amounts:
    """A request's input: in total, from the cache, and recomputed although an earlier request had it."""

    total: int
    hit: int
    lost: int


def basis_of(requests: Sequence[Request], counter: TokenCounter | None) -> Basis:
    """The best basis for a whole log. All requests share one unit, so that amounts can be added up.

    In order: hashed blocks if all requests have them; the upstream's numbers if at least half of the requests have
    them; the tokenizer; bytes.
    """
    if requests and all(request.block_tokens for request in requests):
        return Basis.BLOCKS
    if 2 * sum(_counted(request) for request in requests) >= len(requests) > 0:
        return Basis.UPSTREAM
    return Basis.TOKENIZER if counter is not None else Basis.BYTES


@dataclass
class Meter:
    """Measures requests on one basis."""

    basis: Basis
    counter: TokenCounter | None = None
    block_size: int = 16
    _counts: dict[bytes, int] = field(default_factory=dict, repr=False)

    def total(self, request: Request) -> int | None:
        """The size of the request's input; None if the upstream did not count it."""
        if self.basis is Basis.BLOCKS:
            return int(request.body["tokens"])
        if self.basis is Basis.UPSTREAM:
            return request.usage.tokens if request.usage is not None and _counted(request) else None
        if self.basis is Basis.TOKENIZER:
            assert self.counter is not None
            return len(self.counter.ids(request))
        return request.nbytes

    def amounts(
        self, request: Request, nearest: Difference | None, counterpart: Difference | None, *, missed: bool
    ) -> Amounts | None:
        """How much of a request's input was cached and recomputed; None if the upstream did not count it.

        Args:
            nearest: the comparison with the request that shares the longest prefix in the same cache.
            counterpart: the comparison with the request that this one continues.
            missed: whether text that both have behind the common prefix counts as recomputed.
        """
        total = self.total(request)
        if total is None:
            return None
        hit = min(self._hit(request, nearest), total)
        if not missed or counterpart is None:
            return Amounts(total, hit, 0)
        return Amounts(total, hit, max(0, min(self._again(counterpart, nearest, hit, total), total - hit)))

    def template_loss(self, appended: Difference) -> int:
        """Tokens that an engine recomputes because of the chat template although the client only appended messages."""
        if self.basis is not Basis.TOKENIZER or self.counter is None or appended.before is not None:
            return 0
        if self.counter.only_appended(appended.earlier, appended.later):
            return 0
        shared = self.counter.shared(appended.earlier, appended.later)
        least = min(len(self.counter.ids(appended.earlier, asks=False)), len(self.counter.ids(appended.later)))
        return max(0, least - (shared - shared % self.block_size))

    @property
    def at_most(self) -> bool:
        """Whether losses are upper bounds: counts and hashes do not show which recomputed tokens were sent before."""
        return self.basis in (Basis.UPSTREAM, Basis.BLOCKS)

    def _hit(self, request: Request, nearest: Difference | None) -> int:
        if self.basis is Basis.UPSTREAM:
            return request.usage.cached if request.usage is not None else 0
        if nearest is None:
            return 0
        if self.basis is Basis.BLOCKS:
            return nearest.index * (request.block_tokens or 1)
        if self.basis is Basis.TOKENIZER:
            assert self.counter is not None
            shared = self.counter.shared(nearest.earlier, request)
            return shared - shared % self.block_size
        return nearest.equal_bytes

    def _again(self, counterpart: Difference, nearest: Difference | None, hit: int, total: int) -> int:
        if self.at_most:
            earlier = self.total(counterpart.earlier)
            return 0 if earlier is None else min(earlier, total) - hit
        counter = self.counter if self.basis is Basis.TOKENIZER else None
        if counter is not None and nearest is not None and counter.only_appended(nearest.earlier, counterpart.later):
            return 0  # the chat template does not write what differs
        start = nearest.index if nearest is not None else 0
        if counterpart.earlier.cache == counterpart.later.cache:
            start = max(start, counterpart.index)
        again = sum(self._count(piece) for piece in _held_by_both(counterpart, start))
        if counter is not None and nearest is not None:
            again += counter.shared(nearest.earlier, counterpart.later) - hit  # the last block, which is not full
        return again

    def _count(self, piece: Piece) -> int:
        if self.basis is Basis.BYTES:
            return piece.nbytes
        assert self.counter is not None
        if piece.kind is Kind.MEDIA:
            return 0
        if piece.key not in self._counts:
            self._counts[piece.key] = self.counter.count(piece.text)
        return self._counts[piece.key]


def _held_by_both(difference: Difference, start: int) -> list[Piece]:
    """The later request's pieces from `start` on that the earlier request also has from there or the difference on, and
    the text that the first differing pieces share at their ends."""
    left = Counter(_said(piece) for piece in difference.earlier.pieces[min(start, difference.index) :])
    found = []
    for piece in difference.later.pieces[start:]:
        if left[_said(piece)] > 0:
            left[_said(piece)] -= 1
            found.append(piece)
    before, after = difference.before, difference.after
    if before is not None and after is not None and start == difference.index and after not in found[:1]:
        most = min(len(before.text), len(after.text)) - difference.offset
        length = min(common_length(before.text[::-1], after.text[::-1]), most)
        if length > 0 and before.kind is after.kind:
            found.append(Piece(after.kind, after.text[-length:], after.path))
    return found


def _said(piece: Piece) -> tuple[str, str, str]:
    return piece.kind, piece.role, piece.text


def _counted(request: Request) -> bool:
    return request.usage is not None and request.usage.cached_known
