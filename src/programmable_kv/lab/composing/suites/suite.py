"""A suite of comparisons, and the groups of tasks that it consists of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Protocol

from programmable_kv.lab.composing.arms import Arm
from programmable_kv.lab.composing.frame import InsertionPoint
from programmable_kv.lab.composing.tasks import Task

MIDDLE = InsertionPoint("system", 512)
"""Insertion point of tasks that are asked at one point only."""


@dataclass(frozen=True, slots=True)
class Group:
    """Tasks about the same pieces at one insertion point, and the arms that are compared on them."""

    point: InsertionPoint
    arms: Sequence[Arm]
    tasks: Sequence[Task]


class Suite(Protocol):
    """A frozen dataclass whose fields are the sizes of the run; they become the record's settings."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    stem: ClassVar[str]
    """What the names of its records begin with."""
    title: ClassVar[str]
    version: ClassVar[int]
    """Increased when the comparisons change, so that rows of different versions are never mixed."""

    @property
    def horizons(self) -> int:
        """The number of long conversations to play."""

    def groups(self) -> list[Group]:
        """Every comparison, in the order in which it is made."""


def grouped(point: InsertionPoint, arms: Sequence[Arm], tasks: Iterable[Task]) -> list[Group]:
    """Group consecutive tasks about the same pieces, so that their pieces are computed once."""
    same = groupby(tasks, key=lambda task: (task.shared, task.pieces, task.prefaces))
    return [Group(point, arms, list(together)) for _, together in same]
