"""Which kinds of text hold the notes? Rules, delimiters, filler, question and template, compared with random tokens.

Each set of tokens is patched alone into the old context (what it suffices for), left stale in the new one (what is lost
without it), and recomputed after the field (what an edit achieves). The random tokens are matched.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

from programmable_kv.lab.experiments.cases import SEED
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.nulls import matched
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.lab.experiments.summaries import arm, at, mean_by_domain
from programmable_kv.lab.experiments.written import RULES, TAIL, Part, Text, Written
from programmable_kv.lab.tools.together import Probe

DRAWS = 4


def sets(text: Written) -> dict[str, tuple[int, ...]]:
    """Sets of later tokens by name. Sets that are empty in a policy are left out."""
    both = (Text.OLD_RULE, Text.NEW_RULE)
    of_rules = text.of(*both)
    found: dict[str, Sequence[int]] = {
        "delimiters": text.delimiters,
        "words": [slot for slot in text.later if slot not in text.delimiters],
        "state": text.of(Text.STATE),
        "old_rule": text.of(Text.OLD_RULE),
        "new_rule": text.of(Text.NEW_RULE),
        "both_rules": of_rules,
        "other_rules": text.of(Text.OTHER_RULE),
        "rules": text.of(*RULES),
        "all_but_rules": [slot for slot in text.later if text.kinds[slot] not in RULES],
        "rule_delimiters": [slot for slot in text.of(*RULES) if text.delimits(slot)],
        "other_delimiters": [slot for slot in text.delimiters if text.kinds[slot] not in RULES],
        "filler": text.of(Text.FILLER),
        "rest": text.of(Text.REST),
        "question": text.of(Text.QUESTION),
        "template": text.of(Text.TEMPLATE),
        "tail": text.of(*TAIL),
    }
    found |= {f"rule_{part}": [s for s in of_rules if text.parts[s] is part] for part in Part if part is not Part.NONE}
    found["first_of_actions"] = [s for s in found["rule_action"] if text.parts[s - 1] is not Part.ACTION]
    return {name: tuple(slots) for name, slots in found.items() if slots}


def measure(pair: Pair, _: Sequence[Row]) -> Row:
    """The gap after each set is patched, left stale and recomputed; and after as many random tokens are patched."""
    text = pair.text
    chosen = sets(text)
    rng = random.Random(f"{SEED}/where/{pair.case.number}")
    drawn: dict[str, list[tuple[int, ...]]] = {}
    strata: dict[str, int] = {}
    for name, slots in chosen.items():
        found = [each for _ in range(DRAWS) if (each := matched(slots, text.later, rng)) is not None]
        if found:
            drawn[name], strata[name] = [each for each, _ in found], found[0][1]
    gaps = iter(pair.gaps([Probe(each) for each in (*chosen.values(), *(d for ds in drawn.values() for d in ds))]))
    row: Row = {"patched": {name: next(gaps) for name in chosen}}
    row["random"] = {name: fmean(next(gaps) for _ in draws) for name, draws in drawn.items()}
    row["noised"] = dict(zip(chosen, pair.gaps([Probe(each) for each in chosen.values()], noising=True), strict=True))
    row["recomputed"] = {
        name: pair.recomputed((*text.field.range, *chosen[name]))
        for name in ("delimiters", "both_rules", "rules", "tail", "all_but_rules")
    }
    row = {part: {name: round(gap, 4) for name, gap in each.items()} for part, each in row.items()}
    return row | {"tokens": {name: len(slots) for name, slots in chosen.items()}, "strata": strata}


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """By set: recovery and flips patched alone, its null, what is lost without it, and what recomputing achieves."""
    summary: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row["patched"]):
        part: dict[str, Any] = {
            "tokens": mean_by_domain(rows, at(f"tokens.{name}"))["value"],
            "patched": arm(rows, at(f"patched.{name}")),
            "random": arm(rows, at(f"random.{name}")),
            "excess": mean_by_domain(rows, partial(_excess, name)),
            "strata": mean_by_domain(rows, at(f"strata.{name}"))["value"],
            "lost": mean_by_domain(rows, partial(_lost, name)),
        }
        if any(name in row["recomputed"] for row in rows):
            part["recomputed"] = arm(rows, at(f"recomputed.{name}"))
        summary[name] = part
    return {"sets": summary}


def _excess(name: str, row: Row) -> float | None:
    """How much more a set recovers than its null, on one policy."""
    found, null = (row[part].get(name) for part in ("patched", "random"))
    if found is None or null is None or not row["valid"]:
        return None
    return (float(found) - float(null)) / _span(row)


def _lost(name: str, row: Row) -> float | None:
    """The share of the decision's span that is lost if the set is stale in the new context."""
    if name not in row["noised"] or not row["valid"]:
        return None
    return float(row["new_gap"] - row["noised"][name]) / _span(row)


def _span(row: Row) -> float:
    return float(row["new_gap"]) - float(row["old_gap"])


WHERE = Experiment(
    name="where-notes-are",
    version=1,
    title="In which texts the notes stand that carry a changed field to the decision",
    measure=measure,
    summarise=summarise,
    seconds=1.7,
)
