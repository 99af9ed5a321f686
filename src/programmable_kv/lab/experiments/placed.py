"""A policy with its memory, which is its block of facts, in one of three places; prefilled in place, or spliced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch

from programmable_kv.cache.masks import PartReads
from programmable_kv.cache.span import Span
from programmable_kv.lab.experiments.boundary import Setting, in_setting
from programmable_kv.lab.experiments.pair import Texts
from programmable_kv.lab.experiments.written import Written, ruled

EARLY, LATE, BETWEEN = "early", "late", "between"
"""The memory above the rules; below them, before the question; or between them and the lines about other things."""
PLACES = (EARLY, LATE, BETWEEN)


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """A policy with its memory in one place, under the old value and the new one."""

    texts: Texts
    system: str
    """The policy's template."""
    memory: Span
    """Slots of the memory."""


def places(pair: Texts) -> Iterator[tuple[str, Placed]]:
    """Yield, by name, the policy with its memory where it is and in the other places, if that text can be measured."""
    case = pair.case
    first, memory, rules, *rest = case.scenario.prompt.split("\n\n")
    heading, *lines = rules.splitlines()
    named = [line for line in lines if ruled(line, case) is not None]
    others = [line for line in lines if ruled(line, case) is None]
    systems = {
        EARLY: case.scenario.prompt,
        LATE: "\n\n".join([first, rules, *rest, memory]),
        BETWEEN: "\n\n".join([first, "\n".join([heading, *named]), memory, "\n".join(others), *rest]),
    }
    for name, system in systems.items():
        found = pair if name == EARLY else in_setting(pair, Setting(name, system, case.asked))
        if isinstance(found, Texts):
            block = memory.format_map(dict(case.values(found.change[0])))
            yield name, Placed(found, system, slots_of(found.text, block))


def slots_of(text: Written, block: str) -> Span:
    """The tokens that begin inside a block of the text."""
    begins = "".join(text.tokens).index(block)
    starts = list(accumulate((len(token) for token in text.tokens), initial=0))[:-1]
    inside = [slot for slot, start in enumerate(starts) if begins <= start < begins + len(block)]
    return Span(inside[0], inside[-1] + 1)


def read_alone(text: Written, memory: Span) -> PartReads:
    """Which parts read which if the memory has read only itself, and everything after it reads everything."""
    part_of = torch.zeros(len(text.ids), dtype=torch.long)
    part_of[memory.start : memory.stop] = 1
    part_of[memory.stop :] = 2
    return PartReads(part_of, torch.tensor([[True, False, False], [False, True, False], [True, True, True]]))
