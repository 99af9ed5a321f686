"""Accounts: what an operation cost, and how exact the context is after it."""

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
    """The cost of an operation, counted where the work was done, and the state of the context after it.

    `tokens_computed` went through the transformer. `tokens_relocated` were copied into place and their keys rotated (by
    zero, if they stand at the position where they were computed). `tokens_reused` were neither computed nor relocated.
    `bytes_moved` counts cache bytes copied or rotated, including rows saved for an undo, but not the bytes that the
    model wrote.
    """

    tokens_computed: int = 0
    tokens_relocated: int = 0
    tokens_reused: int = 0
    bytes_moved: int = 0
    seconds: float = 0.0
    operation: str = ""
    mode_asked: str | None = None
    """the edit mode that was asked for; None if none was given"""
    mode_used: str | None = None
    why: str = ""
    """why the mode used differs from the mode asked for, or what was done in addition"""
    exactness: TokenState = TokenState.EXACT
    """the weakest state of any token in the context afterwards"""

    @property
    def exact(self) -> bool:
        """Whether a full prefill of the current text would give the same cache."""
        return self.exactness.exact

    def of(self, **known: Any) -> Account:
        """A copy of this account with some fields replaced."""
        return replace(self, **known)

    def __add__(self, other: Account) -> Account:
        """Add a later operation on the same context; `tokens_reused` and `exactness` are taken from the later one."""
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
    """Running totals; `measure` turns the difference between two readings into an account."""

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
    """Totals of the calling thread, without the work that other threads do on the same model.

    An operation that may continue in another thread (a stream that a server reads from several threads) is measured
    with the meter of its buffer instead.
    """


class BufferMeter(_Counts):
    """Totals of one buffer over all threads; each amount is also added to the shared meter, if there is one."""

    def __init__(self, shared: Meter | None = None) -> None:
        super().__init__()
        self.shared = shared

    def count(self, *, computed: int = 0, relocated: int = 0, moved: int = 0) -> None:
        super().count(computed=computed, relocated=relocated, moved=moved)
        if self.shared is not None:
            self.shared.count(computed=computed, relocated=relocated, moved=moved)


class Reading:
    """The result of a `measure` block; `account` is set when the block ends without an error."""

    account = Account()
