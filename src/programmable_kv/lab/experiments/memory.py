"""Is a memory edited like any other text? A block of facts above or below its rules, prefilled in place or spliced.

The memory is the policy's own block of facts, one of which changes. `recomputed`: everything has read what is before
it. `spliced`: the memory was compiled alone and has read only itself, and what follows it has read everything. On both,
the same edits are really made, with the question asked after them: the fact's tokens recomputed in place, a line that
states the new value, and the fact with the rules that name it. In a third place nothing is edited: between the rules
and the lines about other things, which are between memory and question there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import combinations
from statistics import fmean
from typing import Any

import torch

from programmable_kv.cache.span import Span
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.named_pair import NamedPair, known_of, named_pair
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.lab.experiments.placed import EARLY, LATE, PLACES, Placed, places, read_alone
from programmable_kv.lab.experiments.prevention import named, tail_of
from programmable_kv.lab.experiments.summaries import mean_by_domain, share
from programmable_kv.lab.experiments.written import RULES
from programmable_kv.lab.statistics.intervals import cluster_interval
from programmable_kv.lab.statistics.many_tests import benjamini_hochberg
from programmable_kv.lab.statistics.paired import PairedCounts, mcnemar
from programmable_kv.lab.tools.readouts import Scale
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.prompt.chat import thought_closed
from programmable_kv.prompt.parts import Rendered
from programmable_kv.prompt.units import Kind, tokenised
from programmable_kv.prompt.wording import DEFAULT_TEMPLATE, statement

EDITED = (EARLY, LATE)
RECOMPUTED, SPLICED = "recomputed", "spliced"
WAYS = (RECOMPUTED, SPLICED)
IN_PLACE, ERRATUM, READERS = "in_place", "erratum", "readers"
ARMS = (IN_PLACE, ERRATUM, READERS)
OLD, NEW = "old", "new"
UNEDITED = (OLD, NEW)
"""Prefilled with the old value, and with the new one."""


def measure(pair: Pair, _: Sequence[Row], *, brief: bool = False) -> Row:
    """The decisions before and after the edits, in each place and by each way.

    `brief`: only the edits of the memory above its rules. Rows that several arms have in common are computed once, and
    the rows of all places together.
    """
    shared = known_of(pair)
    found = {
        name: (placed, named_pair(placed.texts, shared))
        for name, placed in places(pair)
        if not brief or name in EDITED[:1]
    }
    asked = {name: edited(*each) for name, each in found.items() if name in EDITED}
    shared.compute()
    row: Row = {"right": list(pair.actions)}
    if not brief:
        row["prefilled"] = {name: prefills(each) for name, (_, each) in found.items()}
    row["places"] = {}
    for name, by_way in asked.items():
        placed, here = found[name]
        row["places"][name] = {
            "memory": len(placed.memory),
            "tokens": len(placed.texts.text.ids),
            **{way: {of: here.decision(each) for of, each in rows.items()} for way, rows in by_way.items()},
        }
    return row


def prefills(pair: NamedPair) -> dict[str, bool]:
    """Whether full prefills are right, by value."""
    found = [pair.decision(names[-1])["choice"] for names in (pair.old, pair.fresh)]
    return {value: choice == right for value, choice, right in zip(UNEDITED, found, pair.texts.actions, strict=True)}


def edited(placed: Placed, pair: NamedPair) -> dict[str, dict[str, int]]:
    """By way, the rows that decide: under both values, and after each edit of the old one.

    All tokens of the question are recomputed.
    """
    text = pair.texts.text
    field, tail = tuple(text.field.range), tail_of(text)
    chosen = {IN_PLACE: (*field, *tail), READERS: (*field, *text.of(*RULES), *tail)}
    line = with_line(placed)
    found: dict[str, dict[str, int]] = {}
    for way in WAYS:
        old, new = (pair.old, pair.fresh) if way == RECOMPUTED else spliced(pair, placed.memory)
        found[way] = {
            OLD: pair.asked(old[-1]),
            NEW: pair.asked(new[-1]),
            **{arm: pair.recomputed(slots, old) for arm, slots in chosen.items()},
            ERRATUM: continued(pair, old, line),
        }
    return found


def spliced(pair: NamedPair, memory: Span) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The rows of both texts if the memory has read only itself."""
    old, new = (
        named(pair.shared, text, read_alone(text, memory)) for text in (pair.texts.old_text, pair.texts.new_text)
    )
    return old, new


def with_line(placed: Placed) -> tuple[int, ...]:
    """The tokens of the context with the old value and, before the question, the line that states the new value."""
    texts = placed.texts
    field, (old, new) = texts.case.gate.field, texts.change
    notebook = Notebook(texts.model).message("system", placed.system, **texts.case.values(old))
    notebook.message("system", statement(DEFAULT_TEMPLATE, field, new)).message("user", texts.case.asked)
    conversation = notebook.prompt.conversation()
    assert conversation is not None
    opening = thought_closed(conversation.continued([], prompt_for_answer=True).added)
    return (
        *tokenised(texts.model.tokenizer, notebook.rendered(), Kind.PREFILL).ids,
        *tokenised(texts.model.tokenizer, Rendered(opening), Kind.TURN).ids,
    )


def continued(pair: NamedPair, names: Sequence[int], ids: Sequence[int]) -> int:
    """The row that decides if a context, given by its rows, goes on with `ids` from the first different token on."""
    own = pair.texts.text.ids
    start = next(slot for slot, (a, b) in enumerate(zip(own, ids, strict=False)) if a != b)
    return pair.asked(pair.shared.context(ids, dict(enumerate(names[:start])))[-1])


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """By place, what is decided on either cache, over the policies that full prefills get right under both values.

    Recoveries of both ways are on the scale of the full prefills of that place. `paired`: exact tests on the same
    items. `placement`: how often prefills are right by the memory's place, with p-values corrected for the number of
    tests. `slope`: the slope of spliced recovery on recomputed recovery, over edits and places.
    """
    summary: dict[str, Any] = {"placement": _placement(rows), "places": {}}
    points: dict[str, list[tuple[float, float]]] = {}
    for name in EDITED:
        counted = [row for row in (_flat(each, name) for each in rows if name in each["places"]) if _counts(row)]
        part: dict[str, Any] = {"counted": len(counted)}
        for way in WAYS:
            part[way] = {which: _arm(counted, way, which) for which in (*UNEDITED, *ARMS)}
        part["same"] = {which: share(counted, partial(_same, which)) for which in (*UNEDITED, *ARMS)}
        part["paired"] = {
            **{arm: _tested(counted, (RECOMPUTED, arm), (SPLICED, arm)) for arm in ARMS},
            **{f"{IN_PLACE}_{ERRATUM}_{way}": _tested(counted, (way, IN_PLACE), (way, ERRATUM)) for way in WAYS},
        }
        summary["places"][name] = part
        for row in counted:
            first, second = ([_recovery(way, arm, row) for arm in ARMS] for way in WAYS)
            points.setdefault(row["domain"], []).extend(zip(first, second, strict=True))
    summary["edited"] = sum(part["counted"] for part in summary["places"].values()) * len(WAYS)
    summary["points"] = sum(map(len, points.values()))
    if len(points) > 1:
        summary["slope"] = cluster_interval(points, slope).model_dump()
    return summary


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The least-squares slope of the second number on the first, over all points; 0 if the first never differs."""
    first, second = (torch.tensor(each, dtype=torch.float64) for each in zip(*points, strict=True))
    centred = first - first.mean()
    spread = float(centred.square().sum())
    return float((centred * second).sum()) / spread if spread > 0 else 0.0


def _flat(row: Row, name: str) -> dict[str, Any]:
    return {"domain": row["domain"], "right": row["right"], **row["places"][name]}


def _scale(row: Row) -> Scale:
    """The gaps of the full prefills under the two values."""
    return Scale(row[RECOMPUTED][OLD]["gap"], row[RECOMPUTED][NEW]["gap"])


def _counts(row: Row) -> bool:
    return _scale(row).valid and all(_right(RECOMPUTED, value, row) for value in UNEDITED)


def _right(way: str, which: str, row: Row) -> bool:
    """Whether the choice is right: the old value's action under the old value, else the new value's."""
    return bool(row[way][which]["choice"] == row["right"][which != OLD])


def _same(which: str, row: Row) -> bool:
    return bool(row[RECOMPUTED][which]["choice"] == row[SPLICED][which]["choice"])


def _recovery(way: str, which: str, row: Row) -> float:
    return _scale(row).recovery(row[way][which]["gap"])


def _arm(rows: Sequence[Row], way: str, which: str) -> dict[str, Any]:
    return {
        "recovery": mean_by_domain(rows, partial(_recovery, way, which)),
        "right": share(rows, partial(_right, way, which)),
    }


def _tested(rows: Sequence[Row], first: tuple[str, str], second: tuple[str, str]) -> dict[str, Any]:
    counts = PairedCounts.of(*([_right(*arm, row) for row in rows] for arm in (first, second)))
    return {"only_first": counts.only_first, "only_second": counts.only_second, "p": mcnemar(counts)}


def _placement(rows: Sequence[Row]) -> dict[str, Any]:
    """How often prefills are right by place, and each two places compared, for policies that fit all places."""
    all_three = [row for row in rows if len(row.get("prefilled", {})) == len(PLACES)]  # a brief row has none
    found: dict[str, Any] = {"policies": len(all_three)}
    found |= {name: mean_by_domain(all_three, partial(_rightness, name)) for name in PLACES}
    tests = list(combinations(PLACES, 2))
    answers = {name: [row["prefilled"][name][value] for row in all_three for value in UNEDITED] for name in PLACES}
    counts = [PairedCounts.of(answers[first], answers[second]) for first, second in tests]
    corrected = benjamini_hochberg([mcnemar(each) for each in counts])
    for (first, second), each, p in zip(tests, counts, corrected, strict=True):
        found[f"{first}_{second}"] = {"only_first": each.only_first, "only_second": each.only_second, "p": float(p)}
    return found


def _rightness(name: str, row: Row) -> float:
    return fmean(row["prefilled"][name][value] for value in UNEDITED)


MEMORY = Experiment(
    name="memory",
    version=1,
    title="A memory edited where it stands: above its rules or below them, recomputed or compiled alone and spliced",
    measure=measure,
    summarise=summarise,
    scenarios=336,
    wrong_too=True,
    seconds=2.4,
    quick=partial(measure, brief=True),
)
