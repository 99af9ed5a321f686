"""Random controls: as many other positions from the same places, matched as finely as the context allows."""

from __future__ import annotations

import random
from collections.abc import Sequence

from programmable_kv.errors import InvalidArgumentError
from programmable_kv.lab.tools.nulls import random_slots

STRATA = (10, 5, 2, 1)


def matched(chosen: Sequence[int], eligible: Sequence[int], rng: random.Random) -> tuple[tuple[int, ...], int] | None:
    """Draw as many random other slots, part by part of the eligible ones. Returns them and the number of parts.

    Takes the finest division that leaves enough other slots in each part; None if fewer are left than were chosen.
    """
    for strata in STRATA:
        try:
            return random_slots(chosen, eligible, rng, strata=strata), strata
        except InvalidArgumentError:
            continue
    return None


def matched_heads(
    chosen: Sequence[tuple[int, int]], layers: int, heads: int, rng: random.Random
) -> tuple[tuple[int, int], ...]:
    """Draw as many random (layer, head) that are not chosen, from the same layers or the nearest ones with any left.

    Raises:
        InvalidArgumentError: more heads are chosen than are left in all layers.
    """
    left = {
        layer: sorted(set(range(heads)) - {head for each, head in chosen if each == layer}) for layer in range(layers)
    }
    if len(set(chosen)) > sum(map(len, left.values())):
        raise InvalidArgumentError(
            f"{len(set(chosen))} of {layers * heads} heads are chosen, so too few others are left to draw from"
        )
    drawn = []
    for layer, _ in sorted(set(chosen)):
        nearest = min((each for each in left if left[each]), key=lambda each: (abs(each - layer), each))
        head = rng.choice(left[nearest])
        left[nearest].remove(head)
        drawn.append((nearest, head))
    return tuple(sorted(drawn))
