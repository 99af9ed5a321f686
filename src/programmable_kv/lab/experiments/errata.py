"""What does an appended line do? Its wording on a stale cache, a way back, and an earlier answer that contradicts it.

Each edit is made as a user makes it, on a notebook whose question comes after the edit. `wording`: lines that say the same in
other words, beside the plain stale cache. `back`: the field is set to another value and back; `back_asked`: the same with the
question asked in between. `history`: the question was asked and answered under the old value first, so that the conversation
itself asserts the old conclusion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from programmable_kv.edits.modes import Mode
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.lab.experiments.summaries import share
from programmable_kv.notebook.decision import Decision
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.prompt.wording import DEFAULT_TEMPLATE, THINK_INSTRUCTION

WORDINGS = {
    "value_alone": "{name}: {value}",
    "sentence": "{name} is now {value}.",
    "note": "Note: the value of {name} has changed to {value}.",
    "default": DEFAULT_TEMPLATE,
    "overrides": "[STATE UPDATE] {name} is now: {value}. This overrides every earlier value.",
    "void": "[STATE UPDATE] {name} is now: {value}. What was concluded from the old value is void.",
}
BACK = (Mode.ERRATUM, Mode.FIELD_ERRATUM, Mode.READERS, Mode.IN_PLACE)
HISTORY = (Mode.IN_PLACE, Mode.ERRATUM, Mode.FIELD_ERRATUM, Mode.READERS, Mode.SUFFIX)
THOUGHT = (Mode.IN_PLACE, Mode.ERRATUM)
"""with a line of thought before the answer, each with and without the earlier answer"""


@dataclass(frozen=True, slots=True)
class Arms:
    """Which wordings, and which edits in each part."""

    wordings: Sequence[str] = tuple(WORDINGS)
    back: Sequence[Mode] = BACK
    thought: Sequence[Mode] = THOUGHT
    history: Sequence[Mode] = HISTORY


ALL = Arms()
FEW = Arms(("default",), (Mode.ERRATUM,), (), (Mode.ERRATUM,))


def measure(pair: Pair, _: Sequence[Row], arms: Arms = ALL) -> Row:
    """What is decided in each arm; right is the new value's action, and the old one's after a way back."""
    notebook = prefilled(pair, DEFAULT_TEMPLATE)
    row: Row = {"right": list(pair.actions), "wording": {}}
    for name in arms.wordings:
        template = WORDINGS[name]
        other = notebook if template == DEFAULT_TEMPLATE else prefilled(pair, template)
        row["wording"][name] = tried(other, partial(edited, pair, other, Mode.ERRATUM))
    row["wording"]["stale"] = tried(notebook, partial(edited, pair, notebook, Mode.STALE))
    row["full"] = tried(notebook, partial(edited, pair, notebook, Mode.FULL))
    for name, asked in (("back", False), ("back_asked", True)):
        row[name] = {str(m): tried(notebook, partial(back, pair, notebook, m, asked=asked)) for m in arms.back}
    row["thought"] = {
        str(mode): tried(notebook, partial(edited, pair, notebook, mode, think=True)) for mode in arms.thought
    }
    before = notebook.decide(pair.case.asked, _options(pair), keep=True).choice
    row["history"] = {"before": before}
    row["history"] |= {str(mode): tried(notebook, partial(edited, pair, notebook, mode)) for mode in arms.history}
    row["history"] |= {
        f"{mode}_thought": tried(notebook, partial(edited, pair, notebook, mode, think=True)) for mode in arms.thought
    }
    return row


def prefilled(pair: Pair, template: str) -> Notebook:
    """The policy with the old value, prefilled; `template` words its errata."""
    case = pair.case
    notebook = Notebook(pair.model, erratum_template=template)
    notebook.message("system", case.scenario.prompt, **case.values(pair.change[0])).prefill()
    return notebook


def _options(pair: Pair) -> list[str]:
    return list(pair.first_tokens)


def tried(notebook: Notebook, ask: Callable[[], Decision]) -> str:
    """The choice; the notebook is unchanged."""
    mark = notebook.mark()
    try:
        return ask().choice
    finally:
        notebook.rollback(mark)


def edited(pair: Pair, notebook: Notebook, mode: Mode, *, think: bool = False) -> Decision:
    """The decision after an edit to the new value."""
    asked = f"{pair.case.asked} {THINK_INSTRUCTION}" if think else pair.case.asked
    edits = {pair.case.gate.field: pair.change[1]}
    return notebook.decide(asked, _options(pair), edits=edits, mode=mode, think=think)


def back(pair: Pair, notebook: Notebook, mode: Mode, *, asked: bool = False) -> Decision:
    """The decision after the field was set to the new value and back to the old one.

    With `asked`, the question is asked and answered in between, so that the first erratum cannot be taken back.
    """
    field = pair.case.gate.field
    first = {field: pair.change[1]}
    if asked:
        notebook.decide(pair.case.asked, _options(pair), edits=first, mode=mode, keep=True)
    else:
        notebook.edit(first, mode=mode)
    return notebook.decide(pair.case.asked, _options(pair), edits={field: pair.change[0]}, mode=mode)


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """How often each arm is right (Wilson), of the policies that a full prefill decides correctly under both values."""
    right = [row for row in rows if row["full"] == row["right"][1] and row["history"]["before"] == row["right"][0]]
    summary: dict[str, Any] = {"full_right": share(rows, lambda row: bool(row["full"] == row["right"][1]))}
    for part in ("wording", "thought", "history"):
        names = [name for name in (right[0][part] if right else {}) if name != "before"]
        summary[part] = {name: share(right, partial(_is, part, name, 1)) for name in names}
    for part in ("back", "back_asked"):
        names = list(right[0][part]) if right else []
        summary[part] = {name: share(right, partial(_is, part, name, 0)) for name in names}
    return summary


def _is(part: str, name: str, which: int, row: Row) -> bool:
    return bool(row[part][name] == row["right"][which])


ERRATA = Experiment(
    name="errata",
    version=1,
    title="What an appended line does: its wording, a way back, and an earlier answer that contradicts it",
    measure=measure,
    summarise=summarise,
    scenarios=64,
    seconds=28.0,
    quick=partial(measure, arms=FEW),
)
