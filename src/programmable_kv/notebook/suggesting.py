"""`Notebook.suggest_readers`: the lines on which a model uses a field, found by movement in the cache and decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from programmable_kv.account import Account
from programmable_kv.design.visibility import Visibility
from programmable_kv.edits.modes import Mode
from programmable_kv.errors import InvalidArgumentError, InvalidEditError
from programmable_kv.notebook.decision import Decision
from programmable_kv.notebook.movement import movement
from programmable_kv.prompt.fields import Value
from programmable_kv.prompt.readers import later_lines, parse_turns
from programmable_kv.prompt.turns import turn_slots

if TYPE_CHECKING:
    from programmable_kv.notebook.notebook import Notebook

SHARE = 0.1
"""A line is suggested if it moves at least this share of the most moved line's movement; `docs/which-edit.md` has
what it finds."""
SMALLEST_GAP = 0.5
"""Smallest distance between the decisions by readers and by full prefill, in nats, of which lines can close a share."""


@dataclass(frozen=True, slots=True)
class SuggestedReader:
    """A line after the field, and how far its keys and values depend on the field's value."""

    text: str
    moved: float
    """how far its keys and values move when the value changes: the sum of `movement` over its tokens"""
    share: float
    """`moved` as a share of the most moved line's movement"""
    known: str = ""
    """why the line is already a reader; empty if it is not"""
    closes: float | None = None
    """the share of the distance to full prefill's decision that recomputing this line closes: 1 is all, 0 is none;
    None if this was not tried"""

    @property
    def words(self) -> str:
        """The words to pass to `Notebook.mentions` to make this line a reader."""
        return " ".join(self.text.split())

    @property
    def reason(self) -> str:
        """Why the line is listed, as text for people."""
        reason = f"moves {self.share:.0%} as far as the most moved line"
        if self.known:
            return f"{reason}; already a reader: {self.known}"
        return reason if self.closes is None else f"{reason}; alone it closes {self.closes:.0%} of the distance"


@dataclass(frozen=True, slots=True)
class Trial:
    """The choices of the decision that was tried: with the old value, and with the new one computed in several ways."""

    before: str
    """with the old value"""
    full: str
    """with the new value, by a full prefill"""
    readers: str
    """with the new value, the known readers recomputed"""
    suggested: str
    """with the new value, the known readers and the suggested lines recomputed"""


@dataclass(frozen=True, slots=True)
class Suggestions:
    """The result of `Notebook.suggest_readers`: the lines after a field, the most moved first, and what to declare."""

    name: str
    lines: tuple[SuggestedReader, ...]
    threshold: float
    trial: Trial | None
    account: Account
    unchanged: bool = False
    """whether the field already had the given value, so that nothing could move"""

    @property
    def missing(self) -> tuple[SuggestedReader, ...]:
        """Lines that move far enough to be suggested and are not yet readers."""
        return tuple(line for line in self.lines if line.share >= self.threshold and not line.known)

    @property
    def words(self) -> tuple[str, ...]:
        """The words to declare with `notebook.mentions(name, *suggestions.words)`; may be empty."""
        return tuple(dict.fromkeys(line.words for line in self.missing))

    def __str__(self) -> str:
        listed = [line for line in self.lines if line.share >= self.threshold]
        rows = [f"{'reads ' if line.known else 'MISSED'}  {line.words}  ({line.reason})" for line in listed]
        if (trial := self.trial) is not None:
            rows.append(
                f"with the old value: {trial.before}; full prefill of the new one: {trial.full}; readers: {trial.readers}; "
                f"with the suggested lines: {trial.suggested}"
            )
        if rows:
            return "\n".join(rows)
        return (
            f"{self.name} already has this value: give another one"
            if self.unchanged
            else f"no line after {self.name} moves"
        )


def suggest(
    notebook: Notebook, name: str, value: Value, prompt: str | None, options: Sequence[str], share: float, turns: str
) -> Suggestions:
    """Carry out `Notebook.suggest_readers`."""
    if notebook.visibility is Visibility.DESIGN:
        raise InvalidEditError(
            "under visibility='design' a line that is not declared has not read the field, so nothing moves and nothing can be "
            "found. Ask a notebook of the same messages with visibility='causal', and declare its words here."
        )
    wanted = parse_turns(turns)
    if not 0 < share <= 1:
        raise InvalidArgumentError(f"a share is above 0 and at most 1; got {share!r}")
    notebook.spans(name)
    meter = notebook.model.engine.meter
    notebook.model.engine.verify()
    with meter.measure() as reading:
        trying = notebook.fork()
        trying.rebase()
        trying.recompute()
        lines = _ranked(trying, name, value, turns)
        trial = None
        if options:
            lines, trial = _tried(_Asked(trying, name, value, prompt, options, str(wanted)), lines, share)
    account = notebook._unchanged(reading.account, "suggest_readers")
    notebook._recorded(account)
    return Suggestions(name, tuple(lines), share, trial, account, unchanged=not notebook._changed({name: value}))


def _ranked(notebook: Notebook, name: str, value: Value, turns: str) -> list[SuggestedReader]:
    state = notebook._ready()
    moved = movement(notebook, name, value)
    reasons = {reader.span: reader.reason for reader in notebook.readers(name, turns=turns)}
    slots = turn_slots(state.context, state.conversation, name)
    found = [
        (float(moved[span.start : span.stop].sum()), text, reasons.get(span, ""))
        for span, text in later_lines(state.context, name, parse_turns(turns), slots)
    ]
    most = max((moved for moved, _, _ in found), default=0.0)
    ordered = sorted(found, key=lambda line: -line[0])
    return [SuggestedReader(text, moved, moved / most if most else 0.0, known) for moved, text, known in ordered]


@dataclass(frozen=True, slots=True)
class _Asked:
    """One decision after one edit, on a notebook that may be changed."""

    notebook: Notebook
    name: str
    value: Value
    prompt: str | None
    options: Sequence[str]
    turns: str

    def decision(self, mode: Mode | None, words: Sequence[str] = ()) -> Decision:
        """The decision after the edit in a mode (None: no edit), with more words declared. Both are then undone."""
        notebook, declared = self.notebook, self.notebook._declared
        mark = notebook.mark()
        try:
            if words:
                notebook.mentions(self.name, *words)
            edits = None if mode is None else {self.name: self.value}
            return notebook.decide(self.prompt, self.options, edits=edits, mode=mode, turns=self.turns)
        finally:
            notebook._declared = declared
            notebook.rollback(mark)


def _tried(asked: _Asked, lines: list[SuggestedReader], share: float) -> tuple[list[SuggestedReader], Trial]:
    """The lines, each with the share of the distance that it closes alone, and the decisions that were tried."""
    before, full, readers = (asked.decision(mode) for mode in (None, Mode.SUFFIX, Mode.READERS))
    missing = [line for line in lines if line.share >= share and not line.known]
    if not missing:
        return lines, Trial(before.choice, full.choice, readers.choice, readers.choice)
    suggested = asked.decision(Mode.READERS, [line.words for line in missing])
    trial = Trial(before.choice, full.choice, readers.choice, suggested.choice)
    if before.choice == full.choice:
        return lines, trial  # the decision does not depend on the value
    now = readers.gap(full.choice, before.choice)
    distance = full.gap(full.choice, before.choice) - now
    if abs(distance) < SMALLEST_GAP:
        return lines, trial
    return [_closing(asked, line, trial, now, distance) if line in missing else line for line in lines], trial


def _closing(asked: _Asked, line: SuggestedReader, trial: Trial, now: float, distance: float) -> SuggestedReader:
    alone = asked.decision(Mode.READERS, [line.words]).gap(trial.full, trial.before)
    return SuggestedReader(line.text, line.moved, line.share, line.known, (alone - now) / distance)
