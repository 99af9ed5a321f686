"""What is read from logits: the gap of a decision, recovery, divergence, flips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

SMALLEST_SPAN = 0.5
"""nats between two full prefills' gaps below which a recovery would divide by noise"""


def gap(logits: torch.Tensor, new: int, old: int) -> torch.Tensor:
    """Log-probability of one token over another, [...], from logits [..., vocabulary]."""
    return logits[..., new] - logits[..., old]


def kl(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || other) in nats, [...], from logits [..., vocabulary]; computed in float32 or wider."""
    wide = torch.promote_types(reference.dtype, torch.float32)
    first, second = (torch.log_softmax(each.to(wide), dim=-1) for each in (reference, logits))
    return (first.exp() * (first - second)).sum(dim=-1)


def flip_rate(before: torch.Tensor, after: torch.Tensor) -> float:
    """The share of items [n, vocabulary] (or [n, options]) whose likeliest entry differs."""
    return float((before.argmax(dim=-1) != after.argmax(dim=-1)).float().mean())


@dataclass(frozen=True, slots=True)
class Scale:
    """The gaps of an item's two full prefills, between which an intervention lies.

    Denoising patches the new context's activations into the old one, and 1 is the new decision. Noising patches the old one's
    into the new, and is the same scale read from its other end: see `lost`.
    """

    old: float
    new: float

    @property
    def valid(self) -> bool:
        """Whether the two gaps differ enough to divide by, and their signs show that both decisions are right."""
        return self.old < 0 < self.new and self.new - self.old > SMALLEST_SPAN

    def recovery(self, measured: float) -> float:
        """0 where the old context's gap was measured, 1 where the new one's.

        Raises:
            ValueError: the item is not valid.
        """
        if not self.valid:
            raise ValueError(f"gaps of {self.old:.3f} and {self.new:.3f} nats give no recovery: leave the item out")
        return (measured - self.old) / (self.new - self.old)

    def lost(self, measured: float) -> float:
        """1 where an intervention in the new context took its decision back to the old one's.

        Raises:
            ValueError: the item is not valid.
        """
        return 1 - self.recovery(measured)

    def flipped(self, measured: float) -> bool:
        """Whether the decision is the new context's: a recovery says nothing about that."""
        return measured > 0


def split_in_half(items: Sequence[str]) -> tuple[list[int], list[int]]:
    """Two halves of items by number, each domain's split evenly: rank on the one, score on the other.

    `items` are the items' domains. Of each domain every second item goes to the second half.
    """
    seen: dict[str, int] = {}
    halves: tuple[list[int], list[int]] = ([], [])
    for index, domain in enumerate(items):
        halves[seen.get(domain, 0) % 2].append(index)
        seen[domain] = seen.get(domain, 0) + 1
    return halves
