"""Every kind of task, and policies at every insertion point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from programmable_kv.lab.composing import tasks as ask
from programmable_kv.lab.composing.arms import ALL_ARMS, FEW_ARMS
from programmable_kv.lab.composing.frame import InsertionPoint
from programmable_kv.lab.composing.suites.suite import MIDDLE, Group, grouped
from programmable_kv.lab.composing.tools import tool_requests


@dataclass(frozen=True, slots=True)
class Composing:
    """`policies` at every insertion point, `others` of each other kind of task, and `tools` requests for a tool."""

    policies: int
    others: int
    tools: int
    horizons: int

    stem: ClassVar[str] = "compose"
    title: ClassVar[str] = "Compiled pieces spliced together, against a full prefill of the same tokens"
    version: ClassVar[int] = 2
    points: ClassVar[tuple[InsertionPoint, ...]] = (
        InsertionPoint("system", 64),
        MIDDLE,
        InsertionPoint("conversation", 512),
        InsertionPoint("system", 4096),
    )

    def groups(self) -> list[Group]:
        everywhere = list(ask.policies(self.policies))
        updates = list(ask.updates(self.others))
        found: list[Group] = []
        for point in self.points:
            found += grouped(point, ALL_ARMS, everywhere)
            if point.area == "system":
                found += grouped(point, FEW_ARMS, updates)
            if point == MIDDLE:
                for several in (
                    ask.facts(self.others),
                    ask.coupled(self.others),
                    ask.two_hops(self.others, together=True),
                    ask.two_hops(self.others, together=False),
                    *(ask.several(self.others, pieces) for pieces in range(1, ask.MOST_PIECES + 1)),
                    tool_requests(self.tools),
                ):
                    found += grouped(point, FEW_ARMS, several)
        return found
