"""What is compared with what: the suite of composing, and the question of what a skill should read while it is compiled."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar

from programmable_kv.lab.composing import tasks as ask
from programmable_kv.lab.composing.arms import ALL_ARMS, FEW_ARMS, PREFACE_ARMS, SEAMS, Arm
from programmable_kv.lab.composing.frame import TITLE, Place
from programmable_kv.lab.composing.tasks import Task
from programmable_kv.lab.composing.tools import among, compiled_together, tool_requests
from programmable_kv.skills.skill import Preface

MIDDLE = Place("system", 512)
PLACES = (Place("system", 64), MIDDLE, Place("conversation", 512), Place("system", 4096))


@dataclass(frozen=True, slots=True)
class Group:
    """Tasks about the same pieces in one place, and the ways to splice that are compared on them."""

    place: Place
    arms: Sequence[Arm]
    tasks: Sequence[Task]


@dataclass(frozen=True, slots=True)
class Composing:
    """Every kind of task: `policies` in every place, `others` of each other kind, and `tools` requests for a tool."""

    policies: int
    others: int
    tools: int
    horizons: int

    stem: ClassVar[str] = "compose"
    title: ClassVar[str] = "Compiled pieces spliced together, against a full prefill of the same tokens"
    version: ClassVar[int] = 2

    def groups(self) -> list[Group]:
        everywhere = list(ask.policies(self.policies))
        updates = list(ask.updates(self.others))
        found: list[Group] = []
        for place in PLACES:
            found += _grouped(place, ALL_ARMS, everywhere)
            if place.area == "system":
                found += _grouped(place, FEW_ARMS, updates)
            if place == MIDDLE:
                for several in (
                    ask.facts(self.others),
                    ask.coupled(self.others),
                    ask.two_hops(self.others, together=True),
                    ask.two_hops(self.others, together=False),
                    *(ask.several(self.others, pieces) for pieces in range(1, ask.MOST_PIECES + 1)),
                    tool_requests(self.tools),
                ):
                    found += _grouped(place, FEW_ARMS, several)
        return found


@dataclass(frozen=True, slots=True)
class Prefaces:
    """Policies, and pairs of rule sets, behind several prefaces in turn: none, a few words, other rules, their like as well."""

    policies: int
    others: int

    stem: ClassVar[str] = "preface"
    title: ClassVar[str] = "Skills compiled behind several prefaces, against a full prefill of the same tokens"
    version: ClassVar[int] = 1
    horizons: ClassVar[int] = 0

    def groups(self) -> list[Group]:
        found: list[Group] = []
        for several in (list(ask.policies(self.policies)), list(ask.several(self.others, 2))):
            for name, preface in _PREFACES.items():
                arms = SEAMS if name == "none" else PREFACE_ARMS
                named = [replace(task, kind=f"{task.kind}_{name}", prefaces=preface(task)) for task in several]
                found += _grouped(MIDDLE, arms, named)
        return found


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Requests for one of sixteen tools: all of them in their order, all in another, and every second one. The tools are
    compiled alone, each behind two others, or together, each behind a title and those before it."""

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
                found += _grouped(MIDDLE, arms, tasks)
        return found


Suite = Composing | Prefaces | Catalogue
"""`stem` begins the records' names, and `version` counts what was changed about the comparisons"""


_PREFACES: dict[str, Callable[[Task], tuple[Preface, ...]]] = {
    "none": lambda task: (),
    "title": lambda task: (TITLE,) * len(task.pieces),
    "rules_4": lambda task: (ask.other_rules(4),) * len(task.pieces),
    "rules_20": lambda task: (ask.other_rules(20),) * len(task.pieces),
    "like": lambda task: task.prefaces,
}
"""what each piece of a task reads; `like` is that of the suite: four other rules, and a text of its own kind"""


_COMPILED: dict[str, Callable[[Task], Task]] = {
    "alone": lambda task: replace(task, prefaces=()),
    "behind_two": lambda task: task,
    "together": compiled_together,
}


def _orders(count: int) -> dict[str, Sequence[int]]:
    shuffled = list(range(count))
    random.Random(ask.SEED).shuffle(shuffled)
    return {"in_order": range(count), "shuffled": shuffled, "every_second": range(0, count, 2)}


def _grouped(place: Place, arms: Sequence[Arm], tasks: Iterator[Task] | Sequence[Task]) -> list[Group]:
    """Neighbours about the same pieces together."""
    same = groupby(tasks, key=lambda task: (task.shared, task.pieces, task.prefaces))
    return [Group(place, arms, list(together)) for _, together in same]
