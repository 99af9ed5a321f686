"""What does an appended line do? Its wording on a stale cache, a way back, and an earlier answer that contradicts it.

Each edit is made as a user makes it, on a notebook whose question comes after the edit. `wording`: lines that say the
same in other words, and the plain stale cache. `back`: the field is set to another value and back; `back_asked`: the
same, with the question asked in between. `history`: the question was first asked and answered under the old value, so
that the conversation itself asserts the old conclusion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from programmable_kv.edits.modes import Mode
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.named_pair import known_of
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.lab.experiments.summaries import share
from programmable_kv.lab.published import as_published
from programmable_kv.lab.tools.naming import naming, settled, tried
from programmable_kv.models.load import Model
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
THINKING = (Mode.IN_PLACE, Mode.ERRATUM)
"""Modes with a line of thought before the answer, each with and without the earlier answer."""
THOUGHT = "{name} is {value}, so"
"""The likeliest thought. It is a guess, checked in one forward."""


@dataclass(frozen=True, slots=True)
class Arms:
    """The wordings, and the edits in each part."""

    wordings: Sequence[str] = tuple(WORDINGS)
    back: Sequence[Mode] = BACK
    thought: Sequence[Mode] = THINKING
    history: Sequence[Mode] = HISTORY


ALL = Arms()
FEW = Arms(("default",), (Mode.ERRATUM,), (), (Mode.ERRATUM,))


def measure(pair: Pair, _: Sequence[Row], arms: Arms = ALL) -> Row:
    """The decision in each arm. Right is the new value's action, or the old one's after a way back.

    All operations are the notebook's own, but their rows are computed together (`naming`).
    """
    shared = known_of(pair)
    model, engine = naming(pair.model, shared)
    notebook = prefilled(model, pair, DEFAULT_TEMPLATE)
    thought = pair.model.tokenizer.encode(
        THOUGHT.format(name=pair.case.gate.field, value=pair.change[1]), add_special_tokens=False
    )
    engine.follows[pair.token] = thought[0]
    notebook._thoughts = [thought]
    worded = {name: prefilled(model, pair, WORDINGS[name]) for name in arms.wordings}
    asks: dict[str, Callable[[], str]] = {
        f"wording.{name}": _edited(pair, other, Mode.ERRATUM) for name, other in worded.items()
    }
    asks |= {"wording.stale": _edited(pair, notebook, Mode.STALE), "full": _edited(pair, notebook, Mode.FULL)}
    asks |= {f"back.{mode}": partial(chosen, notebook, partial(back, pair, notebook, mode)) for mode in arms.back}
    asks |= {f"first.{mode}": _edited(pair, notebook, mode) for mode in arms.back}
    asks |= {f"thought.{mode}": _edited(pair, notebook, mode, think=True) for mode in arms.thought}
    before = partial(notebook.decide, pair.case.asked, _options(pair))
    asks["history.before"] = partial(chosen, notebook, before)
    found = settled(engine, asks)
    # The first answer is known now, so what follows needs no guess about it.
    answered = prefilled(model, pair, DEFAULT_TEMPLATE)
    answered._thoughts = [thought]
    answered.decide(pair.case.asked, _options(pair), keep=True)
    asks = {
        f"back_asked.{mode}": partial(chosen, notebook, partial(back, pair, notebook, mode, asked=True))
        for mode in arms.back
    }
    asks |= {f"history.{mode}": _edited(pair, answered, mode) for mode in arms.history}
    asks |= {f"history.{mode}_thought": _edited(pair, answered, mode, think=True) for mode in arms.thought}
    found |= settled(engine, asks)
    row: Row = {"right": list(pair.actions), "full": found["full"]}
    for part in ("wording", "back", "back_asked", "thought", "history"):
        row[part] = {
            name.removeprefix(f"{part}."): choice for name, choice in found.items() if name.startswith(f"{part}.")
        }
    return row


def prefilled(model: Model, pair: Pair, template: str) -> Notebook:
    """A prefilled notebook with the policy and the old value. `template` words its errata."""
    case = pair.case
    notebook = as_published(Notebook(model, erratum_template=template))
    notebook.message("system", case.scenario.prompt, **case.values(pair.change[0])).prefill()
    return notebook


def _edited(pair: Pair, notebook: Notebook, mode: Mode, *, think: bool = False) -> Callable[[], str]:
    return partial(chosen, notebook, partial(edited, pair, notebook, mode, think=think))


def _options(pair: Pair) -> list[str]:
    return list(pair.first_tokens)


def chosen(notebook: Notebook, ask: Callable[[], Decision]) -> str:
    """The choice. The notebook is unchanged."""
    return tried(notebook, ask).choice


def edited(pair: Pair, notebook: Notebook, mode: Mode, *, think: bool = False) -> Decision:
    """The decision after an edit to the new value."""
    asked = f"{pair.case.asked} {THINK_INSTRUCTION}" if think else pair.case.asked
    edits = {pair.case.gate.field: pair.change[1]}
    return notebook.decide(asked, _options(pair), edits=edits, mode=mode, think=think)


def back(pair: Pair, notebook: Notebook, mode: Mode, *, asked: bool = False) -> Decision:
    """The decision after the field is set to the new value and back to the old one.

    With `asked`, the question is asked and answered in between, so that the first erratum cannot be removed.
    """
    field = pair.case.gate.field
    first = {field: pair.change[1]}
    if asked:
        notebook.decide(pair.case.asked, _options(pair), edits=first, mode=mode, keep=True)
    else:
        notebook.edit(first, mode=mode)
    return notebook.decide(pair.case.asked, _options(pair), edits={field: pair.change[0]}, mode=mode)


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """How often each arm is right, over the policies that full prefill decides correctly under both values."""
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
    scenarios=336,
    seconds=2.3,
    quick=partial(measure, arms=FEW),
)
