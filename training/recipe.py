"""The recipe of the adapter of `embedded-plain`: stages, rates and weights of the losses."""

from __future__ import annotations

import math
from dataclasses import dataclass

from programmable_kv.scenarios.phrasings import Stage


@dataclass(frozen=True, slots=True)
class TrainingRecipe:
    """All settings that determine the adapter's weights, apart from the base model and the grammar."""

    seed: int = 20261124
    pair_steps: int = 300
    short_steps: int = 300
    mixed_steps: int = 120
    wide_steps: int = 330
    hop_steps: int = 250
    full_steps: int = 300
    topics_steps: int = 300
    full_again_steps: int = 150
    hard_steps: int = 420
    settle_steps: int = 120
    obey_steps: int = 110
    looked_up_steps: int = 100
    """Number of steps in each `Stage`, in this order. The last three stages also draw the model back to the base."""
    conversations_per_step: int = 8
    tokens_per_pass: int = 2048
    """padded tokens in one forward and backward; a step takes as many passes as its conversations need"""
    learning_rate: float = 5e-4
    cosine_steps: int = 1200
    """step at which the first cosine would end; the wide stage stops earlier, at about a tenth of the rate"""
    later_learning_rate: float = 5e-4
    """peak of the new cosines that begin at the hop, topics and hard stages, each with a new optimizer"""
    settle_learning_rate: float = 3e-4
    obey_learning_rate: float = 5e-4
    warmup_steps: int = 20
    lora_rank: int = 16
    lora_alpha: int = 32
    replay_tokens: int = 128
    """tokens of plain text replayed in each step"""
    replay_weight: float = 0.6
    settle_replay_tokens: int = 512
    """tokens of plain text replayed in each step of the last three stages"""
    settle_replay_weight: float = 4.0
    obey_replay_weight: float = 1.5
    """In the last three stages, the replayed text is not learned. Instead, the adapted model's distribution over it is
    drawn to the base's. When learned for thousands of steps, these few documents are memorised word for word, and other
    text becomes less likely."""
    max_gradient_norm: float = 1.0
    last_stage_share: float = 0.5
    """The exported weights are a mean of the weights before and after the last stage; this is the share of the latter.
    (Averaging weights of one run: Izmailov et al. 2018, https://arxiv.org/abs/1803.05407)"""

    @property
    def steps(self) -> int:
        return sum(steps for _, steps in self._stages)

    @property
    def fresh_starts(self) -> tuple[int, ...]:
        """The steps (except step 0) at which a new cosine and a new optimizer begin."""
        second = self.pair_steps + self.short_steps + self.mixed_steps + self.wide_steps
        third = second + self.hop_steps + self.full_steps
        fourth = third + self.topics_steps + self.full_again_steps
        settling = fourth + self.hard_steps
        obeying = settling + self.settle_steps
        return second, third, fourth, settling, obeying, obeying + self.obey_steps

    def divergence_weight(self, step: int) -> float | None:
        """Return the weight of the divergence from the base on plain text; None in steps that learn plain text."""
        obey = self.obey_replay_weight
        return {"settle": self.settle_replay_weight, "obey": obey, "looked_up": obey}.get(self.stage(step))

    @property
    def _stages(self) -> tuple[tuple[Stage, int], ...]:
        return (
            ("pair", self.pair_steps), ("short", self.short_steps), ("mixed", self.mixed_steps),
            ("wide", self.wide_steps), ("hop", self.hop_steps), ("full", self.full_steps),
            ("topics", self.topics_steps), ("full", self.full_again_steps), ("hard", self.hard_steps),
            ("settle", self.settle_steps), ("obey", self.obey_steps), ("looked_up", self.looked_up_steps),
        )  # fmt: skip

    def stage(self, step: int) -> Stage:
        end = 0
        for name, steps in self._stages:
            end += steps
            if step < end:
                return name
        return "full"

    def rate(self, step: int) -> float:
        """Return the learning rate: seven cosines that fall to a twentieth of the peak, each after a linear warm-up."""
        starts = [0, *self.fresh_starts]
        start = max(start for start in starts if start <= step)
        if start == 0:
            peak, whole = self.learning_rate, self.cosine_steps
        else:
            obey = self.obey_learning_rate
            own = {"settle": self.settle_learning_rate, "obey": obey, "looked_up": obey}
            peak = own.get(self.stage(step), self.later_learning_rate)
            whole = min(s for s in [*starts, self.steps] if s > start) - start
        done = step - start
        if done < self.warmup_steps:
            return peak * (done + 1) / self.warmup_steps
        progress = (done - self.warmup_steps) / (whole - self.warmup_steps)
        return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
