"""Makes the data of steps and scores in worker processes, so that the device never waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from training.design.batches import Batch, batches
from training.design.mixture import draw
from training.design.parts import Encoding
from training.design.recipe import DesignRecipe
from training.design.replay import windows

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class StepData:
    """The batches of a step, and its windows of plain text."""

    step: int
    batches: tuple[Batch, ...]
    replayed: NDArray[np.int32] | None


@dataclass(frozen=True, slots=True)
class StepMaker:
    """Makes a step's data from its number."""

    recipe: DesignRecipe
    encoding: Encoding
    tokens_per_pass: int

    def __call__(self, step: int) -> StepData:
        drawn = [draw(self.recipe, self.encoding, step, index) for index in range(self.recipe.sequences_per_step)]
        return StepData(step, tuple(batches(drawn, self.tokens_per_pass)), windows(self.recipe, self.encoding, step))


class _Numbered(Generic[Made]):
    """A torch dataset that makes each item from its number."""

    def __init__(self, make: Callable[[int], Made], stop: int) -> None:
        self._make, self._stop = make, stop

    def __len__(self) -> int:
        return self._stop

    def __getitem__(self, number: int) -> Made:
        return self._make(number)


def feed(make: Callable[[int], Made], numbers: Sequence[int], workers: int) -> Iterator[Made]:
    """Yield the data made from each number, in order: ahead of time in `workers` processes, or in this process if 0."""
    from torch.utils.data import DataLoader

    dataset: Any = _Numbered(make, max(numbers, default=0) + 1)
    yield from DataLoader(
        dataset, batch_size=None, sampler=numbers, num_workers=workers, collate_fn=_unchanged,
        prefetch_factor=4 if workers else None,
    )  # fmt: skip


def _unchanged(made: Any) -> Any:
    return made
