"""`Plan`: what an operation would do to a cached context. It can be printed, compared and tested without a model.

A plan is a list of steps on the cache buffer, in order, and the slots that one forward computes at the end. `apply`
carries it out on the buffer and the ledger. A step counts slots as they are when the step begins; `compute` counts them
in the context after all steps.
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
    """Move the tail that begins at slot `start` to slot `to`, and its positions with it."""

    start: int
    to: int
    by: int | None = None
    """how many positions it moves by; as many as slots when None"""


@dataclass(frozen=True, slots=True)
class Insert:
    """Put a compiled skill at slot `at`, in the place of `replacing` slots. What follows moves."""

    at: int
    skill: Skill = field(repr=False)
    replacing: int = 0
    positions: tuple[int, ...] = ()
    """the positions of its tokens; when empty, those that follow the slot before"""
    ends: int | None = None
    """the position that what follows moves to; directly after the skill when None"""


@dataclass(frozen=True, slots=True)
class Recompile:
    """Compile a skill again, apart from this context, after the text that it read when it was first compiled.

    The result replaces the skill in its slots.
    """

    span: Span
    units: tuple[Unit, ...] = field(repr=False)
    """the skill's units after the operation"""
    declared: Declared = field(repr=False)
    """the words by which its lines mention its fields in this context"""
    positions: tuple[int, ...] = field(repr=False)
    """the positions of its tokens"""
    ends: int
    """the position of what follows"""

    @property
    def tokens_computed(self) -> int:
        """The skill's tokens, and those that it reads without containing them: both are computed."""
        return len(self.units[0].read) + len(self.span)


@dataclass(frozen=True, slots=True)
class Exchange:
    """Swap the slots [start, middle) with the slots [middle, stop)."""

    start: int
    middle: int
    stop: int
    positions: tuple[int, ...] = ()
    """the positions of these slots afterwards; the same as before when empty"""


@dataclass(frozen=True, slots=True)
class Select:
    """Choose further slots to compute. Which ones depends on the tensors at this step."""

    selection: Selection
    origin: Origin


Step = Truncate | Shift | Insert | Recompile | Exchange | Select


@dataclass(frozen=True, slots=True)
class Compute:
    """Slots to compute, counted in the context after all steps. One forward computes all of a plan's slots."""

    span: Span
    origin: Origin = Origin.COMPUTED
    unread: tuple[Span, ...] = ()
    """slots before it that it does not read, ascending"""


@dataclass(frozen=True, slots=True)
class Plan:
    """What an operation would do, and why."""

    operation: str
    before: int
    """how many tokens the context has before the operation"""
    after: Context = field(repr=False)
    """the context after the operation"""
    steps: tuple[Step, ...] = ()
    compute: tuple[Compute, ...] = ()
    """what the forward computes, ascending and without overlap"""
    asked: Mode | None = None
    """the mode that an edit was asked for; None if the default chose it"""
    used: Mode | None = None
    """the mode that an edit uses"""
    why: str = ""
    """why another mode is used than was asked for, or what is done in addition"""
    bytes_per_token: int = field(default=0, repr=False)
    """bytes of cache for one token, all layers together"""

    @property
    def selects(self) -> tuple[Select, ...]:
        return tuple(step for step in self.steps if isinstance(step, Select))

    @property
    def tokens_computed(self) -> int:
        """Tokens that go through the transformer, including those that a selection computes in order to choose.

        A selection may choose tokens that are computed anyway: then this is an upper bound.
        """
        chosen = sum(step.selection.count + step.selection.rows_to_choose for step in self.selects)
        compiled = sum(step.tokens_computed for step in self.steps if isinstance(step, Recompile))
        return sum(len(one.span) for one in self.compute) + chosen + compiled

    @property
    def tokens_relocated(self) -> int:
        """Cached tokens that are moved, and tokens of skills that are put in place."""
        return sum(count for _, count in self._relocations())

    @property
    def bytes_moved(self) -> int:
        """Bytes of cache that are moved. An account also counts rows that are set aside for an undo."""
        return self.tokens_relocated * self.bytes_per_token

    @property
    def relocates(self) -> bool:
        return any(True for _ in self._relocations())

    @property
    def reach(self) -> int:
        """A bound on positions: every relocation starts from and ends at positions below it."""
        compiled = [int(step.skill.segment.computed_at[-1]) + 1 for step in self.steps if isinstance(step, Insert)]
        compiled += [step.ends + len(step.units[0].read) for step in self.steps if isinstance(step, Recompile)]
        gaps = self.after.begins[-1] - len(self.after)
        return max([self.before + gaps, len(self.after) + gaps, *compiled])

    @property
    def computes_in_the_middle(self) -> bool:
        """Whether tokens are computed that are not the last ones of the context, or that do not read all before them."""
        if self.selects:
            return True
        ends = len(self.after)
        for one in reversed(self.compute):
            if one.span.stop != ends or one.unread:
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
        """This plan with another reason before its own."""
        return replace(self, why="; ".join(reason for reason in (why, self.why) if reason))

    def __str__(self) -> str:
        lines = [f"{self.operation}: {self.before} -> {len(self.after)} tokens"]
        if self.used is not None:
            instead = f", {self.asked} was asked for" if self.asked not in (None, self.used) else ""
            lines[0] += f", mode {self.used}{instead}"
        lines += [f"  {_described(step)}" for step in self.steps]
        lines += [f"  {_computing(one)}" for one in self.compute]
        most = "at most " if self.selects else ""
        lines.append(
            f"  = {most}{self.tokens_computed} tokens computed, {self.tokens_relocated} relocated, "
            f"{self.bytes_moved:,} bytes moved"
        )
        if self.why:
            lines.append(f"  why: {self.why}")
        return "\n".join(lines)


def _computing(one: Compute) -> str:
    unread = ", ".join(f"[{span.start}, {span.stop})" for span in one.unread)
    without = f", without reading {unread}" if unread else ""
    return f"compute slots [{one.span.start}, {one.span.stop}) ({one.origin}{without})"


def _described(step: Step) -> str:
    match step:
        case Truncate(length):
            return f"drop the slots from {length} on"
        case Shift(start, to, _):
            return f"move the tail from slot {start} to slot {to}"
        case Insert(at, skill, replacing):
            instead = f", replacing {replacing} tokens" if replacing else ""
            return f"insert {skill.name} ({len(skill)} tokens) at slot {at}{instead}"
        case Recompile(span, units):
            behind = f" after {len(units[0].read)} tokens" if units[0].read else ""
            return f"recompile {units[0].name}{behind}, in slots [{span.start}, {span.stop})"
        case Exchange(start, middle, stop, _):
            return f"exchange slots [{start}, {middle}) and [{middle}, {stop})"
        case Select(selection, _):
            return f"select {selection}"
