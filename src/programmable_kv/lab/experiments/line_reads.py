"""Is a line that states a new value a stronger correction if it reads the old value, the new one, or none?

Each policy's field is edited by an appended line, and by the same line with the field's own tokens refreshed as well.
Then the line may read the refreshed field (as was published), or it may not; the null hides a random stretch of as many
other tokens from it instead. `added`: the same edits, but the question is about a rule that is added after the edit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from programmable_kv.cache.span import Span
from programmable_kv.edits.modes import Mode
from programmable_kv.edits.plan import Plan
from programmable_kv.lab.experiments.errata import prefilled
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.named_pair import known_of
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.lab.experiments.summaries import at, mean_by_domain, share
from programmable_kv.lab.statistics.paired import PairedCounts, mcnemar
from programmable_kv.lab.tools.naming import naming, settled, tried
from programmable_kv.notebook.decision import Decision
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.prompt.wording import DEFAULT_TEMPLATE
from programmable_kv.scenarios.phrasings import PHRASINGS, question

READS_OLD, READS_NEW, READS_NEITHER, RANDOM = "reads_old", "reads_new", "reads_neither", "random"
LINES = (READS_OLD, READS_NEW, READS_NEITHER, RANDOM)
"""What the line reads. With `reads_old` the field stays as it was; else it is refreshed. `random` reads the new
value; a random stretch of as many later tokens is hidden from it."""
ADDED = (Mode.STALE, READS_OLD, READS_NEW, READS_NEITHER, Mode.READERS, Mode.FULL)
"""Edits before a rule is added."""
TOPIC = "a callback"
"""what the added rule is about"""


def measure(pair: Pair, _: Sequence[Row]) -> Row:
    """The decision after each edit, and its gap. The rows of all edits are computed together (`naming`)."""
    model, engine = naming(pair.model, known_of(pair))
    notebook = prefilled(model, pair, DEFAULT_TEMPLATE)
    rng = random.Random(f"line reads {pair.case.number}")
    hidden = _elsewhere(notebook, pair, rng)
    old, new = pair.change
    first, second = rng.sample(list(pair.first_tokens), 2)
    name = pair.case.gate.field
    rules = f"For {TOPIC}: If {name} is {new}, {first}.\nFor {TOPIC}: If {name} is {old}, {second}."
    asked = question(rng, PHRASINGS["held_out"], TOPIC, think=False)
    asks: dict[str, Callable[[], Decision]] = {
        f"asked.{line}": partial(tried, notebook, partial(_asked, pair, notebook, line, hidden))
        for line in (Mode.STALE, *LINES, Mode.FULL)
    }
    for line in ADDED:
        ask = partial(_of_added, pair, notebook, line, rules, asked, [first, second])
        asks[f"added.{line}"] = partial(tried, notebook, ask)
    found = settled(engine, asks)
    row: Row = {"right": list(pair.actions), "asked": {}, "added_right": [second, first], "added": {}}
    for key, decision in found.items():
        part, _dot, line = key.partition(".")
        between = (pair.actions[1], pair.actions[0]) if part == "asked" else (first, second)
        row[part][line] = {"choice": decision.choice, "gap": round(decision.gap(*between), 4)}
    return row


def edited(notebook: Notebook, pair: Pair, line: str, hidden: Span | None = None) -> None:
    """Set the field to its new value by an edit mode, or by a line that reads what `line` says."""
    edit = {pair.case.gate.field: pair.change[1]}
    if line not in LINES:
        notebook.edit(edit, mode=line)
    elif line == READS_OLD:
        notebook.edit(edit, mode=Mode.ERRATUM)
    else:
        plan = notebook.plan.edit(edit, mode=Mode.FIELD_ERRATUM)
        field = tuple(notebook.spans(pair.case.gate.field))
        elsewhere = () if hidden is None else (hidden,)
        unread = {READS_NEW: (), READS_NEITHER: field, RANDOM: elsewhere}[line]
        notebook._applied(_with_unread(plan, unread))


def _with_unread(plan: Plan, unread: tuple[Span, ...]) -> Plan:
    *field, line = plan.compute
    return replace(plan, compute=(*field, replace(line, unread=unread)))


def _elsewhere(notebook: Notebook, pair: Pair, rng: random.Random) -> Span:
    """As many slots as the field has, at a random place after it."""
    (field,) = notebook.spans(pair.case.gate.field)
    start = rng.randrange(field.stop, len(notebook) - len(field))
    return Span(start, start + len(field))


def _asked(pair: Pair, notebook: Notebook, line: str, hidden: Span) -> Decision:
    edited(notebook, pair, line, hidden)
    return notebook.decide(pair.case.asked, list(pair.first_tokens))


def _of_added(pair: Pair, notebook: Notebook, line: str, rules: str, asked: str, options: Sequence[str]) -> Decision:
    edited(notebook, pair, line)
    notebook.add("system", rules)
    return notebook.decide(asked, options)


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Right decisions and mean gaps of the policies that full prefills decide correctly under both values."""
    edits = tuple(arm for arm in ADDED if arm not in (Mode.STALE, Mode.FULL))
    return {"asked": _part(rows, "asked", "right", LINES), "added": _part(rows, "added", "added_right", edits)}


def _part(rows: Sequence[Row], part: str, right: str, arms: Sequence[str]) -> dict[str, Any]:
    def chosen(arm: str, row: Row) -> str:
        return str(row[part][arm]["choice"])

    def is_right(arm: str, row: Row) -> bool:
        return bool(chosen(arm, row) == row[right][1])

    def both_right(row: Row) -> bool:
        return is_right(Mode.FULL, row) and chosen(Mode.STALE, row) == row[right][0]

    solved = [row for row in rows if both_right(row)]
    summary: dict[str, Any] = {"solved": share(rows, both_right)}
    for arm in arms:
        gap = mean_by_domain(solved, at(f"{part}.{arm}.gap"))
        summary[arm] = {"right": share(solved, partial(is_right, arm)), "gap": gap}
    for other in (READS_OLD, READS_NEITHER):
        counts = PairedCounts.of(*([is_right(arm, row) for row in solved] for arm in (READS_NEW, other)))
        summary[f"p_{READS_NEW}_{other}"] = round(mcnemar(counts), 6) if solved else 1.0
    return summary


LINE_READS = Experiment(
    name="line-reads",
    version=1,
    title="What a line that states a new value reads: the old value, the new one, or none",
    measure=measure,
    summarise=summarise,
    scenarios=240,
    sets=2,
    seconds=2.5,
)
