"""Planning a composition: splicing in skills, cutting, moving and replacing parts, and appending turns.

What follows a change is relocated, so that its positions stay right. It keeps what it concluded before the change, and
the ledger records that. Turns appended later are computed on the changed context.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from programmable_kv.cache.span import Span
from programmable_kv.design.visibility import Visibility
from programmable_kv.edits.entries import exact_at
from programmable_kv.edits.plan import Compute, Exchange, Insert, Plan, Select, Shift, Step, Truncate
from programmable_kv.edits.seam import SeamRepair
from programmable_kv.errors import InvalidEditError
from programmable_kv.ledger.ledger import Ledger
from programmable_kv.ledger.run import Origin
from programmable_kv.prompt.context import Context, FieldValue
from programmable_kv.prompt.fields import TEXT
from programmable_kv.prompt.units import Unit
from programmable_kv.skills.skill import Skill


def plan_append(context: Context, *units: Unit, bytes_per_token: int = 0, operation: str = "add") -> Plan:
    """Plan to append units and compute them."""
    after = context.appended(*units)
    span = Span(len(context), len(after))
    compute = (Compute(span, Origin.COMPUTED),) if len(span) else ()
    return Plan(operation, len(context), after, (), compute, bytes_per_token=bytes_per_token)


def plan_splice(
    context: Context,
    ledger: Ledger | None,
    skill: Skill,
    where: Span,
    repair: SeamRepair,
    bytes_per_token: int = 0,
    *,
    operation: str = "splice",
) -> Plan:
    """Plan to put a skill in the place of the slots `where`, which may be empty.

    A field of the context may have no place yet: during a prefill its text is appended later.

    Raises:
        InvalidEditError: the text cannot be split at an end of `where`; a field of the skill has another value here, or
            its place still has an older one; or the skill was compiled with visibility="design" and this context is
            causal.
        UnknownPartError: the context has no such slots.
    """
    _check_written(context, skill)
    if ledger is not None and skill.visibility is Visibility.DESIGN:
        raise InvalidEditError(
            f"skill {skill.name!r} was compiled with visibility='design', so most of its lines have not read its fields, and "
            "this notebook reads causally. Compile it without that, or use Notebook(model, visibility='design')."
        )
    at, (split, first) = where.start, context.split_at(where.start)
    split, last = split.split_at(where.stop, ends=True) if len(where) else (split, first)
    kept = split.with_units((*split.units[:first], *split.units[last:]))
    if len(where):
        kept = kept.without_lost_fields()
    fields = joined_values(kept.values, skill)
    written = {
        name: kept.fields.get(name, FieldValue(value, value, skill.types.get(name, TEXT)))
        for name, value in fields.items()
    }
    for name in kept.fields.keys() & skill.values.keys():
        kind = written[name].type.joined(name, fields[name], skill.types.get(name, TEXT))
        written[name] = replace(written[name], type=kind)
    after = Context((*kept.units[:first], *skill.placed, *kept.units[first:]), written)
    steps: list[Step] = [Insert(at, skill, len(where))]
    compute: tuple[Compute, ...] = ()
    span = Span(at, at + len(skill))
    if repair.computes and not (ledger is not None and exact_at(skill, ledger, at)):
        seam = repair.first(span)
        compute = (Compute(seam, Origin.REPAIRED),) if len(seam) else ()
        selection = repair.selection(span, skill.unit.ids)
        if selection is not None:
            steps.append(Select(selection, Origin.REPAIRED))
    following = len(after) - span.stop
    why = f"{following} later tokens were relocated and have not read {skill.name}" if following else ""
    return Plan(operation, len(context), after, tuple(steps), compute, why=why, bytes_per_token=bytes_per_token)


def plan_cut(context: Context, span: Span, bytes_per_token: int = 0) -> Plan:
    """Plan to remove some slots.

    Raises:
        InvalidEditError: the text cannot be split at an end of the span.
    """
    split, first = context.split_at(span.start)
    split, last = split.split_at(span.stop, ends=True)
    after = split.with_units((*split.units[:first], *split.units[last:])).without_lost_fields()
    step: Step = Shift(span.stop, span.start) if span.stop < len(context) else Truncate(span.start)
    moved = len(context) - span.stop
    why = f"{moved} later tokens were relocated and not recomputed" if moved else ""
    return Plan("cut", len(context), after, (step,), why=why, bytes_per_token=bytes_per_token)


def plan_move(context: Context, span: Span, to: int, bytes_per_token: int = 0) -> Plan:
    """Plan to move some slots before slot `to`. Only these slots and those that they pass are touched.

    Raises:
        InvalidEditError: `to` lies inside the span, or the text cannot be split at `to` or at an end of the span.
    """
    if span.start < to < span.stop:
        raise InvalidEditError(f"cannot move slots [{span.start}, {span.stop}) into themselves, to slot {to}")
    start, middle, stop = (to, span.start, span.stop) if to <= span.start else (span.start, span.stop, to)
    if to in (span.start, span.stop):
        return Plan("move", len(context), context, bytes_per_token=bytes_per_token)
    split = context
    for boundary in (start, middle, stop):
        split, _ = split.split_at(boundary)
    forward = start == span.start
    first, second, end = (
        split.split_at(boundary, ends=ends)[1] for boundary, ends in ((start, False), (middle, forward), (stop, True))
    )
    units = split.units
    after = split.with_units((*units[:first], *units[second:end], *units[first:second], *units[end:]))
    later = len(context) - start
    why = f"{stop - start} tokens were relocated; {later} tokens were not recomputed"
    return Plan("move", len(context), after, (Exchange(start, middle, stop),), why=why, bytes_per_token=bytes_per_token)


def joined_values(values: Mapping[str, str], skill: Skill) -> dict[str, str]:
    """The values of the context's fields and of the skill's fields, together.

    Raises:
        InvalidEditError: a field of the skill has another value in the context.
    """
    for name, value in skill.values.items():
        if values.get(name, value) != value:
            raise InvalidEditError(
                f"skill {skill.name!r} was compiled with {name} = {value!r}, and the context has {values[name]!r}. Compile "
                "it with that value, or splice it before the edit."
            )
    return {**values, **skill.values}


def _check_written(context: Context, skill: Skill) -> None:
    """
    Raises:
        InvalidEditError: the place of a field of the skill still has an older value than the current one.
    """
    for name in skill.values:
        state = context.fields.get(name)
        if state is not None and state.written != state.current:
            raise InvalidEditError(
                f"{name} is {state.current!r}, but the text still says {state.written!r}, so a skill with this field cannot be "
                "spliced in. First edit the field in a mode that writes it (in_place, field_erratum, suffix)."
            )
