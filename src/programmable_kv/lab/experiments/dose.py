"""How many wrong notes turn a decision, and can an edit repair it? Injects another value's notes, then edits the field.

A dose is a number of tokens whose keys and values are taken from a context with another value: those of the later
tokens that carry most come first, ranked by their roles on policies of other domains. A dose can also be of strength:
the same few tokens, moved farther than any prefill would move them. After each dose the poisoned cache is edited as a
user would edit it: to a third value, which neither the text nor the notes name.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.overwrite import Overwrite
from programmable_kv.edits.modes import Mode
from programmable_kv.engine import Rows
from programmable_kv.lab.experiments.cases import SEED
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.locality import rank, ranked
from programmable_kv.lab.experiments.nulls import matched
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.lab.experiments.summaries import Value, at, mean_by_domain, share
from programmable_kv.lab.published import as_published
from programmable_kv.lab.tools.kv import injected, rows_from
from programmable_kv.lab.tools.together import Probe
from programmable_kv.notebook.notebook import Notebook

COUNTS = (0, 1, 2, 4, 8, 16)
ALL = "all"
DRAWS = 4
"""Random sets for each count. Their gaps are averaged, and the first set is repaired."""
STRONG = 8
"""Number of tokens that are moved farther."""
STRENGTHS = (1, 2, 4, 8, 16)
"""Multiples of the distance from the cached rows to the injected ones."""
REPAIRS = (Mode.ERRATUM, Mode.FIELD_ERRATUM, Mode.READERS)
REPAIRED = ("0", str(STRONG), ALL)
"""Doses by number that are repaired."""
STRONGLY_REPAIRED = (2, 4)
"""Doses by strength that are repaired. The last one is also repaired on random tokens."""
RANDOM = "random_"


def measure(
    pair: Pair,
    others: Sequence[Row],
    *,
    by_number: Sequence[str] = REPAIRED,
    by_strength: Sequence[int] = STRONGLY_REPAIRED,
) -> Row:
    """The decision under each dose, and after each repair. `by_number` and `by_strength` are the doses to repair."""
    order = ranked(pair, others)
    doses = {str(count): tuple(order[:count]) for count in COUNTS} | {ALL: pair.text.later}
    drawn = dict(_random(pair, order))
    row: Row = {"turned": _turned(pair, doses, drawn)}
    row["strength"] = {str(times): _strongly(pair, doses[str(STRONG)], times) for times in STRENGTHS}
    third = third_value(pair)
    if third is None:
        return row
    notebook = cached(pair)
    row["full"] = repaired(pair, notebook, third, Mode.FULL)["right"]
    strong, drawn_as_many = doses[str(STRONG)], drawn.get(f"{RANDOM}{STRONG}/0")
    row["repaired"] = {dose: _repairs(pair, notebook, third, doses[dose]) for dose in by_number}
    for times in by_strength:
        row["repaired"][f"times_{times}"] = _repairs(pair, notebook, third, strong, times)
    if drawn_as_many is not None and by_strength:
        times = by_strength[-1]
        row["repaired"][f"{RANDOM}times_{times}"] = _repairs(pair, notebook, third, drawn_as_many, times)
    return row


def third_value(pair: Pair) -> str | None:
    """A value that neither the text nor the injected notes name, with an action of its own; None if there is none."""
    actions = pair.case.gate.actions
    return next((value for value in sorted(actions) if actions[value] not in pair.actions), None)


def _random(pair: Pair, order: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    rng = random.Random(f"{SEED}/dose/{pair.case.number}")
    for count in COUNTS[1:]:
        for draw in range(DRAWS):
            found = matched(order[:count], pair.text.later, rng)
            if found is not None:
                yield f"{RANDOM}{count}/{draw}", found[0]


def _turned(
    pair: Pair, doses: Mapping[str, tuple[int, ...]], drawn: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, float]]:
    """By dose, the gap of the notes' action over the text's, and the share of decisions for the notes' action."""
    sets = {**doses, **drawn}
    logits = dict(zip(sets, pair.probe([Probe(slots) for slots in sets.values()]), strict=True))
    found: dict[str, list[tuple[float, float]]] = {}
    for name, each in logits.items():
        turned = float(pair.decides(each) == pair.actions[1])
        found.setdefault(name.partition("/")[0], []).append((float(pair.gap_in(each)), turned))
    return {
        name: {"gap": round(fmean(gap for gap, _ in each), 4), "turned": fmean(turned for _, turned in each)}
        for name, each in found.items()
    }


def stronger(here: KVBuffer, donor: KVBuffer, slots: Sequence[int], times: float) -> list[Overwrite]:
    """Rows moved from those cached here towards the donor's, by `times` their distance: 0 is here, 1 is the donor."""
    found = []
    for own, other in zip(rows_from(here, slots), rows_from(donor, slots), strict=True):
        found.append(
            Overwrite(own.layer, _beyond(own.keys, other.keys, times), _beyond(own.values, other.values, times))
        )
    return found


def _beyond(own: torch.Tensor | None, other: torch.Tensor | None, times: float) -> torch.Tensor:
    assert own is not None
    assert other is not None
    return torch.lerp(own, other, times)


def _strongly(pair: Pair, slots: Sequence[int], times: float) -> dict[str, float]:
    with injected(pair.old, slots, stronger(pair.old, pair.fresh, slots, times)):
        last = pair.text.last
        logits = pair.engine.compute(pair.old, Rows((pair.token,), (last,), (last,)))[-1]
        turned = float(pair.decides(logits) == pair.actions[1])
        return {"gap": round(float(pair.gap_in(logits)), 4), "turned": turned}


def cached(pair: Pair) -> Notebook:
    """A prefilled notebook with the policy, the old value and the question, to be poisoned and edited."""
    notebook = as_published(Notebook(pair.model))
    notebook.message("system", pair.case.scenario.prompt, **pair.case.values(pair.change[0]))
    notebook.message("user", pair.case.asked).prefill()
    return notebook


def _repairs(
    pair: Pair, notebook: Notebook, value: str, slots: Sequence[int], times: float = 1.0
) -> dict[str, dict[str, Any]]:
    """The decision of each repair on the cache with these tokens poisoned."""
    # The opening of the answer is computed after the edit, so it cannot be poisoned.
    inside = [slot for slot in slots if slot < len(notebook)]
    if not inside:
        return {str(mode): repaired(pair, notebook, value, mode) for mode in REPAIRS}
    with injected(notebook.cache, inside, stronger(notebook.cache, pair.fresh, inside, times)):
        return {str(mode): repaired(pair, notebook, value, mode) for mode in REPAIRS}


def repaired(pair: Pair, notebook: Notebook, value: str, mode: Mode) -> dict[str, Any]:
    """Whether the edit is followed, and by how many nats its action leads the best other. The notebook is unchanged."""
    field, right = pair.case.gate.field, pair.case.gate.actions[value]
    opening = pair.text.ids[len(notebook) :]
    mark = notebook.mark()
    # Takes the logits of the edit's own forward, as `Notebook.decide` does.
    applied = notebook._applied(notebook.plan.edit({field: value}, mode=mode), followed_by=opening, logits=1)
    assert applied.logits is not None
    logits = applied.logits[-1]
    notebook.rollback(mark)
    scores = {action: float(logits[token]) for action, token in pair.first_tokens.items()}
    best = max(score for action, score in scores.items() if action != right)
    return {"right": pair.decides(logits) == right, "lead": round(scores[right] - best, 4)}


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """By dose, the share of turned decisions and the recovery; of the edited ones, the share each repair gets right."""
    summary: dict[str, Any] = {}
    for part in ("turned", "strength"):
        names = dict.fromkeys(name for row in rows for name in row[part])
        summary[part] = {
            name: {
                "recovery": mean_by_domain(rows, _recovery(f"{part}.{name}.gap")),
                "turned": mean_by_domain(rows, at(f"{part}.{name}.turned")),
            }
            for name in names
        }
    edited = [row for row in rows if row.get("full")]
    doses = dict.fromkeys(dose for row in edited for dose in row["repaired"])
    summary["edited"] = len(edited)
    summary["repaired"] = {
        dose: {str(mode): _repaired(edited, f"repaired.{dose}.{mode}") for mode in REPAIRS} for dose in doses
    }
    return summary


def _recovery(path: str) -> Value:
    def recovered(row: Row) -> float | None:
        found = at(path)(row)
        return (
            (found - row["old_gap"]) / (row["new_gap"] - row["old_gap"]) if row["valid"] and found is not None else None
        )

    return recovered


def _repaired(rows: Sequence[Row], path: str) -> dict[str, Any]:
    def right(row: Row) -> bool | None:
        found = at(f"{path}.right")(row)
        return None if found is None else bool(found)

    return {"right": share(rows, right), "lead": mean_by_domain(rows, at(f"{path}.lead"))}


DOSE = Experiment(
    name="dose",
    version=1,
    title="How many wrong notes turn a decision, and whether an edit repairs it then",
    measure=measure,
    summarise=summarise,
    rank=rank,
    scenarios=336,
    values=3,
    seconds=3.1,
    quick=partial(measure, by_number=(str(STRONG),), by_strength=()),
)
