"""What a suite of comparisons is, and the groups of tasks it is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Protocol

from programmable_kv.lab.composing.arms import Arm
from programmable_kv.lab.composing.frame import InsertionPoint
from programmable_kv.lab.composing.tasks import Task

MIDDLE = InsertionPoint("system", 512)
"""where tasks of one insertion point only are asked"""


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
    """what the names of its records begin with"""
    title: ClassVar[str]
    version: ClassVar[int]
    """raised when the comparisons change, so that rows of different versions are never mixed"""

    @property
    def horizons(self) -> int:
        """How many long conversations are played."""

    def groups(self) -> list[Group]:
        """Every comparison, in the order in which it is made."""


def grouped(point: InsertionPoint, arms: Sequence[Arm], tasks: Iterable[Task]) -> list[Group]:
    """Consecutive tasks about the same pieces, together: their pieces are computed once."""
    same = groupby(tasks, key=lambda task: (task.shared, task.pieces, task.prefaces))
    return [Group(point, arms, list(together)) for _, together in same]
