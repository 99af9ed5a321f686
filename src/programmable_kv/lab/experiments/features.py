"""Features of notes: which of a dictionary's differ with the conclusion, and notes in which some of them are changed.

A dictionary is a sparse autoencoder, or the stream's own coordinates. Features are chosen on the notes of some policies and
changed in those of others. What a dictionary does not explain of a note stays.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

NEAREST = 8
"""features as often active among which a random one is drawn"""


class Dictionary(Protocol):
    """Directions, and how much of each activations have."""

    @property
    def directions(self) -> torch.Tensor:
        """[m, d], of unit length."""

    def codes(self, rows: torch.Tensor) -> torch.Tensor:
        """Of activations [n, d], how much of each feature they have: [n, m]."""


@dataclass(frozen=True, slots=True, eq=False)
class Coordinates:
    """The stream's own coordinates, as a dictionary that explains everything: what features have to beat."""

    width: int

    @property
    def directions(self) -> torch.Tensor:
        return torch.eye(self.width)

    def codes(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.to("cpu", torch.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """A dictionary's features as they are on the notes of some policies."""

    dictionary: Dictionary
    order: tuple[int, ...]
    """by how far their means differ between notes whose rule applies and the others, the farthest first"""
    best: int
    """by the area under the curve"""
    sign: float
    """1 where the best one is larger if a rule applies, else -1"""
    frequency: torch.Tensor
    """[m]: on how many of the notes each is not zero"""
    middle: torch.Tensor
    """[m]: the mean over all notes"""

    @classmethod
    def of(cls, dictionary: Dictionary, notes: torch.Tensor, labels: Sequence[bool]) -> Chosen:
        """From notes [n, d] and whether their rules apply."""
        codes, marked = dictionary.codes(notes), torch.tensor(list(labels))
        apart = (codes[marked].mean(dim=0) - codes[~marked].mean(dim=0)).abs()
        order = apart.argsort(descending=True, stable=True)
        found = areas(codes, labels)
        # Of equally good ones, the one that differs most.
        best = int(order[(found - 0.5).abs()[order].argmax()])
        sign = 1.0 if float(found[best]) >= 0.5 else -1.0
        return cls(dictionary, tuple(order.tolist()), best, sign, (codes != 0).float().mean(dim=0), codes.mean(dim=0))

    def exchanged(self, here: torch.Tensor, there: torch.Tensor, features: Sequence[int]) -> torch.Tensor:
        """Notes [n, d] in which these features are what they are in other notes [n, d]; all else stays."""
        return here + self.change(here, there, features).to(here)

    def ablated(self, here: torch.Tensor, features: Sequence[int]) -> torch.Tensor:
        """Notes in which these features are what they are on average, whether rules apply or not."""
        return here + self._along(self.middle - self.dictionary.codes(here), features).to(here)

    def change(self, here: torch.Tensor, there: torch.Tensor, features: Sequence[int]) -> torch.Tensor:
        """What an exchange of these features adds, [n, d]."""
        return self._along(self.dictionary.codes(there) - self.dictionary.codes(here), features)

    def randomly_exchanged(
        self, here: torch.Tensor, there: torch.Tensor, features: Sequence[int], rng: random.Random
    ) -> torch.Tensor:
        """The null of an exchange: as many others that are as often active, and each note is moved as far."""
        far = self.change(here, there, features).norm(dim=1, keepdim=True)
        other = self.change(here, there, self.matched(features, rng))
        as_far: torch.Tensor = torch.nn.functional.normalize(other, dim=1) * far
        return here + as_far.to(here)

    def matched(self, features: Sequence[int], rng: random.Random) -> tuple[int, ...]:
        """As many random features, none of these, each of about the frequency of one of them."""
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
        """The area under the curve of the best feature on other notes."""
        codes = self.dictionary.codes(notes)[:, [self.best]] * self.sign
        return float(areas(codes, labels)[0])

    def _along(self, codes: torch.Tensor, features: Sequence[int]) -> torch.Tensor:
        chosen = list(features)
        return codes[:, chosen] @ self.dictionary.directions[chosen]


def areas(codes: torch.Tensor, labels: Sequence[bool]) -> torch.Tensor:
    """[m]: by feature, how often it is larger on an item [n, m] with the label than on one without; equals count half."""
    marked = torch.tensor(list(labels))
    first, second = codes[marked][:, None], codes[~marked][None]
    return ((first > second).float() + 0.5 * (first == second).float()).mean(dim=(0, 1))
