"""Keeps what ranking policies give to learn from, while a run lasts, and what was learnt from sets of them.

Tensors are not part of a record. A resumed run has the rows of its ranking policies but not their activations, so it
takes them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from programmable_kv.lab.experiments.cases import RANKING_SEED, cases
from programmable_kv.lab.experiments.experiment import Row
from programmable_kv.lab.experiments.pair import Pair, pair_of

Item = TypeVar("Item")
Lesson = TypeVar("Lesson")


class Kept(Generic[Item, Lesson]):
    """Items by model and policy, and lessons by model and set of policies."""

    def __init__(self, take: Callable[[Pair], Item], learn: Callable[[Sequence[Item]], Lesson]) -> None:
        """`take` makes a policy's item, `learn` a lesson from several items."""
        self._take, self._learn = take, learn
        self._items: dict[tuple[str, int], Item] = {}
        self._lessons: dict[tuple[str, tuple[int, ...]], Lesson] = {}

    def add(self, pair: Pair) -> None:
        """Keep a ranking policy's item."""
        self._items[pair.model.fingerprint, pair.case.number] = self._take(pair)

    def learnt(self, pair: Pair, others: Sequence[Row]) -> Lesson:
        """The lesson of these rows' ranking policies, for a pair that is scored."""
        numbers = tuple(sorted(row["number"] for row in others))
        key = (pair.model.fingerprint, numbers)
        if key not in self._lessons:
            for number in numbers:
                if (pair.model.fingerprint, number) not in self._items:
                    self.add(again(pair, number))
            self._lessons[key] = self._learn([self._items[pair.model.fingerprint, number] for number in numbers])
        return self._lessons[key]


def again(pair: Pair, number: int) -> Pair:
    """The pair of the ranking policy with this number, in everyday words if the given pair is."""
    everyday = pair.case.scenario.domain == pair.case.gate.field
    found = pair_of(pair.model, cases(number + 1, RANKING_SEED, everyday=everyday)[number])
    assert isinstance(found, Pair)
    return found
