"""Planning under `visibility="design"`: an operation changes the text, and what read the change is recomputed.

The steps move every slot to its slot and position in the new text. `Build.outdated` then says what to compute: the
closure of what read the change, and nothing more. So the result is exact by construction. Turns that count as history
are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from programmable_kv.cache.span import Span
from programmable_kv.design.build import Build
from programmable_kv.design.parts import declared_in, parts_of
from programmable_kv.design.room import room_for, without_trailing_room
from programmable_kv.design.units import with_first_room
from programmable_kv.edits.compose import plan_cut, plan_move, plan_splice
from programmable_kv.edits.entries import on_ledger
from programmable_kv.edits.modes import Mode
from programmable_kv.edits.plan import Compute, Exchange, Insert, Plan, Recompile, Shift, Step, Truncate
from programmable_kv.edits.seam import SeamRepair
from programmable_kv.errors import InvalidEditError
from programmable_kv.ledger.run import Origin
from programmable_kv.prompt.context import Context
from programmable_kv.prompt.readers import Turns, joined
from programmable_kv.prompt.units import Kind
from programmable_kv.skills.skill import Skill

_MODES = (None, Mode.READERS, Mode.SUFFIX, Mode.FULL)
_WHOLE = SeamRepair(0)
_SKILLS_STAY = "skills are not recomputed: they read nothing in this context"


@dataclass(frozen=True, slots=True)
class DesignState:
    """A context under visibility="design", its ledger, and where its open question begins."""

    context: Context
    build: Build
    opens: int
    """the first slot of the turns since the last answer: the open question"""
    bytes_per_token: int = 0

    def kept(self, after: Context, turns: Turns) -> set[int]:
        """Indices of the units in `after` that are kept as history.

        These are turns and errata: all of them for `keep`, those before the open question for `open`, none for `all`.
        """
        if turns is Turns.ALL:
            return set()
        old = {id(unit) for start, unit in zip(self.context.starts, self.context.units, strict=False)
               if turns is Turns.KEEP or start < self.opens}  # fmt: skip
        return {
            index
            for index, unit in enumerate(after.units)
            if unit.kind in (Kind.TURN, Kind.ERRATUM) and id(unit) in old
        }


def check_mode(mode: Mode | None) -> None:
    """
    Raises:
        InvalidEditError: an edit in this mode would not be exact under visibility="design".
    """
    if mode not in _MODES:
        raise InvalidEditError(
            f"under visibility='design' an edit is exact: it writes the field and recomputes its readers, which mode "
            f"{str(mode)!r} does not. Leave the mode out, give mode='full' to compute everything, or use a notebook with "
            "visibility='causal'."
        )


def check_repair(repair: SeamRepair | None) -> None:
    """
    Raises:
        InvalidEditError: the repair recomputes tokens; under visibility="design" a skill has no seam to repair.
    """
    if repair is not None and repair.computes:
        raise InvalidEditError(
            "under visibility='design' a skill reads only itself, so there is no seam to repair: leave the repair out"
        )


def plan_design_edit(
    state: DesignState, changes: Mapping[str, str], mode: Mode | None, turns: Turns, tokenizer: Any
) -> Plan:
    """Plan to write values and recompute what read them. Mode `full` recomputes all, at the positions of a new prefill.

    Raises:
        InvalidEditError: the mode is not exact under visibility="design".
    """
    check_mode(mode)
    rewritten = {name: value for name, value in changes.items() if state.context.fields[name].written != value}
    written, _ = state.context.write(tokenizer, rewritten)
    if mode is Mode.FULL:
        roomy = with_first_room(written, tokenizer)
    else:
        roomy = written.with_units([room_for(unit) for unit in written.units])
    after = without_trailing_room(roomy)
    steps: list[Step] = []
    reasons: list[str] = []
    for index in reversed(range(len(after.units))):
        old, new = state.context.units[index], after.units[index]
        if len(old) == len(new) and old.positions == new.positions:
            continue
        ends = state.context.starts[index + 1]
        by = new.positions - old.positions
        if ends == len(state.context):
            steps.append(Truncate(min(ends, ends - len(old) + len(new))))
        else:
            steps.append(Shift(ends, ends - len(old) + len(new), by))
        if by and ends < len(state.context):
            names = " and ".join(dict.fromkeys(place.name for place in new.places if place.name in rewritten))
            grew = f"grew by {by}" if by > 0 else f"shrank by {-by}"
            reasons.append(f"the text with {names} {grew} positions, so what follows was moved")
    wide = Turns.ALL if mode in (Mode.SUFFIX, Mode.FULL) else turns
    plan = Plan("edit", len(state.context), after, tuple(steps), (), mode, mode or Mode.READERS, "; ".join(reasons))
    return _built(state, plan, wide, whole=mode is Mode.FULL)


def plan_design_splice(
    state: DesignState, skill: Skill, where: Span, *, operation: str = "splice", turns: Turns = Turns.OPEN
) -> Plan:
    """Plan to put a skill in the place of some slots. Errors as in `plan_splice`."""
    plan = plan_splice(state.context, None, skill, where, _WHOLE, operation=operation)
    after = without_trailing_room(plan.after)
    insert = next(step for step in plan.steps if isinstance(step, Insert))
    stands = Span(insert.at, insert.at + len(skill))
    ends = after.position_of(stands.stop)
    steps = (replace(insert, positions=tuple(after.positions_in(stands)), ends=ends),)
    return _built(state, replace(plan, after=after, steps=steps, why=""), turns)


def plan_design_cut(state: DesignState, span: Span, turns: Turns = Turns.OPEN) -> Plan:
    """Plan to remove some slots. Errors as in `plan_cut`."""
    plan = plan_cut(state.context, span)
    after = without_trailing_room(plan.after)
    steps = plan.steps
    if span.stop < len(state.context):
        by = after.position_of(span.start) - state.context.position_of(span.stop)
        steps = (Shift(span.stop, span.start, by),)
    return _built(state, replace(plan, after=after, steps=steps, why=""), turns)


def plan_design_move(state: DesignState, span: Span, to: int, turns: Turns = Turns.OPEN) -> Plan:
    """Plan to move some slots before slot `to`. Errors as in `plan_move`."""
    plan = plan_move(state.context, span, to)
    after = without_trailing_room(plan.after)
    steps: list[Step] = []
    for step in plan.steps:
        if isinstance(step, Exchange):
            positions = tuple(after.positions_in(Span(step.start, step.stop)))
            steps.append(Exchange(step.start, step.middle, step.stop, positions))
    return _built(state, replace(plan, after=after, steps=tuple(steps), why=""), turns)


def plan_design_recompute(state: DesignState, start: int | None) -> Plan:
    """Plan to recompute what is not exact and, with `start`, all parts that end after that slot.

    Skills that are exact are not recomputed: they read nothing in this context.
    """
    plan = Plan("recompute", len(state.context), state.context)
    plan = _built(state, plan, Turns.ALL)
    if start is None:
        return plan
    later = [part for part in parts_of(state.context, state.build.declared) if part.span.stop > start]
    more = [part.span for part in later if not part.scope.is_skill]
    told = _SKILLS_STAY if len(more) < len(later) else ""
    return replace(plan, compute=_computes([*(one.span for one in plan.compute), *more])).because(told)


def _built(state: DesignState, plan: Plan, turns: Turns, *, whole: bool = False) -> Plan:
    """The plan, completed by what has to be computed after its steps."""
    build = state.build
    for step in plan.steps:
        stepped = on_ledger(step, build)
        assert isinstance(stepped, Build)
        build = stepped
    kept = state.kept(plan.after, turns)
    spans = build.outdated(plan.after, kept)
    anew = _recompiled(plan.after, spans, build)
    if anew:
        plan = replace(plan, steps=(*plan.steps, *anew))
        for step in anew:
            build = on_ledger(step, build)
            read = len(step.units[0].read)
            tokens = "token" if read == 1 else f"{read} tokens"
            plan = plan.because(
                f"skill {step.units[0].name!r} is recompiled after the {tokens} before it that it reads"
            )
        spans = build.outdated(plan.after, kept)
    if whole:
        parts = parts_of(plan.after, build.declared)
        own = [part.span for part in parts if not part.scope.is_skill]
        spans += own
        plan = plan.because(_SKILLS_STAY if len(own) < len(parts) else "")
    told = _history(plan.after, kept, spans)
    return replace(
        plan, compute=_computes(spans), bytes_per_token=state.bytes_per_token
    ).because(told if spans or plan.steps else "")  # fmt: skip


def _recompiled(after: Context, spans: Sequence[Span], build: Build) -> list[Recompile]:
    """Steps for the skills in some slots that cannot be computed in place, as they read tokens that are not there."""
    found = []
    for group in after.groups:
        slots, skill = after.slots_of(group), after.units[group.start]
        if skill.read and any(span.start < slots.stop and slots.start < span.stop for span in spans):
            declared = declared_in(after, build.declared)
            positions = tuple(after.positions_in(slots))
            found.append(
                Recompile(slots, after.units[group.start : group.stop], declared, positions, after.begins[group.stop])
            )
    return found


def _computes(spans: list[Span]) -> tuple[Compute, ...]:
    return tuple(Compute(span, Origin.COMPUTED) for span in joined(spans))


def _history(after: Context, kept: Collection[int], spans: list[Span]) -> str:
    """What the plan says of turns that are kept although something before them changed."""
    first = min((span.start for span in spans), default=len(after))
    tokens = sum(len(after.units[index]) for index in kept if after.starts[index] >= first)
    return f"{tokens} tokens of earlier turns are kept as history" if tokens else ""
