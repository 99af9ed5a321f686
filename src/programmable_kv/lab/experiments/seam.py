"""How does a skill that was compiled alone differ? By position and layer; what repair fixes; why two skills compete.

One policy, and the same next to another one, are each compiled alone, behind a preface (of lines about other things, or
of a third policy), or both together, and put after a prefix. They are compared with a prefill of the same tokens in
which everything reads everything before it. The null of a difference is the same skill in the context, after other
lines.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.span import Span
from programmable_kv.engine import Rows
from programmable_kv.lab.experiments.blast_radius import distances
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.lab.experiments.skills import (
    OTHERS_SEED,
    Contexts,
    Skills,
    beside,
    layout,
    repaired_rows,
)
from programmable_kv.lab.experiments.summaries import nested
from programmable_kv.lab.tools.branches import Branch, branching
from programmable_kv.lab.tools.hooks import taken_back
from programmable_kv.lab.tools.kv import rows_from
from programmable_kv.lab.tools.readouts import kl

REPAIRED = (0, 1, 2, 4, 8, 16, 32)
RANDOM = (4, 32)
BUCKETS = ((0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 1 << 20))
"""Ranges of positions in the skill."""
SHIFT = 11
"""Number of lines by which the null's other prefix is ahead."""


def measure(pair: Pair, _: Sequence[Row], *, by_itself: bool = False) -> Row:
    """Compare the skill by itself and, unless `by_itself`, next to another one."""
    contexts = Contexts(pair)
    row: Row = {"one": compared(pair, contexts, layout(pair, []), dict(pair.first_tokens), deviates=True)}
    if by_itself:
        return row
    found, more = beside(pair, 1), beside(pair, 2)
    if found is not None and more is not None:
        others, tokens = found
        row["two"] = compared(pair, contexts, layout(pair, others), tokens, stranger=more[0][1].ids)
    return row


def compared(
    pair: Pair,
    contexts: Contexts,
    skills: Skills,
    tokens: dict[str, int],
    *,
    deviates: bool = False,
    stranger: Sequence[int] = (),
) -> Row:
    """Compare every way to compile and repair with a full prefill.

    `deviates`: also measure how far keys and values differ inside the skill. `stranger`: tokens of a third policy, as
    another preface.
    """
    full = contexts.full(skills)
    alone = contexts.alone(full, skills)
    expected, attention = _read(pair, full, skills, skills.last)
    rng = random.Random(f"{OTHERS_SEED}/random/{pair.case.number}")
    row: Row = {"right": _choice(expected, tokens) == pair.actions[0], "arms": {}, "attention": {"full": attention}}

    def add(name: str, logits: torch.Tensor) -> None:
        row["arms"][name] = _outcome(pair, expected, logits, tokens)

    def add_read(name: str, buffer: KVBuffer) -> torch.Tensor:
        logits, row["attention"][name] = _read(pair, buffer, skills, skills.tail)
        return logits

    sets = {f"first_{k}": [list(c.range)[:k] for c in skills.chunks] for k in REPAIRED if k}
    sets |= {f"random_{k}": [rng.sample(c.range, min(k, len(c))) for c in skills.chunks] for k in RANDOM}
    add("first_0", add_read("alone", alone))
    for name, logits in zip(sets, _repaired(pair, full, alone, skills, list(sets.values())), strict=True):
        add(name, logits)
    if len(skills.chunks) > 1:
        add("together", add_read("together", contexts.together(alone, skills)))
    if deviates:
        row["deviation"] = {"alone": _deviation(full, alone, skills.own)}
        other = contexts.full(layout(pair, [], shift=SHIFT), skills.tail)
        row["deviation"]["null"] = _deviation(full, other, skills.own)
    prefaces: dict[str, Sequence[int]] = {"preface": skills.preface} | ({"stranger": stranger} if stranger else {})
    for name, preface in prefaces.items():
        with taken_back(alone):
            for chunk in skills.chunks:
                contexts.put(alone, skills, chunk, preface)
            add(name, add_read(name, alone))
            if deviates:
                row["deviation"][name] = _deviation(full, alone, skills.own)
    return row


def _repaired(
    pair: Pair, full: KVBuffer, alone: KVBuffer, skills: Skills, sets: Sequence[Sequence[Sequence[int]]]
) -> torch.Tensor:
    """The last row's logits [sets, vocabulary] after some tokens of the skills and the whole question are recomputed.

    Each set is a branch of the skills. The first tokens of the first skill read only the prefix and each other.
    Recomputed, they equal those of the full prefill, so these are added to the context instead.
    """
    first = skills.chunks[0]
    known = list(first.range)[: max(REPAIRED)]
    with branching(pair.engine, alone) as branches:
        beside = branches.beside(rows_from(full, known), known)
        several = []
        for chosen in sets:
            rows = repaired_rows(skills, chosen)
            taken = len(chosen[0]) if chosen[0] == list(first.range)[: len(chosen[0])] else 0
            slots = [slot for slot in rows.slots if slot not in set(known[:taken])]
            absent = (*(slot for slot in rows.slots if slot < skills.last), *beside[taken:])
            several.append(Branch(tuple(skills.ids[slot] for slot in slots), tuple(slots), absent=absent))
        return branches.last(several)


def _read(pair: Pair, buffer: KVBuffer, skills: Skills, start: int) -> tuple[torch.Tensor, dict[str, float]]:
    """Recompute the rows from `start` on. Returns the last row's logits and its attention. The buffer is unchanged."""
    slots = tuple(range(start, len(skills.ids)))
    rows = Rows(tuple(skills.ids[slot] for slot in slots), slots, slots)
    logits, weights = pair.engine.last_row_read(buffer, rows)
    return logits, _attention(weights, skills)


def _choice(logits: torch.Tensor, tokens: dict[str, int]) -> str:
    return max(tokens, key=lambda action: float(logits[tokens[action]]))


def _outcome(pair: Pair, expected: torch.Tensor, logits: torch.Tensor, tokens: dict[str, int]) -> dict[str, Any]:
    choice = _choice(logits, tokens)
    return {
        "agrees": choice == _choice(expected, tokens),
        "right": choice == pair.actions[0],
        "other_skill": choice not in pair.first_tokens,
        "kl": round(float(kl(expected, logits)), 5),
    }


def _attention(weights: Sequence[torch.Tensor], skills: Skills) -> dict[str, float]:
    """The deciding row's attention in the last third of the layers, as shares by what it attends to."""
    late = torch.stack([each.mean(dim=0) for each in weights[2 * len(weights) // 3 :]]).mean(dim=0).cpu().double()
    firsts = [chunk.start for chunk in skills.chunks]
    acts = {slot for each in skills.actions for slot in each}
    own = set(skills.actions[skills.asked])
    sets: dict[str, set[int]] = {
        "prefix": set(range(skills.prefix)),
        "first_tokens": set(firsts),
        "own_actions": own,
        "own_rest": set(skills.own.range) - own - set(firsts),
        "other_actions": acts - own,
        "other_rest": {s for chunk in skills.chunks if chunk != skills.own for s in chunk.range} - acts - set(firsts),
        "question": set(range(skills.tail, len(skills.ids))),
    }
    return {name: round(float(late[sorted(slots)].sum()), 5) for name, slots in sets.items()}


def _deviation(full: KVBuffer, other: KVBuffer, chunk: Span) -> dict[str, Any]:
    """The relative distance of keys and of values, by position in the skill and by layer."""
    found: dict[str, Any] = {}
    for name, inside in distances(full, other, slice(chunk.start, chunk.stop)).items():
        found[name] = {
            "position": dict(_by_position(inside)),
            "first_by_layer": [round(float(each), 5) for each in inside[:, 0]],
            "rest_by_layer": [round(float(each), 5) for each in inside[:, 4:].mean(dim=1)],
        }
    return found


def _by_position(inside: torch.Tensor) -> Iterator[tuple[str, float]]:
    for first, stop in BUCKETS:
        if first < inside.shape[1]:
            yield str(first), round(float(inside[:, first:stop].mean()), 5)


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Means by number of skills, over the policies that a full prefill decides correctly."""
    summary: dict[str, Any] = {}
    for name in ("one", "two"):
        asked = [row for row in rows if name in row]
        right = [row for row in asked if row[name]["right"]]
        summary[name] = {"asked": len(asked), "counted": len(right)}
        for part in ("arms", "attention"):
            summary[name][part] = nested(right, f"{name}.{part}")
    summary["deviation"] = nested(rows, "one.deviation")
    return summary


SEAM = Experiment(
    name="seam",
    version=1,
    title="What differs inside a skill that was compiled alone, what repair mends, and why skills compete",
    measure=measure,
    summarise=summarise,
    scenarios=336,
    seconds=4.7,
    quick=partial(measure, by_itself=True),
)
