"""The gateway's own requests that let an upstream compute a new prefix before the conversation switches to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from programmable_kv.explain.pieces import Usage
from programmable_kv.serve.address import Address
from programmable_kv.serve.admission import Admission
from programmable_kv.serve.aside import Aside
from programmable_kv.serve.capture import Capture
from programmable_kv.serve.fleet import Fleet
from programmable_kv.serve.headers import value_of
from programmable_kv.serve.refusal import RefusedError
from programmable_kv.serve.rewriting.rewriter import Rewriting
from programmable_kv.serve.upstream import UpstreamRequest

_LOG = logging.getLogger("programmable_kv.serve")
_SUCCESS = range(200, 300)


class Warmer:
    """Warms prefixes in the background. Use it from one event loop.

    A warming request waits for a place like any client's request. It goes to the same upstream as the conversation's
    own requests, with the same salt.
    """

    def __init__(self, fleet: Fleet, admission: Admission, aside: Aside) -> None:
        self._fleet = fleet
        self._aside = aside
        self._admission = admission
        self._running: set[asyncio.Task[None]] = set()

    def warm(self, work: Rewriting, key: bytes, build: Callable[[Address], UpstreamRequest]) -> None:
        """Start to warm a prefix. Returns at once.

        Args:
            key: the conversation's key, by which the fleet chooses an upstream.
            build: makes the request for an upstream.
        """
        self._begin(self._warm(work, key, build))

    def give_up(self, work: Rewriting) -> None:
        """Record that nothing is warmed, because the upstream did not answer the client's request with success."""
        self._begin(self._ended(work, done=False, usage=None))

    async def close(self) -> None:
        """Cancel the warming requests that run. They count as failed."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _begin(self, doing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(doing)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _warm(self, work: Rewriting, key: bytes, build: Callable[[Address], UpstreamRequest]) -> None:
        done, usage = False, None
        try:
            await self._admission.enter()
            try:
                done, usage = await self._computed(key, build)
            finally:
                self._admission.leave()
        except RefusedError as error:
            _LOG.warning("%s: could not warm a prefix: %s", work.route, error.refusal.message)
        finally:
            await self._ended(work, done=done, usage=usage)

    async def _computed(self, key: bytes, build: Callable[[Address], UpstreamRequest]) -> tuple[bool, Usage | None]:
        """Whether the conversation's own upstream computed the prefix, and the upstream's count of tokens."""
        sent = await self._fleet.send(key, build)
        capture = Capture()
        try:
            async for chunk in sent.answer.chunks():
                capture.add(chunk)
        finally:
            await sent.answer.close()
        encoding = (value_of(sent.answer.headers, b"content-encoding") or b"").decode("latin-1").strip().lower()
        return sent.answer.status in _SUCCESS and not sent.moved, capture.usage(encoding)

    async def _ended(self, work: Rewriting, *, done: bool, usage: Usage | None) -> None:
        """Record the outcome in the state. If that fails (a full disk), the conversation stays unchanged."""
        try:
            await self._aside.run(work.by.warmed, work, done=done, usage=usage)
        except Exception as error:
            _LOG.warning("could not store the outcome of a rebase (%s)", type(error).__name__)
