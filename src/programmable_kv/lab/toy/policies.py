"""Policies of a few tokens, for models of a few layers: a field, a rule for each of its values, a question.

`begin field VALUE end, rule VALUE ACTION end, rule VALUE ACTION end, LINE end, ask answer -> ACTION`. The line before
the question is neutral or updates the field. The rules' order and actions are random, so that only the policy tells the
answer. A quarter of the pairs of actions are held out: training never draws them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import count

VALUES = 2
ACTIONS = 32
"""Many, so that policies cannot be learned by heart: with 4, one model (no record) failed on held-out policies."""
_HELD_OUT = 4
"""One in so many pairs of actions is held out."""
NEUTRAL = 2
"""Number of words of the neutral line."""
_NAMES = count()
BEGIN, FIELD, RULE, UPDATE, ASK, ANSWER, END = (next(_NAMES) for _ in range(7))
_FIRST_VALUE = next(_NAMES)
_FIRST_ACTION = _FIRST_VALUE + VALUES
_FIRST_NEUTRAL = _FIRST_ACTION + ACTIONS
VOCABULARY = _FIRST_NEUTRAL + NEUTRAL
FIELD_SLOT = 2
"""Slot of the field's value."""
LENGTH = 4 + 4 * VALUES + 3 + 2


@dataclass(frozen=True, slots=True)
class ToyPolicy:
    """A policy, and the action that each value of its field calls for."""

    order: tuple[int, ...]
    """Values of the rules, in the rules' order."""
    actions: tuple[int, ...]
    """Actions by value."""
    value: int
    neutral: tuple[int, int]
    update: int | None = None
    """The value that the line before the question sets; None if that line is neutral."""

    @property
    def held_out(self) -> bool:
        """Whether the policy is kept for probing. Every action occurs in policies of both kinds."""
        return sum(self.actions) % _HELD_OUT == 0

    @property
    def right(self) -> int:
        """The token of the right action."""
        return self.action(self.value if self.update is None else self.update)

    def action(self, value: int) -> int:
        return _FIRST_ACTION + self.actions[value]

    def ids(self) -> list[int]:
        """All tokens, up to the one whose row decides."""
        rules = [token for value in self.order for token in (RULE, _FIRST_VALUE + value, self.action(value), END)]
        return [BEGIN, FIELD, _FIRST_VALUE + self.value, END, *rules, *self.line(), ASK, ANSWER]

    def line(self) -> list[int]:
        """The line before the question."""
        if self.update is not None:
            return [UPDATE, _FIRST_VALUE + self.update, END]
        return [*(_FIRST_NEUTRAL + each for each in self.neutral), END]

    def slots(self) -> dict[str, tuple[int, ...]]:
        """The later slots by kind of token."""
        starts = range(4, 4 + 4 * VALUES, 4)
        return {
            "names": tuple(starts),
            "values": tuple(start + 1 for start in starts),
            "actions": tuple(start + 2 for start in starts),
            "ends": tuple(start + 3 for start in starts),
            "tail": tuple(range(4 + 4 * VALUES, LENGTH - 1)),
        }

    def with_value(self, value: int) -> ToyPolicy:
        return replace(self, value=value)

    def updated(self, value: int) -> ToyPolicy:
        return replace(self, update=value)


def draw(rng: random.Random, *, updates: float = 0.0, held_out: bool = False) -> ToyPolicy:
    """Draw a policy to train on, or one that is held out. It has an update with probability `updates`."""
    while (policy := _drawn(rng)).held_out is not held_out:
        pass
    if rng.random() >= updates:
        return policy
    return policy.updated(rng.choice([other for other in range(VALUES) if other != policy.value]))


def _drawn(rng: random.Random) -> ToyPolicy:
    order = tuple(rng.sample(range(VALUES), VALUES))
    value = rng.randrange(VALUES)
    actions = tuple(rng.sample(range(ACTIONS), VALUES))
    return ToyPolicy(order, actions, value, (rng.randrange(NEUTRAL), rng.randrange(NEUTRAL)))
