"""Are notes taken in other texts? Rules with a lookup, running prose and retrieved passages, against a list of rules.

In a fourth text the question itself brings the rule, so that nothing can be concluded before it is asked. For each
text: what the field alone carries, what the later text carries, and what really recomputing a part brings back. Two
parts are chosen as CacheBlend does, at the published share. `blend_15`: the tokens whose keys and values differ most in
the second layer, where a full prefill would first show it, with the question, which that method always computes.
`share_15`: the tokens that differ most over all layers, without the question.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from programmable_kv.lab.experiments.blast_radius import distances
from programmable_kv.lab.experiments.boundary import Setting, in_setting
from programmable_kv.lab.experiments.cases import SEED, Case
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.named_pair import NamedPair, known_of, named_pair
from programmable_kv.lab.experiments.nulls import matched
from programmable_kv.lab.experiments.pair import Pair, Texts
from programmable_kv.lab.experiments.prevention import tail_of
from programmable_kv.lab.experiments.summaries import arm, at, mean_by_domain, share
from programmable_kv.scenarios.everyday import OTHERS

SHARE = 0.15
"""Share of the context's tokens to recompute, including the field's: the published share."""
LEVELS = ("north", "south", "east", "west")
"""Groups of a lookup. No policy uses these words."""
ANSWER = "Answer with the action only."
LIST = "list"
"""The policy unchanged: a list of rules."""


def settings(case: Case, change: tuple[str, str]) -> list[Setting]:
    """The same decision in other texts, with only the two values' rules."""
    rng = random.Random(f"{SEED}/families/{case.number}")
    field, actions = case.gate.field, {value: case.gate.actions[value] for value in change}
    values = rng.sample(change, 2)
    others = rng.sample(OTHERS, 4)
    asked = f"What is the action for the current {field}?"
    groups = dict(zip(values, rng.sample(LEVELS, 2), strict=True))
    lookups = [f"A {field} of {value} belongs to the {groups[value]} group." for value in values]
    by_group = [f"For the {groups[value]} group, the action is {actions[value]}." for value in values]
    hops = "\n".join(f"- {line}" for line in (others[0], *lookups, others[1], *by_group[::-1], others[2]))
    one, two = values
    prose = (
        f"{others[0]} What is done depends on the {field}. When the {field} turns out to be {one}, people here have always "
        f"chosen {actions[one]}, and that has served them well. {others[1]} With {two} it is another matter: in that case they "
        f"settle on {actions[two]}, and nobody has ever complained. {others[2]}"
    )
    fact = f"Passage 1, from the record:\nThe case was opened on Monday. Its {field} is {{{field}}}. {others[0]}"
    manual = (
        f"Passage 2, from the manual:\n{others[1]} If the {field} is {one}, the action is {actions[one]}. {others[2]} "
        f"If the {field} is {two}, the action is {actions[two]}."
    )
    rule = f"If the {field} is {one}, the action is {actions[one]}; if it is {two}, the action is {actions[two]}."
    head = "You are a support agent."
    return [
        Setting("two_hops", f"{head}\n\n{field}: {{{field}}}\n\nRules:\n{hops}\n\n{ANSWER}", asked),
        Setting("prose", f"{head} At the moment the {field} is {{{field}}}.\n\n{prose}\n\n{ANSWER}", asked),
        Setting("passages", f"{head}\n\n{fact}\n\n{manual}\n\n{ANSWER}", asked),
        Setting("rule_in_question", f"{head}\n\n{fact}\n\n{ANSWER}", f"{rule} {asked}"),
    ]


def measure(pair: Pair, _: Sequence[Row], *, texts: Sequence[str] | None = None) -> Row:
    """In each text (or some of them), the gap after patching sets of tokens, and after recomputing some.

    Rows that several arms have in common are computed once, and the rows of all texts together.
    """
    shared = known_of(pair)
    found: dict[str, NamedPair] = {}
    patched: dict[str, dict[str, int]] = {}
    for name, each in written_as(pair).items():
        if texts is None or name in texts:
            found[name] = named_pair(each, shared)
            patched[name] = {of: found[name].patched(slots) for of, slots in patches(each).items()}
    shared.compute()
    recomputed = {
        name: {of: each.recomputed(slots) for of, slots in recomputes(each).items()} for name, each in found.items()
    }
    shared.compute()
    return {"texts": {name: _carried(each, patched[name], recomputed[name]) for name, each in found.items()}}


def written_as(pair: Pair) -> dict[str, Texts]:
    """The same change of the same decision, in each text in which both values have as many tokens."""
    two = {value: pair.case.gate.actions[value] for value in pair.change}
    gate = replace(pair.case.gate, actions=two)
    case = replace(pair.case, gate=gate, scenario=replace(pair.case.scenario, gates=(gate,)))
    found = {each.name: in_setting(replace(pair, case=case), each) for each in settings(pair.case, pair.change)}
    return {LIST: pair} | {name: each for name, each in found.items() if isinstance(each, Texts)}


def patches(texts: Texts) -> dict[str, tuple[int, ...]]:
    """The sets that only the last row reads from the new context."""
    text = texts.text
    later = text.later
    return {
        "field": tuple(text.field.range),
        "later": later,
        "last_half": later[len(later) // 2 :],
        "tail": tail_of(text),
    }


def computed(texts: Texts) -> int:
    """The number of tokens besides the field that are recomputed for the published share."""
    return round(SHARE * len(texts.text.ids)) - len(texts.text.field)


def recomputes(pair: NamedPair) -> dict[str, tuple[int, ...]]:
    """The sets to recompute, each with the field. Requires that the contexts' rows are computed."""
    text, tail, later = pair.texts.text, tail_of(pair.texts.text), pair.texts.text.later
    field, count = tuple(text.field.range), computed(pair.texts)
    apart = distances(*(pair.shared.buffer(names[:-1]) for names in (pair.old, pair.fresh)))
    farthest = deviating(apart, count, later)
    blended = deviating(apart, count, [slot for slot in later if slot < tail[0]], layers=(1,))
    found = {
        "asked_again": (*field, *tail),
        "share_15": (*field, *farthest),
        "blend_15": (*field, *blended, *tail),
    }
    drawn = matched(farthest, later, random.Random(f"{SEED}/families/random/{pair.texts.case.number}"))
    if drawn is not None:
        found["random_15"] = (*field, *drawn[0])
    return found


def _carried(pair: NamedPair, patched: Mapping[str, int], recomputed: Mapping[str, int]) -> dict[str, Any]:
    """The gaps of both contexts, after patches, and after real recomputes, from the rows that decide."""
    text, scale = pair.texts.text, pair.scale
    return {
        "old_gap": round(scale.old, 4),
        "new_gap": round(scale.new, 4),
        "valid": scale.valid,
        "later": len(text.later),
        "share": round((computed(pair.texts) + len(text.field)) / len(text.ids), 4),
        "patched": {name: round(pair.gap(each), 4) for name, each in patched.items()},
        "recomputed": {name: round(pair.gap(each), 4) for name, each in recomputed.items()},
    }


def deviating(
    apart: Mapping[str, torch.Tensor], count: int, among: Sequence[int], layers: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The `count` of these slots whose keys and values differ most (`distances`), averaged over layers (None: all)."""
    moved = torch.stack([(each if layers is None else each[list(layers)]).mean(dim=0) for each in apart.values()])
    far = moved.sum(dim=0)
    return tuple(sorted(sorted(among, key=lambda slot: -float(far[slot]))[: max(0, count)]))


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """By text: how often both values are decided correctly; among these, what each set recovers and flips."""
    summary: dict[str, Any] = {"texts": {}}
    for name in dict.fromkeys(name for row in rows for name in row["texts"]):
        found = [_flat(row, name) for row in rows if name in row["texts"]]
        right = [row for row in found if row["valid"]]
        part: dict[str, Any] = {"right": share(found, lambda row: bool(row["valid"])), "counted": len(right)}
        part["later"] = mean_by_domain(right, at("later"))["value"]
        part["share"] = mean_by_domain(right, at("share"))["value"]
        for kind in ("patched", "recomputed"):
            arms = dict.fromkeys(each for row in found for each in row[kind])
            part[kind] = {each: arm(right, at(f"{kind}.{each}")) for each in arms}
        summary["texts"][name] = part
    return summary


def _flat(row: Row, name: str) -> dict[str, Any]:
    text: Mapping[str, Any] = row["texts"][name]
    return {"domain": row["domain"], **text}


FAMILIES = Experiment(
    name="families",
    version=1,
    title="Whether notes are taken in other texts: lookups, prose, retrieved passages",
    measure=measure,
    summarise=summarise,
    scenarios=336,
    seconds=2.4,
    quick=partial(measure, texts=(LIST, "prose")),
)
