"""What is different in a skill that was compiled alone? By position and layer; what repair mends; why two skills compete.

One policy, and the same beside another one; each compiled alone, behind a preface (of lines about other things, or of a third
policy), or both together, and put behind a prefix.
Compared with a prefill of the same tokens in which everything reads everything. The null of a difference: the same skill in the
context, behind other lines.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
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
    Skills,
    beside,
    compiled,
    layout,
    prefilled_as,
    read_as,
    repaired_rows,
)
from programmable_kv.lab.experiments.summaries import nested
from programmable_kv.lab.tools.hooks import taken_back
from programmable_kv.lab.tools.kv import patched
from programmable_kv.lab.tools.readouts import kl

REPAIRED = (0, 1, 2, 4, 8, 16, 32)
RANDOM = (4, 32)
BUCKETS = ((0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 1 << 20))
"""positions in the skill"""
SHIFT = 11
"""lines by which the other prefix of the null is ahead"""


def measure(pair: Pair, _: Sequence[Row], *, by_itself: bool = False) -> Row:
    """The skill by itself, and beside another one unless only the former is asked for."""
    row: Row = {"one": compared(pair, layout(pair, []), dict(pair.first_tokens), deviates=True)}
    if by_itself:
        return row
    found, more = beside(pair, 1), beside(pair, 2)
    if found is not None and more is not None:
        others, tokens = found
        row["two"] = compared(pair, layout(pair, others), tokens, stranger=more[0][1].ids)
    return row


def compared(
    pair: Pair, skills: Skills, tokens: dict[str, int], *, deviates: bool = False, stranger: Sequence[int] = ()
) -> Row:
    """Every way to compile and to repair, beside a full prefill; with `deviates`, how far keys and values are off inside.

    `stranger`: tokens of a third policy, as another preface.
    """
    engine = pair.engine
    full = prefilled_as(engine, skills, None)
    alone = read_as(engine, full, skills, skills.alone())
    expected = _logits(pair, full, skills, ())
    rng = random.Random(f"{OTHERS_SEED}/random/{pair.case.number}")
    row: Row = {"right": _choice(expected, tokens) == pair.actions[0], "arms": {}, "attention": {}}
    row["attention"]["full"] = _attention(pair, full, skills)
    sets: dict[str, list[list[int]]] = {f"first_{k}": [list(c.range)[:k] for c in skills.chunks] for k in REPAIRED}
    sets |= {f"random_{k}": [rng.sample(c.range, min(k, len(c))) for c in skills.chunks] for k in RANDOM}
    for name, chosen in sets.items():
        row["arms"][name] = _outcome(pair, expected, _logits(pair, alone, skills, chosen), tokens)
    row["attention"]["alone"] = _attention(pair, alone, skills, skills.tail)
    if len(skills.chunks) > 1:
        together = read_as(engine, full, skills, skills.together())
        row["arms"]["together"] = _outcome(pair, expected, _logits(pair, together, skills, ()), tokens)
        row["attention"]["together"] = _attention(pair, together, skills, skills.tail)
    if deviates:
        row["deviation"] = {"alone": _deviation(full, alone, skills.own)}
        other = layout(pair, [], shift=SHIFT)
        row["deviation"]["null"] = _deviation(full, prefilled_as(engine, other, None), skills.own)
    prefaces: dict[str, Sequence[int]] = {"preface": skills.preface} | ({"stranger": stranger} if stranger else {})
    for name, preface in prefaces.items():
        with ExitStack() as stack:
            for chunk in skills.chunks:
                source, stands = compiled(engine, skills, chunk, preface)
                stack.enter_context(patched(alone, source, list(chunk.range), from_slots=list(stands.range)))
            row["arms"][name] = _outcome(pair, expected, _logits(pair, alone, skills, ()), tokens)
            row["attention"][name] = _attention(pair, alone, skills, skills.tail)
            if deviates:
                row["deviation"][name] = _deviation(full, alone, skills.own)
    return row


def _logits(pair: Pair, buffer: KVBuffer, skills: Skills, chosen: Sequence[Sequence[int]]) -> torch.Tensor:
    """The last row's logits, some tokens of the skills and the whole question computed again. The buffer is unchanged."""
    with taken_back(buffer):
        return pair.engine.compute(buffer, repaired_rows(skills, chosen))[-1]


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


def _attention(pair: Pair, buffer: KVBuffer, skills: Skills, start: int | None = None) -> dict[str, float]:
    """The share of the deciding row's attention, in the last third of the layers, by what it attends to.

    With `start` the rows from there on are computed first, on what the buffer holds now.
    """
    with taken_back(buffer):
        if start is not None:
            slots = tuple(range(start, skills.last))
            pair.engine.compute(buffer, Rows(tuple(skills.ids[s] for s in slots), slots, slots), logits=0)
        row = Rows((skills.ids[-1],), (skills.last,), (skills.last,))
        weights = pair.engine.attention_weights(buffer, row)
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
    """By position in the skill, and by layer, the relative distance of keys and of values."""
    found: dict[str, Any] = {}
    for name, apart in distances(full, other).items():
        inside = apart[:, chunk.start : chunk.stop]
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
    """Means over policies, by number of skills, of those that a full prefill decides correctly."""
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
    seconds=6.3,
    quick=partial(measure, by_itself=True),
)
