"""The queue of a model: asyncio tasks share a model and several notebooks, in order, and nothing is left half-done."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing

import pytest

from conftest import tiny
from programmable_kv import ModelQueue, Notebook
from programmable_kv.errors import InvalidArgumentError, OutOfStepError, QueueFullError, UnknownFieldError
from programmable_kv.models.load import Model

OPTIONS = ["cancel", "deny"]


def build(status: str = "shipped") -> Notebook:
    notebook = Notebook(tiny()).message("system", "status: {status}\nreply only.", status=status)
    notebook.prefill()
    return notebook


def test_operations_run_in_the_order_of_their_calls_in_one_thread() -> None:
    async def main() -> None:
        queue = ModelQueue()
        done: list[tuple[int, str]] = []

        def operation(number: int) -> int:
            done.append((number, threading.current_thread().name))
            return number

        assert await asyncio.gather(*(queue.run(operation, number) for number in range(50))) == list(range(50))
        assert [number for number, _ in done] == list(range(50))
        assert len({thread for _, thread in done}) == 1
        assert threading.current_thread().name not in {thread for _, thread in done}
        assert queue.waiting == 0
        queue.close()

    asyncio.run(main())


def test_notebooks_of_one_model_answer_as_they_do_alone() -> None:
    notebooks = [build(status) for status in ("shipped", "pending", "lost", "cancelled")]
    alone = [
        ("".join(it.generate("why?", max_new_tokens=8)), it.decide("now?", OPTIONS).log_probabilities)
        for it in notebooks
    ]

    async def ask(queue: ModelQueue, notebook: Notebook) -> tuple[str, dict[str, float]]:
        pieces = [piece async for piece in queue.stream(notebook.generate, "why?", max_new_tokens=8)]
        decision = await queue.run(notebook.decide, "now?", OPTIONS)
        return "".join(pieces), decision.log_probabilities

    async def main() -> None:
        queue = ModelQueue.of(notebooks[0].model)
        assert await asyncio.gather(*(ask(queue, notebook) for notebook in notebooks)) == alone

    asyncio.run(main())


def test_streams_take_turns() -> None:
    """Two streams proceed in turns: neither waits for the other to end."""

    async def main() -> None:
        queue, order = ModelQueue(), []

        def count(name: str) -> Iterator[str]:
            for number in range(3):
                yield f"{name}{number}"

        async def read(name: str) -> None:
            async for piece in queue.stream(count, name):
                order.append(piece)

        await asyncio.gather(read("a"), read("b"))
        assert order == ["a0", "b0", "a1", "b1", "a2", "b2"]

    asyncio.run(main())


def test_errors_come_to_who_asked() -> None:
    async def main() -> None:
        queue, notebook = ModelQueue(), build()
        with pytest.raises(UnknownFieldError):
            await queue.run(notebook.edit, {"tier": "gold"})
        stream = queue.stream(notebook.generate, "why?", max_new_tokens=-1)
        with pytest.raises(InvalidArgumentError):
            await anext(stream)
        assert (await queue.run(notebook.edit, status="pending")).operation == "edit"

    asyncio.run(main())


def test_too_many_are_refused_and_those_who_wait_are_served() -> None:
    async def main() -> None:
        queue, go_on = ModelQueue(max_waiting=2), threading.Event()
        tasks = [asyncio.create_task(queue.run(go_on.wait)) for _ in range(3)]
        await asyncio.sleep(0)
        assert queue.waiting == 2
        with pytest.raises(QueueFullError, match="2 operations already wait"):
            await queue.run(go_on.wait)
        go_on.set()
        assert await asyncio.gather(*tasks) == [True] * 3
        assert await queue.run(go_on.wait)

    asyncio.run(main())
    with pytest.raises(InvalidArgumentError, match="max_waiting"):
        ModelQueue(max_waiting=-1)


async def next_of(stream: AsyncIterator[str]) -> str:
    return await anext(stream)


def test_a_stream_that_has_begun_is_not_refused_later() -> None:
    async def main() -> None:
        queue, go_on = ModelQueue(max_waiting=0), threading.Event()
        stream = queue.stream(build().generate, "why?", max_new_tokens=12)
        assert isinstance(await anext(stream), str)
        busy = asyncio.create_task(queue.run(go_on.wait))
        await asyncio.sleep(0)
        following = asyncio.create_task(next_of(stream))
        await asyncio.sleep(0)
        go_on.set()
        assert isinstance(await following, str)
        await busy
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(main())


def test_what_is_cancelled_while_it_waits_never_begins() -> None:
    async def main() -> None:
        queue, go_on, notebook = ModelQueue(), threading.Event(), build()
        running = asyncio.create_task(queue.run(go_on.wait))
        waiting = asyncio.create_task(queue.run(notebook.edit, status="pending"))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        go_on.set()
        await running
        assert notebook.fields == {"status": "shipped"}
        assert queue.waiting == 0

    asyncio.run(main())


@pytest.mark.parametrize("how", ["left", "cancelled"])
def test_a_stream_that_ends_early_is_taken_back(how: str) -> None:
    notebook = build()
    ids, begun = notebook.ids, asyncio.Event()

    async def read(queue: ModelQueue) -> None:
        async with aclosing(queue.stream(notebook.generate, "why?", max_new_tokens=200)) as pieces:  # type: ignore[type-var]
            async for _ in pieces:
                begun.set()
                if how == "left":
                    break

    async def main() -> None:
        queue = ModelQueue()
        task = asyncio.create_task(read(queue))
        await begun.wait()
        if how == "cancelled":
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert (notebook.ids, notebook.cache.length) == (ids, len(ids))
        notebook.add("user", "the notebook is free again")

    asyncio.run(main())


def test_a_stream_holds_its_notebook_and_no_other() -> None:
    one, two = build(), build()

    async def main() -> None:
        queue = ModelQueue()
        async with aclosing(queue.stream(one.generate, "why?", max_new_tokens=9)) as pieces:  # type: ignore[type-var]
            await anext(pieces)
            with pytest.raises(OutOfStepError, match="stream"):
                await queue.run(one.edit, status="pending")
            await queue.run(two.edit, status="pending")

    asyncio.run(main())
    assert two.fields == {"status": "pending"}


def test_a_model_has_one_queue_and_is_not_kept_alive_by_it() -> None:
    def model() -> Model:
        from programmable_kv import Engine

        mine = tiny()
        weights = type(mine.engine.model)(mine.engine.model.config).eval()
        return Model("mine", mine.tokenizer, Engine(weights), "a fingerprint of its own")

    one = model()
    queue = ModelQueue.of(one)
    assert ModelQueue.of(one) is queue
    assert ModelQueue.of(tiny()) is not queue
    weights = weakref.ref(one.engine.model)
    del one
    gc.collect()
    assert weights() is None
