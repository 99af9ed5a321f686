"""Carrying out a plan on the buffer and the ledger together, in one transaction, with one account.

Only this module changes a cached context. If anything raises, buffer and ledger are unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from programmable_kv.account import Account
from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.layout import KVLayout
from programmable_kv.cache.masks import PartReads
from programmable_kv.cache.span import Span
from programmable_kv.design.build import AnyLedger, Build
from programmable_kv.design.parts import parts_of, reads_less, reads_of
from programmable_kv.edits.entries import computed, on_ledger, weakest_of
from programmable_kv.edits.plan import Compute, Exchange, Insert, Plan, Recompile, Select, Shift, Step, Truncate
from programmable_kv.engine import Engine, Progress, Rows
from programmable_kv.errors import ContextOverflowError, FrequencyRegimeError
from programmable_kv.ledger.ledger import Ledger
from programmable_kv.ledger.run import Origin
from programmable_kv.ledger.version import TOKEN_BYTES
from programmable_kv.prompt.context import Context
from programmable_kv.skills.draft import compile_units


@dataclass(frozen=True, slots=True)
class Applied:
    """The result of a plan that was carried out."""

    ledger: AnyLedger
    account: Account
    logits: torch.Tensor | None
    """[n, vocabulary] logits of the n last rows, as many as were asked for; None if no row was computed"""


def check(plan: Plan, engine: Engine, extra: int = 0) -> KVLayout | None:
    """Check that this model can carry out a plan and compute `extra` tokens after it.

    Returns the layout to relocate with; None if the plan relocates nothing.

    Raises:
        ContextOverflowError: the context would need more positions than the model has.
        UnverifiedError: the plan relocates tokens or computes some in the middle, which is not proved exact on this
            model.
    """
    needed = plan.after.begins[-1] + extra
    limit = engine.layout.position_limit
    if limit is not None and needed > limit:
        raise ContextOverflowError(
            f"after this {plan.operation} the context needs {needed} positions, and {engine.layout.model_type} has {limit}. "
            "Call .rebase() to fold errata back into the text, cut parts that are no longer needed, or write less."
        )
    layout = engine.require_relocation(below=max(plan.reach, needed)) if plan.relocates else None
    if plan.computes_in_the_middle:
        if any(isinstance(step, Insert) for step in plan.steps):
            engine.require_rows(instead="Splice with SeamRepair(0), which recomputes nothing.")
        else:
            engine.require_rows()
    return layout


def apply(
    plan: Plan,
    engine: Engine,
    buffer: KVBuffer,
    ledger: AnyLedger,
    *,
    followed_by: Sequence[int] = (),
    logits: int = 0,
    progress: Progress | None = None,
) -> Applied:
    """Carry out a plan, and compute the tokens `followed_by` after it in the same forward.

    Args:
        followed_by: token ids that go into the buffer but not into the ledger. The caller keeps or removes them.
        logits: how many of the last rows to return logits of.
        progress: called with (rows done, rows in all) after each forward of many rows.

    Raises:
        ContextOverflowError, UnverifiedError: as in `check`.
        NonFiniteLogitsError: as in `Engine.compute`.
        FrequencyRegimeError: as in `Engine.compute`; or the context became so short that a prefill of it would use
            other rotary frequencies.
    """
    with engine.meter.measure() as reading:
        layout = check(plan, engine, len(followed_by))
        mark = buffer.mark()
        try:
            ledger, touched, output = _carried_out(plan, engine, buffer, ledger, layout, followed_by, logits, progress)
            _require_fitting_frequencies(plan, engine, buffer)
            # This comes before the mark is released, so that an interrupt in it undoes the plan as well.
            reused = len(plan.after) - _covered(touched)
            state = weakest_of(ledger, plan.after)
        except BaseException:
            buffer.rollback(mark)
            raise
        buffer.release(mark)
    account = reading.account.of(
        operation=plan.operation,
        tokens_reused=reused,
        mode_asked=plan.asked,
        mode_used=plan.used,
        why=plan.why,
        exactness=state,
    )
    return Applied(ledger, account, output)


def _require_fitting_frequencies(plan: Plan, engine: Engine, buffer: KVBuffer) -> None:
    """
    Raises:
        FrequencyRegimeError: the context became so short that a prefill of it would use other rotary frequencies.
    """
    if not buffer.fits_its_length:
        raise FrequencyRegimeError(
            f"after this {plan.operation} the context has {buffer.length} positions, and for that length "
            f"{engine.layout.model_type} uses other rotary frequencies than the cached ones. Edit with mode='full', which "
            "recomputes everything, or prefill a new notebook."
        )


def _carried_out(
    plan: Plan,
    engine: Engine,
    buffer: KVBuffer,
    ledger: AnyLedger,
    layout: KVLayout | None,
    followed_by: Sequence[int],
    logits: int,
    progress: Progress | None,
) -> tuple[AnyLedger, list[Span], torch.Tensor | None]:
    chosen: dict[int, Origin] = {}
    touched: list[Span] = []
    for step in plan.steps:
        if isinstance(step, Select):
            assert isinstance(ledger, Ledger), "nothing is selected by attention under visibility='design'"
            reader = (
                Rows.appended(followed_by, buffer.length, buffer.next_position)
                if followed_by
                else _last_row(buffer, ledger)
            )
            chosen |= dict.fromkeys(step.selection.choose(engine, buffer, reader), step.origin)
            continue
        _on_buffer(step, engine, buffer, layout)
        ledger = on_ledger(step, ledger)
        chosen = {moved: origin for slot, origin in chosen.items() if (moved := _moved(step, slot)) is not None}
        touched = _touched(step, touched, len(ledger))
    for one in plan.compute:  # drop chosen slots that are computed anyway
        chosen = {slot: origin for slot, origin in chosen.items() if slot not in one.span.range}
    computes = sorted([*plan.compute, *_as_computes(chosen)], key=lambda one: one.span.start)
    rows = _rows(plan.after, computes, followed_by)
    output = None
    if len(rows):
        reads = _reads(ledger, plan.after, computes, len(followed_by))
        output = engine.compute(buffer, rows, logits=min(logits, len(rows)), progress=progress, reads=reads)
    ledger = computed(ledger, plan.after, computes)
    assert buffer.next_position == plan.after.begins[-1] + len(followed_by), "every token stands where the text has it"
    return ledger, touched + [one.span for one in computes], output


def _reads(ledger: AnyLedger, after: Context, computes: Sequence[Compute], followed_by: int) -> PartReads | None:
    """What the rows of a plan and `followed_by` rows after the end may read; None if that is everything before them."""
    if not isinstance(ledger, Build):
        return _without_unread(computes, len(after) + followed_by)
    parts = parts_of(after, ledger.declared)
    touched = (
        part
        for part in parts
        if any(one.span.start < part.span.stop and part.span.start < one.span.stop for one in computes)
    )
    return reads_of(parts, len(after), followed_by) if reads_less(touched) else None


def _without_unread(computes: Sequence[Compute], slots: int) -> PartReads | None:
    """Every row reads what is before it, except the slots that its `Compute` leaves out; None if none leaves any out."""
    partial = [one for one in computes if one.unread]
    if not partial:
        return None
    part_of = torch.zeros(slots, dtype=torch.long)
    for one in partial:
        assert one.unread == partial[0].unread, "the lines of one edit leave out the same slots"
        part_of[one.span.start : one.span.stop] = 1
    for span in partial[0].unread:
        part_of[span.start : span.stop] = 2
    reads = torch.ones(3, 3, dtype=torch.bool)
    reads[1, 2] = False
    return PartReads(part_of, reads)


def _on_buffer(step: Step, engine: Engine, buffer: KVBuffer, layout: KVLayout | None) -> None:
    if isinstance(step, Truncate):
        buffer.truncate(step.length)
    elif isinstance(step, Shift) and step.start == buffer.length:
        buffer.truncate(min(step.to, buffer.length))
    else:
        assert layout is not None, "a plan that relocates was checked with a layout"
        if isinstance(step, Shift):
            shift = step.to - step.start if step.by is None else step.by
            buffer.relocate(step.start, buffer.length, step.to, shift, layout)
        elif isinstance(step, Insert):
            buffer.insert(
                step.at,
                step.skill.segment,
                layout,
                replacing=step.replacing,
                positions=step.positions,
                ends=step.ends,
            )
        elif isinstance(step, Recompile):
            buffer.insert(
                step.span.start,
                compile_units(engine, step.units, step.declared),
                layout,
                replacing=min(len(step.span), buffer.length - step.span.start),  # a skill at the end may have grown
                positions=step.positions,
                ends=step.ends,
            )
        elif isinstance(step, Exchange):
            buffer.exchange(step.start, step.middle, step.stop, layout, step.positions)


def _moved(step: Step, slot: int) -> int | None:
    """The slot to which a step moves a slot; None if the step drops it."""
    match step:
        case Truncate(length):
            return slot if slot < length else None
        case Shift(start, to, _):
            if slot >= start:
                return slot + to - start
            return slot if slot < to else None
        case Insert(at, skill, replacing):
            if slot >= at + replacing:
                return slot + len(skill) - replacing
            return slot if slot < at else None
        case Exchange(start, middle, stop, _):
            if start <= slot < middle:
                return slot + stop - middle
            return slot - (middle - start) if middle <= slot < stop else slot
        case Recompile() | Select():
            return slot


def _touched(step: Step, touched: list[Span], length: int) -> list[Span]:
    """The slots that were relocated up to and including a step, counted after it."""
    shifted = []
    for span in touched:
        start, stop = _moved(step, span.start), _moved(step, span.stop - 1)
        if start is not None and stop is not None and start <= stop:
            shifted.append(Span(start, stop + 1))
    match step:
        case Shift(_, to, _):
            shifted.append(Span(min(to, length), length))
        case Insert(at, skill, replacing):
            shifted.append(Span(at, length if len(skill) != replacing else at + len(skill)))
        case Exchange(start, _, stop, _):
            shifted.append(Span(start, stop))
        case Recompile(span):
            shifted.append(span)
        case Truncate() | Select():
            pass
    return shifted


def _covered(spans: Iterable[Span]) -> int:
    """How many slots the spans cover together."""
    covered = end = 0
    for span in sorted(spans):
        covered += max(0, span.stop - max(span.start, end))
        end = max(end, span.stop)
    return covered


def _as_computes(chosen: dict[int, Origin]) -> list[Compute]:
    """The chosen slots as spans, each of one origin."""
    found: list[Compute] = []
    for slot, origin in sorted(chosen.items()):
        if found and found[-1].span.stop == slot and found[-1].origin == origin:
            found[-1] = Compute(Span(found[-1].span.start, slot + 1), origin)
        else:
            found.append(Compute(Span(slot, slot + 1), origin))
    return found


def _rows(after: Context, computes: Iterable[Compute], followed_by: Sequence[int]) -> Rows:
    """The rows of the slots to compute, and of the tokens after the end."""
    ids: list[int] = []
    slots: list[int] = []
    positions: list[int] = []
    for one in computes:
        ids += after.ids_in(one.span)
        slots += one.span.range
        positions += after.positions_in(one.span)
    ids += followed_by
    slots += range(len(after), len(after) + len(followed_by))
    positions += range(after.begins[-1], after.begins[-1] + len(followed_by))
    return Rows(tuple(ids), tuple(slots), tuple(positions))


def _last_row(buffer: KVBuffer, ledger: Ledger) -> Rows:
    last = buffer.length - 1
    token = int.from_bytes(ledger.runs[-1].tokens[-TOKEN_BYTES:], "little")
    return Rows((token,), (last,), (last,))
