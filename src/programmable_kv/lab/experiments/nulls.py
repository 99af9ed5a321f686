"""As many other positions of the same places, as finely matched as the context allows."""

from __future__ import annotations

import random
from collections.abc import Sequence

from programmable_kv.errors import InvalidArgumentError
from programmable_kv.lab.tools.nulls import random_slots

STRATA = (10, 5, 2, 1)


def matched(chosen: Sequence[int], eligible: Sequence[int], rng: random.Random) -> tuple[tuple[int, ...], int] | None:
    """Random slots beside those chosen, and from how many parts of the eligible ones they are drawn, part by part.

    The finest division that leaves enough others in each part; None where fewer are left than were chosen.
    """
    for strata in STRATA:
        try:
            return random_slots(chosen, eligible, rng, strata=strata), strata
        except InvalidArgumentError:
            continue
    return None
