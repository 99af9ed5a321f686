"""Planning an edit that gives fields new values, in one of the modes of `modes.py`. Uses no tensors and no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from programmable_kv.cache.span import Span
from programmable_kv.edits.entries import computed, on_ledger
from programmable_kv.edits.modes import DECLARED_MODE, DEFAULT_MODE, STRATEGIES, Mode, mode_of
from programmable_kv.edits.plan import Compute, Plan, Select, Shift, Step, Truncate
from programmable_kv.edits.ranking import Ranking
from programmable_kv.edits.selection import HighestRanked
from programmable_kv.errors import InvalidEditError
from programmable_kv.ledger.ledger import Ledger
from programmable_kv.ledger.run import Origin
from programmable_kv.prompt.context import Context
from programmable_kv.prompt.fields import FieldKind
from programmable_kv.prompt.lines import changed_subjects
from programmable_kv.prompt.readers import Reader, Turns, Why, joined, readers_of
from programmable_kv.prompt.turns import turn_slots
from programmable_kv.prompt.units import Unit
from programmable_kv.states import TokenState


def _by_name(context: Context, name: str, words: Sequence[str]) -> Sequence[Reader]:
    return readers_of(context, name, words, Turns.OPEN, turn_slots(context, None, name))


_SHOWN_CHARACTERS = 80
"""how much of a value is shown in a reason"""


@dataclass(frozen=True, slots=True)
class EditTools:
    """What planning an edit needs besides the context: a tokenizer, the wording, and what this model allows."""

    tokenizer: Any
    write_erratum: Callable[[Context, str, str, str | None], Unit]
    """(context, field, value, the value that all readers know or None) -> the erratum to append, as a unit"""
    can_relocate: Callable[[], bool]
    ranking: Ranking
    k: int = 32
    bytes_per_token: int = 0
    readers: Callable[[Context, str, Sequence[str]], Sequence[Reader]] = _by_name
    """(context, field, further words that its readers mention) -> its readers"""
    declared: Collection[str] = ()
    """the fields whose readers were declared"""
    can_hide: Callable[[], bool] = lambda: True
    """() -> whether an erratum can leave out the field that already has its value: a model with its own masks cannot"""


def plan_edit(
    context: Context, ledger: Ledger, changes: Mapping[str, str], mode: Mode | None, tools: EditTools
) -> Plan:
    """Plan an edit. The caller has checked the names and values.

    When `mode` is None, the mode is `readers` if the readers of all these fields are declared, otherwise
    `field_erratum`. If `suffix` computes no more tokens than that, it is used instead, because it is exact.

    Raises:
        InvalidEditError: the mode is `selective` and k is below 1.
    """
    if mode is not None:
        return _planned(context, ledger, changes, mode, tools)
    default = DECLARED_MODE if changes and all(name in tools.declared for name in changes) else DEFAULT_MODE
    plan = replace(_planned(context, ledger, changes, default, tools), asked=None)
    if not plan.tokens_computed:
        return plan
    suffix = replace(_planned(context, ledger, changes, Mode.SUFFIX, tools), asked=None)
    if suffix.tokens_computed > plan.tokens_computed:
        return plan
    why = f"recomputing all later tokens takes {suffix.tokens_computed} tokens ({default}: {plan.tokens_computed})"
    return suffix.because(f"{why} and leaves no token that has read another value")


def _planned(context: Context, ledger: Ledger, changes: Mapping[str, str], mode: Mode, tools: EditTools) -> Plan:
    strategy = STRATEGIES[mode]
    if strategy.recomputes:
        names = {**context.values, **changes} if strategy.from_start else dict(changes)
        return plan_rewrite(context, ledger, names, mode, tools, from_start=strategy.from_start)
    draft = _Draft(context, ledger, context.with_values(changes), tools)
    if mode is Mode.STALE:
        return draft.plan(mode, mode)
    if strategy.selects:
        draft.select(changes)
    said = _said_last(context, changes) if strategy.states else set()
    draft.take_back({name: value for name, value in changes.items() if name not in said})
    if strategy.writes:
        draft.write(changes, rereads=strategy.rereads)
    stated = draft.state(changes, wanted=strategy.states, said=said)
    keeps_its_name = strategy.selects or draft.rereads
    return draft.plan(mode, mode if keeps_its_name else mode_of(writes=strategy.writes, states=stated))


class _Draft:
    """A plan under construction: the steps so far, and the context and ledger after them."""

    def __init__(self, context: Context, ledger: Ledger, after: Context, tools: EditTools) -> None:
        self.before, self.after, self.ledger, self.tools = context, after, ledger, tools
        self.read = ledger
        """the ledger before the edit"""
        self.steps: list[Step] = []
        self.compute: list[Compute] = []
        self.reasons: list[str] = []
        self.rereads = False
        """whether readers are recomputed"""

    def step(self, step: Step) -> None:
        self.steps.append(step)
        self.ledger = on_ledger(step, self.ledger)

    def select(self, changes: Mapping[str, str]) -> None:
        """Select the k tokens that matter most among those after the first field and outside the fields' places."""
        if self.tools.k < 1:
            raise InvalidEditError(
                f"selective needs k >= 1, got {self.tools.k}; for the field alone use mode='in_place'"
            )
        own = sorted(span for name in changes for span in self.before.spans(name))
        among: list[Span] = []
        cursor = min((span.start for span in own), default=len(self.before))
        end = len(self.before)
        for span in [*own, Span(end, end)]:
            if span.start > cursor:
                among.append(Span(cursor, span.start))
            cursor = max(cursor, span.stop)
        self.steps.append(Select(HighestRanked(self.tools.ranking, self.tools.k, tuple(among)), Origin.REFRESHED))

    def take_back(self, changes: Mapping[str, str]) -> None:
        """Cut the errata about these fields: those at the end always, others only if keys can be relocated."""
        units = list(self.after.units)
        taken = 0
        while units and _corrects_only(units[-1], changes):
            units.pop()
            taken += 1
        if taken:
            self.after = self.after.with_units(units)
            self.step(Truncate(len(self.after)))
        inside = [index for index in self.after.errata if _corrects_only(self.after.units[index], changes)]
        if inside and self.tools.can_relocate():
            for index in reversed(inside):
                start, stop = self.after.starts[index], self.after.starts[index + 1]
                self.after = self.after.with_units(self.after.units[:index] + self.after.units[index + 1 :])
                self.step(Shift(stop, start))
            taken += len(inside)
        if taken:
            self.reasons.append(
                "an earlier erratum was removed" if taken == 1 else f"{taken} earlier errata were removed"
            )

    def write(self, changes: Mapping[str, str], *, rereads: bool) -> None:
        """Write the values into the fields' places, relocate what follows if token lengths change, and compute them.

        `rereads`: recompute the fields' readers as well.
        """
        rewritten = {name: value for name, value in changes.items() if self.after.fields[name].written != value}
        length = len(self.after)
        self.after, replacements = self.after.write(self.tools.tokenizer, rewritten)
        tail = 0
        for replacement in reversed(replacements):
            if not replacement.growth:
                continue
            target = replacement.old.start + len(replacement.new)
            if replacement.old.stop == length:  # nothing follows it, or what followed was already truncated
                self.step(Truncate(replacement.old.start))
                length = replacement.old.start
            else:
                self.step(Shift(replacement.old.stop, target))
                tail = length - replacement.old.stop
        if tail:
            self.reasons.append(f"the value's token length changed: {tail} later tokens were relocated")
        spans = [replacement.new for replacement in replacements]
        if not rereads:
            self._computed(Compute(span, Origin.REFRESHED) for span in spans)
            return
        readers = {
            name: self.tools.readers(self.after, name, self._subjects(name, value)) for name, value in changes.items()
        }
        self.rereads = any(readers.values())
        spans = joined([*spans, *(reader.span for found in readers.values() for reader in found)])
        self._computed(Compute(span, Origin.REFRESHED) for span in spans)
        self.reasons += [_told(name, found) for name, found in readers.items()]
        if left := self._unread(spans, changes):
            self.reasons.append(f"{left} later tokens are still stale")

    def _subjects(self, name: str, value: str) -> tuple[str, ...]:
        """What the changed lines of a block are about: the lines that decide mention that, and not the block."""
        field = self.before.fields[name]
        if field.type.kind is not FieldKind.BLOCK:
            return ()
        return tuple(dict.fromkeys(it for old in (field.written, field.current) for it in changed_subjects(old, value)))

    def _unread(self, spans: Sequence[Span], names: Iterable[str]) -> int:
        """How many tokens after the fields are stale and not in these slots."""
        first = min(self.after.first_place(name) for name in names)
        stale = [
            stretch.span
            for stretch in self.ledger.stretches(self.after.values, self.after.first_places)
            if stretch.state is TokenState.STALE
        ]
        return sum(len(span) for span in stale) - _common(stale, joined([Span(0, first), *spans]))

    def state(self, changes: Mapping[str, str], *, wanted: bool, said: Collection[str] = ()) -> bool:
        """Append an erratum for each value that later tokens have not read. Returns whether any was appended.

        This happens if `wanted`, or if an earlier erratum about the field could not be cut out. An erratum does not read
        the places that already have its value, if the text behind them noted another one: a line that finds its own
        value there corrects less (results/line-reads.json). If that text noted this value (it is back after other ones),
        the line reads the places and agrees with the notes.

        `said`: the fields whose last erratum already states the value.
        """
        stated, unread = False, self._unread_by_lines(changes)
        for name, value in changes.items():
            if name in said:
                self.reasons.append(f"no new erratum: the last one about {name} states this value")
                continue
            in_the_way = bool(self.after.corrections(name))
            if (wanted and not self._known(name, value)) or in_the_way:
                start = len(self.after)
                self.after = self.after.appended(
                    self.tools.write_erratum(self.after, name, value, self._read_by_all(name))
                )
                self._computed([Compute(Span(start, len(self.after)), Origin.COMPUTED, unread)])
                stated = True
                if not wanted:
                    self.reasons.append(
                        f"an earlier erratum about {name} cannot be cut out here, so a new one was needed"
                    )
            elif wanted:
                self.reasons.append(f"no erratum: all later tokens were computed with {name} = {_short(value)}")
        return stated

    def _unread_by_lines(self, changes: Mapping[str, str]) -> tuple[Span, ...]:
        """The places of the edited fields whose new value stands there while the text behind them noted another: no line
        of this edit reads them, if they can be hidden.
        """
        written = [
            name
            for name, value in changes.items()
            if self.after.fields[name].written == value
            and value not in self.ledger.noted_behind(self.after.first_place(name), name)
        ]
        if not written or not self.tools.can_hide():
            return ()
        return tuple(sorted(span for name in written for span in self.after.spans(name)))

    def _known(self, name: str, value: str) -> bool:
        """Whether the field's places have this value, and all tokens after them have read it and no other value."""
        return (
            self.after.fields[name].written == value
            and self.ledger.has_read_only(name, value, self.after.first_place(name))
            and not self.ledger.reads_preface
        )

    def _read_by_all(self, name: str) -> str | None:
        """The only value of the field that everything after it had read before this edit; None if there is none."""
        written = self.before.fields[name].written
        place = self.before.first_place(name)
        only = not self.read.reads_preface and self.read.has_read_only(name, written, place)
        return written if only and place < len(self.before) else None

    def _computed(self, computes: Iterable[Compute]) -> None:
        added = [one for one in computes if len(one.span)]  # a value may be empty now
        self.compute += added
        self.ledger = computed(self.ledger, self.after, added)

    def plan(self, asked: Mode, used: Mode) -> Plan:
        return Plan(
            "edit", len(self.before), self.after, tuple(self.steps), _joined(self.compute), asked, used,
            "; ".join(self.reasons), self.tools.bytes_per_token,
        )  # fmt: skip


def plan_rewrite(
    context: Context,
    ledger: Ledger,
    values: Mapping[str, str],
    mode: Mode | None,
    tools: EditTools,
    *,
    from_start: bool = False,
    operation: str = "edit",
) -> Plan:
    """Plan to write values, drop the errata about these fields, and compute everything from the first inexact token."""
    after = context.with_values(values)
    kept: list[Unit] = []
    touched = [0] if from_start else []
    for begins, unit in zip(context.starts, context.units, strict=False):
        if any(name in values for name, _ in unit.corrects):
            touched.append(begins)
        else:
            kept.append(unit)
    after = after.with_units(kept)
    rewritten = {name: value for name, value in values.items() if after.fields[name].written != value}
    after, replacements = after.write(tools.tokenizer, rewritten)
    touched += [replacement.new.start for replacement in replacements]
    # Later tokens may have read another value even if the text already has this one.
    touched += [ledger.first_inexact(context.first_place(name)) for name in values]
    start = min([*touched, len(after)])
    return Plan(
        operation, len(context), after, _truncation(context, start), _tail(start, len(after)), mode, mode,
        bytes_per_token=tools.bytes_per_token,
    )  # fmt: skip


def plan_recompute(context: Context, ledger: Ledger, start: int | None, bytes_per_token: int = 0) -> Plan:
    """Plan to recompute everything from a slot on; from the first inexact token when `start` is None."""
    start = ledger.first_inexact(0) if start is None else start
    start = min(start, len(context))
    return Plan(
        "recompute", len(context), context, _truncation(context, start), _tail(start, len(context)),
        bytes_per_token=bytes_per_token,
    )  # fmt: skip


def plan_rebase(context: Context, ledger: Ledger, tools: EditTools, limit: int | None) -> Plan:
    """Plan to fold errata back: write their values into the fields' places, drop the errata, and recompute from there.

    `limit`: the most tokens to compute. As many fields are folded back as this allows, starting with the last one.
    """
    told = {name for index in context.errata for name, _ in context.units[index].corrects}
    told |= {name for name, value in context.fields.items() if value.written != value.current}
    told &= context.fields.keys()
    plan = Plan(
        "rebase", len(context), context, why="there is no erratum to fold back", bytes_per_token=tools.bytes_per_token
    )
    values: dict[str, str] = {}
    folded: set[str] = set()
    for name in sorted(told, key=lambda name: -context.first_place(name)):
        values[name] = context.fields[name].current
        larger = plan_rewrite(context, ledger, values, None, tools, operation="rebase")
        if limit is None or larger.tokens_computed <= limit:
            plan, folded = larger, set(values)
    if left := told - folded:
        plan = replace(plan, why=f"folding back {', '.join(sorted(left))} too would compute more than {limit} tokens")
    return plan


def _short(value: str) -> str:
    line = " ".join(value.split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"


def _common(some: Iterable[Span], others: Sequence[Span]) -> int:
    """How many slots are in both. The spans of each argument do not overlap."""
    return sum(max(0, min(a.stop, b.stop) - max(a.start, b.start)) for a in some for b in others)


def _told(name: str, readers: Sequence[Reader]) -> str:
    """Which text is recomputed with a field, in a few words."""
    counts = Counter(reader.reason for reader in readers if reader.why in (Why.HOLDS, Why.MENTIONS))
    told = [f"{count} line{'s' * (count > 1)} ({reason})" for reason, count in counts.items()]
    told += [reader.reason for reader in readers if reader.reason not in counts]
    reasons = [] if any(reader.why is Why.MENTIONS for reader in readers) else [f"no later line mentions {name}"]
    reasons.append(f"recomputed with {name}: {', '.join(told)}" if told else "only its own tokens are recomputed")
    return "; ".join(reasons)


def _said_last(context: Context, changes: Mapping[str, str]) -> set[str]:
    """The fields whose current value is the given one, and whose last erratum states it."""
    last = {name: value for index in context.errata for name, value in context.units[index].corrects}
    return {name for name, value in changes.items() if last.get(name) == value == context.fields[name].current}


def _corrects_only(unit: Unit, changes: Mapping[str, str]) -> bool:
    return bool(unit.corrects) and all(name in changes for name, _ in unit.corrects)


def _joined(computes: Sequence[Compute]) -> tuple[Compute, ...]:
    """In ascending order, with adjacent appended spans joined into one."""
    found: list[Compute] = []
    for one in sorted(computes, key=lambda one: one.span.start):
        before = found[-1] if found else None
        adjacent = before is not None and before.span.stop == one.span.start and before.unread == one.unread
        if before is not None and adjacent and before.origin == one.origin == Origin.COMPUTED:
            found[-1] = replace(before, span=Span(before.span.start, one.span.stop))
        else:
            found.append(one)
    return tuple(found)


def _truncation(context: Context, start: int) -> tuple[Step, ...]:
    return (Truncate(start),) if start < len(context) else ()


def _tail(start: int, end: int) -> tuple[Compute, ...]:
    return (Compute(Span(start, end), Origin.COMPUTED),) if start < end else ()
