"""Bounds on concurrency: requests at the upstream, requests that wait, and bodies that a tenant sends at one time."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

from programmable_kv.serve.refusal import Refusal, RefusedError


class Admission:
    """Bounded concurrency for one event loop. First come, first served."""

    def __init__(self, *, max_running: int, max_waiting: int, wait_s: float) -> None:
        self.running = 0
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._wait_s = wait_s
        self._queue: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._queue)

    async def enter(self) -> None:
        """Take a place, to be given back with `leave`.

        Raises:
            RefusedError: too many requests wait already, or this one waited too long.
        """
        if self.running < self._max_running:
            self.running += 1
            return
        if len(self._queue) >= self._max_waiting:
            raise RefusedError(
                Refusal(429, "gateway_full", "too many requests are running and waiting at this gateway: try again", 1)
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            async with asyncio.timeout(self._wait_s):
                await turn  # the place is handed over: `running` is not lowered in between
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self.leave()  # it was given a place in the same moment
            elif turn in self._queue:
                self._queue.remove(turn)
            if isinstance(error, TimeoutError):
                raise RefusedError(
                    Refusal(
                        503, "gateway_busy", "the request waited too long for its turn at the upstream: try again", 1
                    )
                ) from error
            raise

    def leave(self) -> None:
        """Give a place back. The request that has waited longest gets it."""
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1


class Uploads:
    """Counts the bodies that are being read for each tenant, so that a slow tenant takes no place from another."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._reading: Counter[str] = Counter()

    @contextmanager
    def one(self, tenant: str) -> Iterator[None]:
        """Count one body while the block reads it.

        Raises:
            RefusedError: too many of this tenant's bodies are being read already.
        """
        if self._reading[tenant] >= self._most:
            raise RefusedError(
                Refusal(429, "gateway_full", "you are uploading too many requests at once: try again", 1)
            )
        self._reading[tenant] += 1
        try:
            yield
        finally:
            self._reading[tenant] -= 1
            if not self._reading[tenant]:
                del self._reading[tenant]
