"""One queue for each model, for asyncio: operations on its notebooks run one after the other in a separate thread.

A forward blocks for as long as it computes, so an event loop must not run it itself. A model computes one thing at a
time, so one thread is enough. Operations run in the order in which they were submitted:

    queue = ModelQueue.of(model)
    decision = await queue.run(notebook.decide, "May it be cancelled?", ["cancel", "deny"])
    async for piece in queue.stream(notebook.generate, "What happens now?"):
        print(piece)
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ClassVar, ParamSpec, TypeVar

from programmable_kv.arguments import require_count
from programmable_kv.errors import QueueFullError
from programmable_kv.models.load import Model

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class ModelQueue:
    """Runs the operations of one model in one thread, in the order in which they were submitted."""

    _queues: ClassVar[weakref.WeakKeyDictionary[Any, ModelQueue]] = weakref.WeakKeyDictionary()
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, *, max_waiting: int | None = None) -> None:
        """
        Args:
            max_waiting: how many operations may wait, not counting the one that runs; None means no limit.
        """
        if max_waiting is not None:
            require_count(max_waiting, "max_waiting")
        self.max_waiting = max_waiting
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="programmable-kv")
        self._asked = 0
        """operations that were submitted and have not ended"""
        self._counting = threading.Lock()

    @classmethod
    def of(cls, model: Model) -> ModelQueue:
        """The queue of a model: every caller gets the same one. It has no limit unless its `max_waiting` is set."""
        with cls._guard:
            queue = cls._queues.get(model.engine.model)
            if queue is None:
                queue = cls._queues[model.engine.model] = cls()
            return queue

    @property
    def waiting(self) -> int:
        """How many operations wait, not counting the one that runs."""
        return max(0, self._asked - 1)

    async def run(
        self, operation: Callable[Parameters, Result], /, *args: Parameters.args, **options: Parameters.kwargs
    ) -> Result:
        """Run an operation, as in `await queue.run(notebook.edit, status="shipped")`. Returns and raises what it does.

        If the task is cancelled while the operation waits, the operation never starts. If it has started, it runs to
        its end, and the notebook stays consistent.

        Raises:
            QueueFullError: too many operations wait already. Nothing was done.
        """
        with self._counting:
            if self.max_waiting is not None and self._asked > self.max_waiting:
                raise QueueFullError(
                    f"{self.waiting} operations already wait for this model (the limit is {self.max_waiting}): try "
                    "again later"
                )
        return await self._do(partial(operation, *args, **options))

    async def stream(
        self, operation: Callable[Parameters, Iterator[Result]], /, *args: Parameters.args, **options: Parameters.kwargs
    ) -> AsyncIterator[Result]:
        """Stream an answer, as in `async for piece in queue.stream(notebook.generate, "why?")`.

        Other operations may run between two pieces. When the loop is left or the task cancelled, the stream is closed,
        which undoes what it appended. To leave a loop early, use `contextlib.aclosing`, so that this happens at once.
        """
        pieces = await self.run(operation, *args, **options)
        try:
            # An answer that has started continues, however many operations wait.
            while (piece := await self._do(partial(next, pieces, None))) is not None:
                yield piece
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:
                # Close in the queue's thread, after a piece that may be computed right now, even if the task is
                # cancelled again.
                await asyncio.shield(self._do(close))

    def _do(self, operation: Callable[[], Result]) -> asyncio.Future[Result]:
        """Submit an operation to the thread."""
        with self._counting:
            self._asked += 1
        future = self._thread.submit(operation)
        future.add_done_callback(self._ended)  # also called if it is cancelled before it starts
        return asyncio.wrap_future(future)

    def close(self) -> None:
        """Accept no more operations, wait for those in the queue, and end the thread."""
        self._thread.shutdown(wait=True)

    def _ended(self, _: object) -> None:
        with self._counting:
            self._asked -= 1
