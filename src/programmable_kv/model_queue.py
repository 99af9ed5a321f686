"""One queue for each model: operations on its notebooks run one after the other, in a thread of their own.

For asyncio. A forward blocks for as long as it computes, so an event loop must not run it itself. A model computes one thing
at a time, so one thread is enough. First come, first served:

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
    """Runs operations of one model in one thread, in the order in which they were asked for."""

    _queues: ClassVar[weakref.WeakKeyDictionary[Any, ModelQueue]] = weakref.WeakKeyDictionary()
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, *, max_waiting: int | None = None) -> None:
        """
        Args:
            max_waiting: how many operations may wait beside the one that runs; any number when None.
        """
        if max_waiting is not None:
            require_count(max_waiting, "max_waiting")
        self.max_waiting = max_waiting
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="programmable-kv")
        self._asked = 0
        """operations that were asked for and have not ended"""
        self._counting = threading.Lock()

    @classmethod
    def of(cls, model: Model) -> ModelQueue:
        """The queue of a model: the same one for every caller, and without a limit unless `max_waiting` is set."""
        with cls._guard:
            queue = cls._queues.get(model.engine.model)
            if queue is None:
                queue = cls._queues[model.engine.model] = cls()
            return queue

    @property
    def waiting(self) -> int:
        """How many operations wait for the one that runs."""
        return max(0, self._asked - 1)

    async def run(
        self, operation: Callable[Parameters, Result], /, *args: Parameters.args, **options: Parameters.kwargs
    ) -> Result:
        """Do an operation, as `await queue.run(notebook.edit, status="shipped")`. Returns and raises what it does.

        If the task is cancelled while the operation waits, it is never begun. If it has begun, it runs to its end, and the
        notebook is in order.

        Raises:
            QueueFullError: too many wait already. Nothing was done.
        """
        with self._counting:
            if self.max_waiting is not None and self._asked > self.max_waiting:
                raise QueueFullError(
                    f"{self.waiting} operations wait for this model already, and {self.max_waiting} may: try again later"
                )
        return await self._do(partial(operation, *args, **options))

    async def stream(
        self, operation: Callable[Parameters, Iterator[Result]], /, *args: Parameters.args, **options: Parameters.kwargs
    ) -> AsyncIterator[Result]:
        """Stream an answer, as `async for piece in queue.stream(notebook.generate, "why?")`.

        Between two pieces other operations have their turn. When the loop is left, or the task cancelled, the stream is closed
        and what it drew is taken back. Leave a loop early with `contextlib.aclosing`, so that this happens at once.
        """
        pieces = await self.run(operation, *args, **options)
        try:
            # An answer that has begun goes on, however many wait.
            while (piece := await self._do(partial(next, pieces, None))) is not None:
                yield piece
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:
                # In the queue's thread, after the piece that may be drawn just now; and even if this task is cancelled again.
                await asyncio.shield(self._do(close))

    def _do(self, operation: Callable[[], Result]) -> asyncio.Future[Result]:
        """Let an operation wait for its turn."""
        with self._counting:
            self._asked += 1
        future = self._thread.submit(operation)
        future.add_done_callback(self._ended)  # also when it is cancelled before it begins
        return asyncio.wrap_future(future)

    def close(self) -> None:
        """End the thread once the operations that wait are done. The queue takes no more."""
        self._thread.shutdown(wait=True)

    def _ended(self, _: object) -> None:
        with self._counting:
            self._asked -= 1
