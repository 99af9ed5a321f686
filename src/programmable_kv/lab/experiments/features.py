"""Features of notes: which features of a dictionary differ with the conclusion, and notes with some of them changed.

A dictionary is a sparse autoencoder, or the stream's own coordinates. Features are chosen on the notes of some policies
and changed in those of others. What a dictionary does not explain of a note is unchanged.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

NEAREST = 8
"""A random feature is drawn from this many that are active about as often."""


class Dictionary(Protocol):
    """Directions, and codes that say how much of each direction activations have."""

    @property
    def directions(self) -> torch.Tensor:
        """Unit vectors, [m, d]."""

    def codes(self, rows: torch.Tensor) -> torch.Tensor:
        """How much of each feature activations [n, d] have, [n, m]."""


@dataclass(frozen=True, slots=True, eq=False)
class Coordinates:
    """The stream's own coordinates as a dictionary that explains everything. Features have to beat it."""

    width: int

    @property
    def directions(self) -> torch.Tensor:
        return torch.eye(self.width)

    def codes(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.to("cpu", torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """A dictionary's features, as measured on the notes of some policies."""

    dictionary: Dictionary
    order: tuple[int, ...]
    """Features by the distance of their means between notes whose rule applies and the others, largest first."""
    best: int
    """Best feature by the area under the curve."""
    sign: float
    """1 if the best feature is larger when a rule applies, else -1."""
    frequency: torch.Tensor
    """Share of the notes on which each feature is not zero, [m]."""
    middle: torch.Tensor
    """Mean over all notes, [m]."""

    @classmethod
    def of(cls, dictionary: Dictionary, notes: torch.Tensor, labels: Sequence[bool]) -> Chosen:
        """Choose features from notes [n, d] and whether their rules apply."""
        codes, marked = dictionary.codes(notes), torch.tensor(list(labels))
        apart = (codes[marked].mean(dim=0) - codes[~marked].mean(dim=0)).abs()
        order = apart.argsort(descending=True, stable=True)
        found = areas(codes, labels)
        # Of equally good features, take the one whose means differ most.
        best = int(order[(found - 0.5).abs()[order].argmax()])
        sign = 1.0 if float(found[best]) >= 0.5 else -1.0
        return cls(dictionary, tuple(order.tolist()), best, sign, (codes != 0).float().mean(dim=0), codes.mean(dim=0))

    def exchanged(self, here: torch.Tensor, there: torch.Tensor, features: Sequence[int]) -> torch.Tensor:
        """Notes [n, d] with these features taken from other notes [n, d]. Everything else is unchanged."""
        return here + self.change(here, there, features).to(here)

    def ablated(self, here: torch.Tensor, features: Sequence[int]) -> torch.Tensor:
        """Notes with these features at their mean over all notes, whether rules apply or not."""
        return here + self._along(self.middle - self.dictionary.codes(here), features).to(here)

    def change(self, here: torch.Tensor, there: torch.Tensor, features: Sequence[int]) -> torch.Tensor:
        """What an exchange of these features adds to the notes, [n, d]."""
        return self._along(self.dictionary.codes(there) - self.dictionary.codes(here), features)

    def randomly_exchanged(
        self, here: torch.Tensor, there: torch.Tensor, features: Sequence[int], rng: random.Random
    ) -> torch.Tensor:
        """The null of an exchange: as many other features that are as often active, with each note moved as far."""
        far = self.change(here, there, features).norm(dim=1, keepdim=True)
        other = self.change(here, there, self.matched(features, rng))
        as_far: torch.Tensor = torch.nn.functional.normalize(other, dim=1) * far
        return here + as_far.to(here)

    def matched(self, features: Sequence[int], rng: random.Random) -> tuple[int, ...]:
        """As many random other features, each about as frequent as one of these."""
        left = torch.ones(len(self.frequency), dtype=torch.bool)
        left[list(features)] = False
        drawn = []
        for feature in features:
            far = (self.frequency - self.frequency[feature]).abs().masked_fill(~left, float("inf"))
            near = far.argsort(stable=True)[: min(NEAREST, int(left.sum()))].tolist()
            drawn.append(rng.choice(near))
            left[drawn[-1]] = False
        return tuple(drawn)

    def read(self, notes: torch.Tensor, labels: Sequence[bool]) -> float:
        """The area under the curve of the best feature, on other notes."""
        codes = self.dictionary.codes(notes)[:, [self.best]] * self.sign
        return float(areas(codes, labels)[0])

    def _along(self, codes: torch.Tensor, features: Sequence[int]) -> torch.Tensor:
        chosen = list(features)
        return codes[:, chosen] @ self.dictionary.directions[chosen]


def areas(codes: torch.Tensor, labels: Sequence[bool]) -> torch.Tensor:
    """By feature [m], how often it is larger on an item [n, m] with the label than without; equals count half."""
    marked = torch.tensor(list(labels))
    first, second = codes[marked][:, None], codes[~marked][None]
    return ((first > second).float() + 0.5 * (first == second).float()).mean(dim=(0, 1))
