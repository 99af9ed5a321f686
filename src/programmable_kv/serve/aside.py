"""Calls that ask the state: made at once where that is a file that nothing waits for, and beside the event loop otherwise."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from programmable_kv.serve.state import State

_LOG = logging.getLogger("programmable_kv.serve")
_THREADS = 16
_ALTOGETHER_S = 2.0
"""what is asked of a database for one request, before it is sent or after its answer begins, may take so long"""

P = ParamSpec("P")
T = TypeVar("T")


class Aside:
    """Makes calls for one event loop."""

    def __init__(self, state: State | None, *, altogether_s: float = _ALTOGETHER_S) -> None:
        """
        Args:
            state: what the calls ask; None where they ask nothing.
            altogether_s: how long one call may wait for a state over a network.
        """
        self._state = state
        self._altogether_s = altogether_s
        self._pool = (
            ThreadPoolExecutor(_THREADS, "programmable-kv-state") if state is not None and state.remote else None
        )

    @property
    def waits(self) -> bool:
        """Whether calls wait for a network, or for a file's disk."""
        return self._pool is not None or (self._state is not None and self._state.busy)

    async def run(self, call: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
        """Make a call. If the caller is cancelled, it ends all the same."""
        if not self.waits:
            return call(*given, **named)
        return await asyncio.shield(self._begun(lambda: call(*given, **named)))

    async def run_long(self, call: Callable[[], T], *, undo: Callable[[T], object]) -> T:
        """Make a call that may take long, in a thread in any case.

        Args:
            undo: made with what it returned, where the caller was cancelled meanwhile.
        """
        running = self._begun(call)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            running.add_done_callback(lambda done: self._undone(done, undo))
            raise

    def close(self) -> None:
        """Let what runs end."""
        if self._pool is not None:
            self._pool.shutdown()

    def _begun(self, call: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._pool, self._limited, call)

    def _limited(self, call: Callable[[], T]) -> T:
        if self._state is None:
            return call()
        with self._state.within(self._altogether_s):
            return call()

    def _undone(self, done: asyncio.Future[T], undo: Callable[[T], object]) -> None:
        if done.cancelled() or done.exception() is not None:
            return
        found = done.result()
        self._begun(lambda: undo(found)).add_done_callback(_told)


def _told(done: asyncio.Future[object]) -> None:
    error = None if done.cancelled() else done.exception()
    if error is not None:
        _LOG.warning("could not undo the work for a client that disconnected (%s)", type(error).__name__)
