"""The recipe of the training by design: the mixture of sequences, the rates, and the length of the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from programmable_kv.errors import TrainingError

MIXTURE: tuple[tuple[str, float], ...] = (
    ("design policies", 0.25), ("rule sets alone", 0.08), ("rule sets in one", 0.03), ("tools alone", 0.12),
    ("tools in one", 0.05), ("facts alone", 0.05), ("facts in one", 0.02), ("updates alone", 0.09),
    ("updates in one", 0.02), ("conversations", 0.18), ("errata policies", 0.07), ("rewritten policies", 0.04),
)  # fmt: skip
"""(family, its share of the sequences). The families "in one", conversations, errata and rewritten policies are causal.
Their share is a third or more, because with a quarter the figures under causal visibility fell."""


def mixture_of(texts: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """Parse `family=share` texts into a mixture. The shares are divided by their sum.

    Raises:
        TrainingError: a family is unknown or given twice, or a share is not a number above zero.
    """
    shares: dict[str, float] = {}
    for text in texts:
        family, _, written = text.rpartition("=")
        family = family.strip()
        if family not in dict(MIXTURE):
            known = ", ".join(name for name, _ in MIXTURE)
            raise TrainingError(
                f"--family {text!r} does not name a family of sequences. Write 'name=share'; choose from {known}"
            )
        if family in shares:
            raise TrainingError(f"--family gives {family!r} twice: give its share once")
        try:
            share = float(written)
        except ValueError:
            share = math.nan
        if not 0 < share < math.inf:
            raise TrainingError(
                f"--family {text!r} has the share {written!r}: write a number above zero, as in '{family}=0.3'"
            )
        shares[family] = share
    total = sum(shares.values())
    return tuple((family, share / total) for family, share in shares.items())


@dataclass(frozen=True, slots=True)
class DesignRecipe:
    """All settings that determine the weights, apart from the base model, the initial adapter and the grammar."""

    seed: int = 20261126
    steps: int = 3000
    """step at which the run and its cosine end, unless seconds are given"""
    seconds: float | None = None
    """seconds of training after which the run ends; if given, the cosine follows the elapsed share of them"""
    sequences_per_step: int = 64
    longest: int = 2048
    """most tokens of a sequence; longer ones are drawn again"""
    mixture: tuple[tuple[str, float], ...] = MIXTURE
    learning_rate: float = 4e-4
    last_rate_share: float = 0.05
    warmup_steps: int = 30
    replay_every: int = 2
    replay_windows: int = 8
    replay_tokens: int = 384
    replay_weight: float = 2.0
    """weight of the divergence from the base on plain text, in the steps that replay it"""
    max_gradient_norm: float = 1.0
    averaged_share: float = 0.15
    """the exported weights are their mean over this last share of the run"""

    def share(self, step: int, seconds: float) -> float:
        """Return how much of the run is over, 0 to 1."""
        return min(1.0, step / self.steps if self.seconds is None else seconds / self.seconds)

    def rate(self, step: int, share: float) -> float:
        """Return the learning rate: a linear warm-up, and a cosine over the whole run."""
        cosine = 0.5 * (1 + math.cos(math.pi * share))
        floor = self.last_rate_share
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup_steps)) * (floor + (1 - floor) * cosine)
