"""What an operation cost, and what it left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from programmable_kv.states import TokenState


@dataclass(frozen=True, slots=True)
class Account:
    """The price of an operation, counted where it was paid, and what it left behind.

    `tokens_computed` went through the transformer. `tokens_relocated` were put in place from where they had been computed:
    their keys were rotated (by nothing, where that is the same place). `tokens_reused` were neither. `bytes_moved` counts cache
    bytes copied or rotated, those of rows that are kept aside for an undo among them, and not those the model wrote.
    """

    tokens_computed: int = 0
    tokens_relocated: int = 0
    tokens_reused: int = 0
    bytes_moved: int = 0
    seconds: float = 0.0
    operation: str = ""
    mode_asked: str | None = None
    """of an edit; where none was given, the one that the default chose"""
    mode_used: str | None = None
    why: str = ""
    """why another mode was used than was asked for, or what was done beyond it"""
    exactness: TokenState = TokenState.EXACT
    """the weakest state of any token in the context afterwards"""

    @property
    def exact(self) -> bool:
        """Whether a full prefill of the current text would give the same cache."""
        return self.exactness.exact

    def of(self, **known: Any) -> Account:
        """A copy with what else is known of the operation."""
        return replace(self, **known)

    def __add__(self, other: Account) -> Account:
        """Two operations one after the other on the same context; reuse and exactness are those after the second."""
        return Account(
            self.tokens_computed + other.tokens_computed,
            self.tokens_relocated + other.tokens_relocated,
            other.tokens_reused,
            self.bytes_moved + other.bytes_moved,
            self.seconds + other.seconds,
            other.operation or self.operation,
            self.mode_asked or other.mode_asked,
            self.mode_used or other.mode_used,
            "; ".join(why for why in (self.why, other.why) if why),
            other.exactness,
        )


class _Counts:
    """Running totals; `measure` turns a difference of them into an account."""

    def __init__(self) -> None:
        self.tokens_computed = 0
        self.tokens_relocated = 0
        self.bytes_moved = 0

    def count(self, *, computed: int = 0, relocated: int = 0, moved: int = 0) -> None:
        """Add tokens that were computed or relocated, and bytes that were moved."""
        self.tokens_computed += computed
        self.tokens_relocated += relocated
        self.bytes_moved += moved

    @contextmanager
    def measure(self) -> Iterator[Reading]:
        reading = Reading()
        before = (self.tokens_computed, self.tokens_relocated, self.bytes_moved)
        began = time.perf_counter()
        yield reading
        reading.account = Account(
            self.tokens_computed - before[0],
            self.tokens_relocated - before[1],
            bytes_moved=self.bytes_moved - before[2],
            seconds=time.perf_counter() - began,
        )


class Meter(_Counts, threading.local):
    """Totals of the calling thread: what other threads do with the same model at the same time is not in them.

    An operation that may go on in another thread (a stream that a server draws from several) is measured with its buffer's
    own meter instead.
    """


class BufferMeter(_Counts):
    """Totals of one buffer, whichever thread worked on it; each amount is also added to a shared meter, if there is one."""

    def __init__(self, shared: Meter | None = None) -> None:
        super().__init__()
        self.shared = shared

    def count(self, *, computed: int = 0, relocated: int = 0, moved: int = 0) -> None:
        super().count(computed=computed, relocated=relocated, moved=moved)
        if self.shared is not None:
            self.shared.count(computed=computed, relocated=relocated, moved=moved)


class Reading:
    """Filled when its `measure` block ends without an error."""

    account = Account()
