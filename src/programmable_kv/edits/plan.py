"""A plan: what an operation would do to a cached context. It can be printed, compared and tested without a model.

A plan is a list of steps on the cache buffer, in order, and the slots that one forward computes at the end. `apply` carries
it out on the buffer and the ledger. Slots of a step are those at the time of the step; `compute` counts in the context after.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from programmable_kv.cache.span import Span
from programmable_kv.design.declared import Declared
from programmable_kv.edits.modes import Mode
from programmable_kv.edits.selection import Selection
from programmable_kv.ledger.run import Origin
from programmable_kv.prompt.context import Context
from programmable_kv.prompt.units import Unit
from programmable_kv.skills.skill import Skill


@dataclass(frozen=True, slots=True)
class Truncate:
    """Drop the slots from `length` on."""

    length: int


@dataclass(frozen=True, slots=True)
class Shift:
    """Move the tail that begins at slot `start` to slot `to`, its positions with it."""

    start: int
    to: int
    by: int | None = None
    """by how many positions; as many as slots when None"""


@dataclass(frozen=True, slots=True)
class Insert:
    """Put a compiled skill in the place of the `replacing` slots from `at` on; what follows moves."""

    at: int
    skill: Skill = field(repr=False)
    replacing: int = 0
    positions: tuple[int, ...] = ()
    """of its tokens; those right behind the slot before when empty"""
    ends: int | None = None
    """the position that what follows moves to; right behind the skill when None"""


@dataclass(frozen=True, slots=True)
class Recompile:
    """Compile a skill anew, alone behind what it read while it was compiled, and put it where it stands."""

    span: Span
    units: tuple[Unit, ...] = field(repr=False)
    """of the skill, as they are afterwards"""
    declared: Declared = field(repr=False)
    """what its lines say of its fields in this context"""
    positions: tuple[int, ...] = field(repr=False)
    """of its tokens"""
    ends: int
    """the position of what follows"""

    @property
    def tokens_computed(self) -> int:
        """Those that it reads and does not hold are computed as well."""
        return len(self.units[0].read) + len(self.span)


@dataclass(frozen=True, slots=True)
class Exchange:
    """The slots [start, middle) and [middle, stop) change places."""

    start: int
    middle: int
    stop: int
    positions: tuple[int, ...] = ()
    """of these slots afterwards; as before when empty"""


@dataclass(frozen=True, slots=True)
class Select:
    """Choose slots that are computed as well; which ones depends on the tensors at this step."""

    selection: Selection
    origin: Origin


Step = Truncate | Shift | Insert | Recompile | Exchange | Select


@dataclass(frozen=True, slots=True)
class Compute:
    """Slots of the context after the edit that are computed, in one forward with all others."""

    span: Span
    origin: Origin = Origin.COMPUTED


@dataclass(frozen=True, slots=True)
class Plan:
    """What an operation would do, and why."""

    operation: str
    before: int
    """tokens in the context now"""
    after: Context = field(repr=False)
    """the context as it will be"""
    steps: tuple[Step, ...] = ()
    compute: tuple[Compute, ...] = ()
    """ascending, without overlap"""
    asked: Mode | None = None
    """of an edit; None where the default was left to choose"""
    used: Mode | None = None
    why: str = ""
    """why another mode is used than was asked for, or what is done beyond it"""
    bytes_per_token: int = field(default=0, repr=False)
    """of cache, all layers"""

    @property
    def selects(self) -> tuple[Select, ...]:
        return tuple(step for step in self.steps if isinstance(step, Select))

    @property
    def tokens_computed(self) -> int:
        """Tokens that go through the transformer, those that a selection computes to choose by included.

        Where a selection may choose what is computed in any case, it is the most that it can be.
        """
        chosen = sum(step.selection.count + step.selection.rows_to_choose for step in self.selects)
        compiled = sum(step.tokens_computed for step in self.steps if isinstance(step, Recompile))
        return sum(len(one.span) for one in self.compute) + chosen + compiled

    @property
    def tokens_relocated(self) -> int:
        """Cached tokens that are moved or put in place."""
        return sum(count for _, count in self._relocations())

    @property
    def bytes_moved(self) -> int:
        """Bytes of cache that change their place. An account counts, besides, rows that are kept aside for an undo."""
        return self.tokens_relocated * self.bytes_per_token

    @property
    def relocates(self) -> bool:
        return any(True for _ in self._relocations())

    @property
    def reach(self) -> int:
        """No position that a relocation starts from or ends at reaches this one."""
        compiled = [int(step.skill.segment.computed_at[-1]) + 1 for step in self.steps if isinstance(step, Insert)]
        compiled += [step.ends + len(step.units[0].read) for step in self.steps if isinstance(step, Recompile)]
        gaps = self.after.begins[-1] - len(self.after)
        return max([self.before + gaps, len(self.after) + gaps, *compiled])

    @property
    def computes_in_the_middle(self) -> bool:
        """Whether tokens are computed that are not simply the last ones of the context."""
        if self.selects:
            return True
        ends = len(self.after)
        for one in reversed(self.compute):
            if one.span.stop != ends:
                return True
            ends = one.span.start
        return False

    def _relocations(self) -> Iterator[tuple[Step, int]]:
        length = self.before
        for step in self.steps:
            match step:
                case Truncate(to):
                    length = to
                case Shift(start, to, _):
                    if length > start:
                        yield step, length - start
                    length += to - start
                case Insert(at, skill, replacing):
                    grown = len(skill) - replacing
                    yield step, len(skill) + (length - at - replacing if grown else 0)
                    length += grown
                case Exchange(start, _, stop, _):
                    yield step, stop - start
                case Recompile(span):
                    yield step, len(span)
                case Select():
                    pass

    def because(self, why: str) -> Plan:
        """With another reason in front."""
        return replace(self, why="; ".join(reason for reason in (why, self.why) if reason))

    def __str__(self) -> str:
        lines = [f"{self.operation}: {self.before} -> {len(self.after)} tokens"]
        if self.used is not None:
            instead = f", {self.asked} was asked for" if self.asked not in (None, self.used) else ""
            lines[0] += f", mode {self.used}{instead}"
        lines += [f"  {_described(step)}" for step in self.steps]
        lines += [f"  compute slots [{one.span.start}, {one.span.stop}) ({one.origin})" for one in self.compute]
        most = "at most " if self.selects else ""
        lines.append(
            f"  = {most}{self.tokens_computed} tokens computed, {self.tokens_relocated} relocated, "
            f"{self.bytes_moved:,} bytes moved"
        )
        if self.why:
            lines.append(f"  why: {self.why}")
        return "\n".join(lines)


def _described(step: Step) -> str:
    match step:
        case Truncate(length):
            return f"drop the slots from {length} on"
        case Shift(start, to, _):
            return f"move the tail from slot {start} to slot {to}"
        case Insert(at, skill, replacing):
            instead = f" in the place of {replacing} tokens" if replacing else ""
            return f"insert {skill.name} ({len(skill)} tokens) at slot {at}{instead}"
        case Recompile(span, units):
            behind = f" behind {len(units[0].read)} tokens" if units[0].read else ""
            return f"compile {units[0].name} anew{behind}, in slots [{span.start}, {span.stop})"
        case Exchange(start, middle, stop, _):
            return f"exchange slots [{start}, {middle}) and [{middle}, {stop})"
        case Select(selection, _):
            return f"select {selection}"
