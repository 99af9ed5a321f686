"""Measures of logits: the gap of a decision, recovery, divergence, flips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

SMALLEST_SPAN = 0.5
"""smallest difference in nats between the gaps of two full prefills; below it, a recovery would divide by noise"""


def gap(logits: torch.Tensor, new: int, old: int) -> torch.Tensor:
    """Return the log-probability of token `new` minus that of token `old`, [...], from logits [..., vocabulary]."""
    return logits[..., new] - logits[..., old]


def kl(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return KL(reference || other) in nats, [...], from logits [..., vocabulary]. Computed in float32 or wider."""
    wide = torch.promote_types(reference.dtype, torch.float32)
    first, second = (torch.log_softmax(each.to(wide), dim=-1) for each in (reference, logits))
    return (first.exp() * (first - second)).sum(dim=-1)


def flip_rate(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return the share of items [n, vocabulary] (or [n, options]) whose most likely entry differs."""
    return float((before.argmax(dim=-1) != after.argmax(dim=-1)).float().mean())


@dataclass(frozen=True, slots=True)
class Scale:
    """The gaps of an item's two full prefills: the ends of the scale on which an intervention is measured.

    Denoising patches the new context's activations into the old context; 1 is the new decision. Noising patches the old
    context's activations into the new one, and reads the same scale from its other end: see `lost`.
    """

    old: float
    new: float

    @property
    def valid(self) -> bool:
        """Whether the gaps differ enough to divide by, and their signs show that both decisions are right."""
        return self.old < 0 < self.new and self.new - self.old > SMALLEST_SPAN

    def recovery(self, measured: float) -> float:
        """Return the recovery of a measured gap: 0 for the old context's gap, 1 for the new one's.

        Raises:
            ValueError: the item is not valid.
        """
        if not self.valid:
            raise ValueError(
                f"gaps of {self.old:.3f} and {self.new:.3f} nats do not define a recovery: leave the item out"
            )
        return (measured - self.old) / (self.new - self.old)

    def lost(self, measured: float) -> float:
        """Return 1 minus the recovery: 1 if an intervention in the new context restored the old context's gap.

        Raises:
            ValueError: the item is not valid.
        """
        return 1 - self.recovery(measured)

    def flipped(self, measured: float) -> bool:
        """Return whether the decision is the new context's. A recovery alone does not say that."""
        return measured > 0


def split_in_half(items: Sequence[str]) -> tuple[list[int], list[int]]:
    """Split item numbers into two halves, each domain evenly, so that one half ranks and the other scores.

    `items` has each item's domain. Every second item of a domain goes to the second half.
    """
    seen: dict[str, int] = {}
    halves: tuple[list[int], list[int]] = ([], [])
    for index, domain in enumerate(items):
        halves[seen.get(domain, 0) % 2].append(index)
        seen[domain] = seen.get(domain, 0) + 1
    return halves
