"""Classifies misses that the text does not explain: a prefix was sent again, but the upstream read little of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from programmable_kv.explain.classes import CauseClass
from programmable_kv.explain.pieces import Request
from programmable_kv.explain.prices import Price
from programmable_kv.explain.protocols import MESSAGES

_FEW = 0.5
"""A prefix counts as lost if less than this share was read. Breakpoints and blocks leave a little unread anyway."""


@dataclass(frozen=True, slots=True)
class Unread:
    """A prefix that was sent again unchanged and not read from the cache."""

    earlier: Request
    later: Request
    prefix_tokens: int
    price: Price | None

    @property
    def seconds(self) -> float | None:
        """Seconds between the two requests; None if a time is unknown."""
        if self.earlier.time is None or self.later.time is None:
            return None
        return self.later.time - self.earlier.time


def was_unread(cached: int, prefix_tokens: int) -> bool:
    """Whether the upstream read so little of a prefix that rounding cannot explain it."""
    return cached < _FEW * prefix_tokens


def classify_unread(unread: Unread) -> CauseClass:
    """The first class of the table that matches."""
    return next(row for row, recognise in _ROWS if recognise(unread))


def _too_short(unread: Unread) -> bool:
    return unread.price is not None and unread.prefix_tokens < unread.price.minimum_tokens


def _unasked(unread: Unread) -> bool:
    if unread.earlier.protocol != MESSAGES or unread.earlier.usage is None:
        return False
    marked = any(piece.marked for piece in unread.earlier.pieces) or "cache_control" in unread.earlier.body
    return not marked and unread.earlier.usage.written + unread.earlier.usage.cached == 0


def _expired(unread: Unread) -> bool:
    minutes = unread.price.keeps_minutes if unread.price is not None else None
    return minutes is not None and unread.seconds is not None and unread.seconds > 60 * minutes


def _other_settings(unread: Unread) -> bool:
    return dict(unread.earlier.options) != dict(unread.later.options)


def _row(name: str, what: str, fix: str, *, lost: bool = True) -> CauseClass:
    return CauseClass(name, what, fix, lambda _: False, lost)


_ROWS: tuple[tuple[CauseClass, Callable[[Unread], bool]], ...] = (
    (_row("below the minimum", "The prefix is shorter than the minimum that the upstream caches.", "", lost=False), _too_short),
    (
        _row(
            "no cache_control", "The earlier request had no `cache_control` marker.",
            "Put `cache_control` on the last block of the system prompt and on the newest message.",
        ),
        _unasked,
    ),
    (
        _row(
            "expired", "The prefix expired: more time passed than the upstream keeps it.",
            "Request a longer lifetime if the upstream offers one, or send a small request before the prefix expires.",
        ),
        _expired,
    ),
    (
        _row(
            "settings changed", "Tool choice, thinking or another setting that is part of the prompt changed.",
            "Keep these settings the same throughout a conversation.",
        ),
        _other_settings,
    ),
    (
        _row(
            "likely the server", "The text is the same, but the upstream did not find it in its cache.",
            "Send each conversation to one replica (session affinity); check for evictions and restarts.",
        ),
        lambda _: True,
    ),
)  # fmt: skip


CLASSES = tuple(row for row, _ in _ROWS)
"""All classes, in the order in which they are tried."""
