"""What should a skill read while it is compiled? The same tasks behind several prefaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from programmable_kv.lab.composing import tasks as ask
from programmable_kv.lab.composing.arms import PREFACE_ARMS, SEAMS
from programmable_kv.lab.composing.frame import TITLE
from programmable_kv.lab.composing.suites.suite import MIDDLE, Group, grouped
from programmable_kv.lab.composing.tasks import Task
from programmable_kv.skills.draft import Preface


@dataclass(frozen=True, slots=True)
class Prefaces:
    """Policies and pairs of rule sets, behind each preface in turn: none, a title, other rules, text of their kind."""

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
                found += grouped(MIDDLE, arms, named)
        return found


_PREFACES: dict[str, Callable[[Task], tuple[Preface, ...]]] = {
    "none": lambda task: (),
    "title": lambda task: (TITLE,) * len(task.pieces),
    "rules_4": lambda task: (ask.other_rules(4),) * len(task.pieces),
    "rules_20": lambda task: (ask.other_rules(20),) * len(task.pieces),
    "like": lambda task: task.prefaces,
}
"""What each piece of a task reads. `like` is the composing suite's preface: four other rules and a text of its kind."""
