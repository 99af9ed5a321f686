"""A catalogue of tools, compiled in three ways and spliced in three orders."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from programmable_kv.lab.composing.arms import PREFACE_ARMS, SEAMS
from programmable_kv.lab.composing.suites.suite import MIDDLE, Group, grouped
from programmable_kv.lab.composing.tasks import SEED, Task
from programmable_kv.lab.composing.tools import among, compiled_together, tool_requests


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Requests for one of sixteen tools: all tools in their order, all in another order, and every second one.

    The tools are compiled alone, each behind two others, or together (each behind a title and the tools before it).
    """

    tools: int

    stem: ClassVar[str] = "catalogue"
    title: ClassVar[str] = (
        "Tools compiled alone, behind two others and together, against a full prefill of the same tokens"
    )
    version: ClassVar[int] = 1
    horizons: ClassVar[int] = 0

    def groups(self) -> list[Group]:
        found: list[Group] = []
        requests = list(tool_requests(self.tools))
        for order, indices in _orders(len(requests[0].pieces) if requests else 0).items():
            for name, compiled in _COMPILED.items():
                arms = (SEAMS[2],) if name == "alone" else PREFACE_ARMS
                tasks = [among(compiled(request), indices) for request in requests]
                tasks = [replace(task, kind=f"{order}_{name}") for task in tasks if task.right]
                found += grouped(MIDDLE, arms, tasks)
        return found


_COMPILED: dict[str, Callable[[Task], Task]] = {
    "alone": lambda task: replace(task, prefaces=()),
    "behind_two": lambda task: task,
    "together": compiled_together,
}


def _orders(count: int) -> dict[str, Sequence[int]]:
    shuffled = list(range(count))
    random.Random(SEED).shuffle(shuffled)
    return {"in_order": range(count), "shuffled": shuffled, "every_second": range(0, count, 2)}
