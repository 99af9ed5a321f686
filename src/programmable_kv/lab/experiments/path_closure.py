"""Field, note, decision: which heads write the notes, which read them, and what is left besides these paths?

Heads are ranked one by one on policies of other domains, exactly for reading and by slopes for writing. They are scored
together here and compared with as many random heads of the same layers. Reading is done by the deciding row: some heads
read the new context's notes, all others the old one's, which is exact and closes a path (`together.Probe.places`).
Writing is done by the notes' rows: some heads' outputs there are the new context's. The rest is the decision if
everything but the chosen paths is the new context's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

from programmable_kv.lab.experiments.cases import SEED
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.heads import (
    Writing,
    all_but,
    all_heads,
    depth,
    note_sets,
    read_by,
    read_elsewhere,
    stability,
    strongest,
    writing_effects,
)
from programmable_kv.lab.experiments.nulls import matched_heads
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.lab.experiments.shares import shares_by_layer
from programmable_kv.lab.experiments.summaries import arm, at, mean_by_domain, nested, rounded, share
from programmable_kv.lab.tools.copies import Rewritten
from programmable_kv.lab.tools.head_outputs import Head
from programmable_kv.lab.tools.together import Probe

READERS = {"actions": (12, 24), "both_rules": (1, 2, 4, 8, 12, 16, 24, 32)}
WRITERS = (1, 2, 4, 8, 12, 16)
CIRCUIT = {"read": 24, "write": 12}
"""Number of heads in the circuit that is taken apart."""
DRAWS = 2
"""Random sets of reading heads for each size. Of writing heads, which take many rows each, there is one."""
LEFT = "left"
"""An arm in the new context, into which the old one's notes are written."""
Name = tuple[str, ...]
"""Path of a measurement in the row."""
MATTERS = 0.005
"""A head is not part of the circuit if the circuit loses less recovery than this without it."""


def circuit(heads: Sequence[Head], part: str) -> int:
    """The number of heads to take apart: in a small model at most half, so that as many others are left."""
    return min(CIRCUIT[part], len(heads) // 2)


def rank(pair: Pair) -> Row:
    """The recovery of each head alone: reading both rules, exactly; writing the actions, by its slope."""
    heads, notes = all_heads(pair), note_sets(pair)
    span = pair.scale.new - pair.scale.old
    gaps = pair.gaps([read_by(pair, notes["both_rules"], [head]) for head in heads])
    moved = {"read": [gap - pair.scale.old for gap in gaps], "write": writing_effects(pair, notes["actions"])}
    return {part: [round(each / span, 4) for each in found] for part, found in moved.items()}


def measure(pair: Pair, others: Sequence[Row]) -> Row:
    """What the heads ranked on other policies do together, and what is left besides them."""
    heads, notes = all_heads(pair), note_sets(pair)
    ranked = {part: strongest([row[part] for row in others], heads, len(heads)) for part in CIRCUIT}
    chosen = {part: ranked[part][: circuit(heads, part)] for part in CIRCUIT}
    rng = random.Random(f"{SEED}/path-closure/{pair.case.number}")
    # Everything is drawn first. Then one forward computes all readings, and one for each context all writings.
    probes = _notes(pair, notes) | _reading(pair, notes, ranked["read"], rng)
    writings = _writing(pair, ranked["write"], rng) | _whole(chosen)
    alone = _without_one(pair, notes["both_rules"], chosen["read"], rng)
    gaps = _by_name(pair, probes | alone)
    row: Row = {}
    found = {name: fmean(gaps[name]) for name in probes} | _written(pair, notes["actions"], writings)
    for (*path, last), gap in found.items():
        inner = row
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = round(gap, 4)
    for name, slots in notes.items():
        row["notes"][name]["tokens"] = len(slots)
    row["without_one"] = {name: _lost(pair, gaps["without_one", name]) for _, name in alone}
    row["stable"] = {part: rounded(stability(others, part, heads, circuit(heads, part))) for part in CIRCUIT}
    row["depth"] = rounded({part: depth([each[part] for each in others], heads, chosen[part]) for part in CIRCUIT})
    row["shares"] = shares_by_layer(pair, _firsts(pair, notes["actions"]))
    return row


def _firsts(pair: Pair, actions: Sequence[int]) -> tuple[int, ...]:
    return tuple(slot for slot in actions if slot - 1 not in set(actions))


def _by_name(pair: Pair, probes: dict[Name, list[Probe]]) -> dict[Name, list[float]]:
    """The gaps under the probes of each name, all in one forward."""
    gaps = iter(pair.gaps([probe for each in probes.values() for probe in each]))
    return {name: [next(gaps) for _ in each] for name, each in probes.items()}


def _notes(pair: Pair, notes: dict[str, tuple[int, ...]]) -> dict[Name, list[Probe]]:
    """Each set of notes alone, and everything else without it."""
    probes: dict[Name, list[Probe]] = {}
    for name, slots in notes.items():
        probes["notes", name, "alone"] = [Probe(slots)]
        probes["notes", name, "rest"] = [Probe(all_but(pair, slots))]
    return probes


def _reading(
    pair: Pair, notes: dict[str, tuple[int, ...]], ranked: Sequence[Head], rng: random.Random
) -> dict[Name, list[Probe]]:
    """The first heads of the ranking, by number and notes: alone, the rest, and both for random heads."""
    layers, width = len(pair.old), max(head for _, head in ranked) + 1
    probes: dict[Name, list[Probe]] = {}
    for name, sizes in READERS.items():
        for count in (k for k in sizes if 2 * k <= len(ranked)):
            chosen, slots = ranked[:count], notes[name]
            drawn = [matched_heads(chosen, layers, width, rng) for _ in range(DRAWS)]
            probes |= {
                ("read", name, str(count), "alone"): [read_by(pair, slots, chosen)],
                ("read", name, str(count), "rest"): [read_elsewhere(pair, slots, chosen)],
                ("read", name, str(count), "random"): [read_by(pair, slots, each) for each in drawn],
            }
            if count == CIRCUIT["read"]:
                probes["read", name, str(count), "random_rest"] = [read_elsewhere(pair, slots, each) for each in drawn]
    return probes


def _writing(pair: Pair, ranked: tuple[Head, ...], rng: random.Random) -> dict[Name, Rewritten]:
    """The first heads of the ranking, by number: alone, random ones, and what is left without them."""
    layers, width = len(pair.old), max(head for _, head in ranked) + 1
    writings: dict[Name, Rewritten] = {}
    for count in (k for k in WRITERS if 2 * k <= len(ranked)):
        chosen = ranked[:count]
        writings["write", str(count), "alone"] = Rewritten(chosen)
        if count <= CIRCUIT["write"]:
            writings["write", str(count), "random"] = Rewritten(matched_heads(chosen, layers, width, rng))
        if count == CIRCUIT["write"]:
            writings["write", str(count), LEFT] = Rewritten(chosen)
    return writings


def _whole(chosen: dict[str, tuple[Head, ...]]) -> dict[Name, Rewritten]:
    """The whole path: the writing heads write the actions, and only the reading heads read what they wrote."""
    whole = Rewritten(chosen["write"], readers=chosen["read"])
    return {("whole", "alone"): whole, ("whole", LEFT): whole}


def _written(pair: Pair, slots: Sequence[int], writings: dict[Name, Rewritten]) -> dict[Name, float]:
    """The gap of each: written in the old context, or what is left of the new one with the old one's notes in it."""
    found: dict[Name, float] = {}
    for noising in (False, True):
        some = {name: each for name, each in writings.items() if (name[-1] == LEFT) is noising}
        if some:
            gaps = Writing(pair, slots, noising=noising).gaps(list(some.values()))
            found |= dict(zip(some, gaps, strict=True))
    return found


def _without_one(
    pair: Pair, slots: Sequence[int], chosen: Sequence[Head], rng: random.Random
) -> dict[Name, list[Probe]]:
    """The reading circuit and a random one, each whole and without each of its heads in turn."""
    layers, width = len(pair.old), max(head for _, head in all_heads(pair)) + 1
    probes: dict[Name, list[Probe]] = {}
    for name, whole in (("chosen", tuple(chosen)), ("random", matched_heads(chosen, layers, width, rng))):
        smaller = [tuple(head for head in whole if head != each) for each in whole]
        probes["without_one", name] = [read_by(pair, slots, each) for each in (whole, *smaller)]
    return probes


def _lost(pair: Pair, gaps: Sequence[float]) -> Row:
    """The mean recovery that a circuit loses without one of its heads, and the share of heads that it needs."""
    together, *without = gaps
    lost = [abs(together - gap) / (pair.scale.new - pair.scale.old) for gap in without]
    return {"lost": round(fmean(lost), 4), "needed": sum(each > MATTERS for each in lost) / len(lost)}


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Recoveries by notes and number of heads; the whole path; stability of the ranking; shares of the writing."""
    summary: dict[str, Any] = {"notes": {}, "read": {}, "write": {}}
    for name in rows[0]["notes"] if rows else ():
        summary["notes"][name] = {part: arm(rows, at(f"notes.{name}.{part}")) for part in ("alone", "rest")} | {
            "tokens": mean_by_domain(rows, at(f"notes.{name}.tokens"))["value"]
        }
    for path in _paths(rows):
        group, *rest = path.split(".")
        inner = summary[group]
        for key in rest[:-1]:
            inner = inner.setdefault(key, {})
        inner[rest[-1]] = arm(rows, at(path))["recovery"]
    summary["whole"] = {part: arm(rows, at(f"whole.{part}")) for part in ("alone", "left")}
    summary["closed"] = {
        name: mean_by_domain(rows, partial(_unsigned, f"read.{name}.{CIRCUIT['read']}.rest"))
        for name in (rows[0]["read"] if rows else ())
    }
    for part in ("without_one", "stable", "depth", "shares"):
        summary[part] = nested(rows, part)
    summary["rest_within_bar"] = share(rows, _within)
    return summary


def _paths(rows: Sequence[Row]) -> list[str]:
    """The arms of reading and writing, as dotted paths."""
    found: dict[str, None] = {}
    for row in rows:
        for name, sizes in row["read"].items():
            found |= dict.fromkeys(f"read.{name}.{count}.{arm}" for count, arms in sizes.items() for arm in arms)
        found |= dict.fromkeys(f"write.{count}.{arm}" for count, arms in row["write"].items() for arm in arms)
    return list(found)


def _unsigned(path: str, row: Row) -> float | None:
    """How far from the old decision an arm ends, in either direction, as a share of the span."""
    gap = at(path)(row)
    return None if gap is None or not row["valid"] else abs(gap - row["old_gap"]) / (row["new_gap"] - row["old_gap"])


def _within(row: Row) -> bool | None:
    found = _unsigned(f"read.both_rules.{CIRCUIT['read']}.rest", row)
    return None if found is None else found <= 0.05


PATH_CLOSURE = Experiment(
    name="path-closure",
    version=1,
    title="Which heads write the notes and which read them, and what is left of the effect beside these paths",
    measure=measure,
    summarise=summarise,
    rank=rank,
    scenarios=336,
    ranking=32,
    seconds=1.6,
)
