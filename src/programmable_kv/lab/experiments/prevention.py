"""What if no token could take notes? Which tokens have to read the field for a right decision and a working edit?

The context is prefilled under a mask. Turns read everything. Of the text, only chosen tokens, the *readers*, read the
field and each other; *carriers* read the readers but not the field; all other text reads only text. So nothing that the
field says can reach any other place. An edit then recomputes the field, the readers, the carriers and the question. It
equals a prefill of the new text under the same mask. Rows that several arms have in common are computed once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.masks import PartReads
from programmable_kv.engine import Rows
from programmable_kv.lab.experiments.cases import SEED
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.named_pair import known_of
from programmable_kv.lab.experiments.nulls import matched
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.lab.experiments.summaries import Value, at, mean_by_domain
from programmable_kv.lab.experiments.written import RULES, TAIL, Part, Written
from programmable_kv.lab.tools.hooks import taken_back
from programmable_kv.lab.tools.shared_rows import NOTHING, SharedRows

TEXT, FIELD, READER, CARRIER, TURN = range(5)
READS = (
    (TEXT,),
    (TEXT, FIELD),
    (TEXT, FIELD, READER, CARRIER),
    (TEXT, READER, CARRIER),
    (TEXT, FIELD, READER, CARRIER, TURN),
)
"""For each kind of token, the kinds that it reads."""
PARTS = {
    "names": (Part.NAME,),
    "values": (Part.VALUE,),
    "links": (Part.LINK,),
    "actions": (Part.ACTION,),
    "line_ends": (Part.END,),
    "values_and_actions": (Part.VALUE, Part.ACTION),
    "values_to_actions": (Part.VALUE, Part.LINK, Part.ACTION),
    "links_and_actions": (Part.LINK, Part.ACTION),
    "all_but_actions": (Part.NAME, Part.VALUE, Part.LINK, Part.END),
}
"""By arm, the parts of the field's rules that are readers."""
FEW = ("nobody", "readers", "values_carried_on")
CARRIED = {"values_carried_on": (Part.LINK, Part.ACTION)}
"""By arm, the parts that are carriers. In these arms the values are readers."""


def tail_of(text: Written) -> tuple[int, ...]:
    """The slots of the turn: everything after the policy, except the row that decides."""
    return tuple(range(min(text.of(*TAIL)), text.last))


def readers(text: Written) -> dict[str, tuple[int, ...]]:
    """By arm, the tokens of the policy that may read the field."""
    rules = text.of(*RULES)
    found = {name: tuple(slot for slot in rules if text.parts[slot] in parts) for name, parts in PARTS.items()}
    found |= dict.fromkeys(CARRIED, found["values"])
    return {"nobody": (), "readers": tuple(sorted({*_rest_of_line(text), *rules})), **found}


def carriers(text: Written, arm: str) -> tuple[int, ...]:
    """The tokens of the policy that read an arm's readers but not the field."""
    return tuple(slot for slot in text.of(*RULES) if text.parts[slot] in CARRIED.get(arm, ()))


def _rest_of_line(text: Written) -> Iterator[int]:
    for slot in range(text.field.stop, min(text.of(*TAIL))):
        yield slot
        if "\n" in text.tokens[slot]:
            return


def reads(text: Written, chosen: Sequence[int], carrying: Sequence[int] = ()) -> PartReads:
    """Which parts read which, if the chosen tokens are readers and others carriers."""
    part_of = torch.full((len(text.ids),), TEXT)
    part_of[text.field.start : text.field.stop] = FIELD
    part_of[list(chosen)] = READER
    part_of[list(carrying)] = CARRIER
    part_of[min(text.of(*TAIL)) :] = TURN
    table = torch.zeros(len(READS), len(READS), dtype=torch.bool)
    for kind, others in enumerate(READS):
        table[kind, list(others)] = True
    return PartReads(part_of, table)


def prefilled_under(pair: Pair, text: Written, rule: PartReads) -> KVBuffer:
    """A buffer with all tokens of a text but the last. Each row has read only what it may."""
    buffer = pair.engine.new_buffer(len(text.ids))
    compute_from(pair, buffer, text, 0, rule)
    return buffer


def compute_from(pair: Pair, buffer: KVBuffer, text: Written, start: int, rule: PartReads) -> None:
    """Compute all rows from a slot on except the last. The rows before it are the same under every arm's rule."""
    slots = tuple(range(start, text.last))
    pair.engine.compute(buffer, Rows(text.ids[start:-1], slots, slots), logits=0, reads=rule)


def decided(
    pair: Pair, buffer: KVBuffer, text: Written, slots: Sequence[int], rule: PartReads | None = None
) -> dict[str, Any]:
    """The decision after these slots are recomputed with a text's tokens. The buffer is unchanged."""
    with taken_back(buffer):
        chosen = (*sorted(slots), text.last)
        rows = Rows(tuple(text.ids[slot] for slot in chosen), chosen, chosen)
        logits = pair.engine.compute(buffer, rows, reads=rule)[-1]
    return {"gap": round(float(pair.gap_in(logits)), 4), "choice": pair.decides(logits)}


def measure(pair: Pair, _: Sequence[Row], *, few: bool = False) -> Row:
    """By arm, the decision under the old value, after an edit, and after an edit that leaves the readers stale.

    `few`: only the arms of `FEW`. `edit_from_prefill` compares one edit with a prefill that shares no row with it.
    """
    text, new, tail = pair.text, pair.new_text, tail_of(pair.text)
    field = tuple(text.field.range)
    arms = readers(text)
    rng = random.Random(f"{SEED}/prevention/{pair.case.number}")
    policy = [slot for slot in text.later if slot < tail[0]]
    if few:
        arms = {name: arms[name] for name in FEW}
    for name in ("readers", "actions") if not few else ():
        drawn = matched([slot for slot in arms[name] if slot in set(policy)], policy, rng)
        if drawn is not None:
            arms[f"random_as_{name}"] = drawn[0]
    row: Row = {"options": len(pair.first_tokens), "right": list(pair.actions)}
    shared = known_of(pair)
    asked = {name: arm(shared, pair, chosen, carriers(text, name)) for name, chosen in arms.items()}
    for name in ("nobody", "readers"):
        asked[name]["stale_readers"] = named(
            shared, new, reads(text, arms[name]), edit_of(asked[name]["old"], (*field, *tail))
        )
    everything = reads(text, text.later)
    old = named(shared, text, everything)
    asked["causal"] = {
        "old": old,
        "edited": named(shared, new, everything),
        "stale_readers": named(shared, new, everything, edit_of(old, (*field, *tail))),
        "readers_again": named(shared, new, everything, edit_of(old, (*field, *arms["readers"], *tail))),
    }
    for each in asked.values():
        for names in each.values():
            shared.logits(names[-1])
    shared.compute()
    tokens = {**{name: len(chosen) for name, chosen in arms.items()}, "causal": len(text.later)}
    row["arms"] = {
        name: {"tokens": tokens[name], **{ask: _decision(pair, shared, names[-1]) for ask, names in each.items()}}
        for name, each in asked.items()
    }
    rule = reads(text, arms["readers"])
    again = decided(pair, prefilled_under(pair, new, rule), new, (), rule)
    row["edit_from_prefill"] = abs(round(again["gap"] - row["arms"]["readers"]["edited"]["gap"], 4))
    return row


def arm(shared: SharedRows, pair: Pair, chosen: Sequence[int], carrying: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The rows of a text if the given tokens are readers and carriers: under the old value, and after an edit."""
    text, new = pair.text, pair.new_text
    rule = reads(text, chosen, carrying)
    field, tail = tuple(text.field.range), tail_of(text)
    old = named(shared, text, rule)
    return {
        "old": old,
        "edited": named(shared, new, rule, edit_of(old, (*field, *chosen, *carrying, *tail))),
    }


def edit_of(names: Sequence[int], slots: Sequence[int]) -> dict[int, int]:
    """The rows that an edit keeps, by slot, if it recomputes the rows of these slots and the last one."""
    again = {*slots, len(names) - 1}
    return {slot: name for slot, name in enumerate(names) if slot not in again}


def named(
    shared: SharedRows, text: Written, rule: PartReads, stays: Mapping[int, int] | None = None
) -> tuple[int, ...]:
    """The name of each slot's row in a text, if each row reads what it may. Rows in `stays` are kept."""
    kinds = rule.part_of.tolist()
    readers_of = [rule.reads[:, kind].nonzero().flatten().tolist() for kind in range(len(rule.reads))]
    seen = [NOTHING] * len(rule.reads)
    """By kind, what its next row sees."""
    names = []
    for slot, (token, kind) in enumerate(zip(text.ids, kinds, strict=True)):
        kept = None if stays is None else stays.get(slot)
        name = shared.name(token, slot, seen[kind]) if kept is None else kept
        for reader in readers_of[kind]:
            seen[reader] = shared.longer(seen[reader], name)
        names.append(name)
    return tuple(names)


def _decision(pair: Pair, shared: SharedRows, name: int) -> dict[str, Any]:
    logits = shared.logits(name)
    assert logits is not None, "it was asked for before the rows were computed"
    return {"gap": round(float(pair.gap_in(logits)), 4), "choice": pair.decides(logits)}


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """By arm: how often the decision is right, compared with plain causal reading, and how far the field moves it."""
    names = dict.fromkeys(["causal", *(name for row in rows for name in row["arms"])])
    summary: dict[str, Any] = {
        "guess": mean_by_domain(rows, lambda row: 1 / row["options"]),
        "edit_from_prefill": max((row["edit_from_prefill"] for row in rows), default=0.0),
        "arms": {},
    }
    for name in names:
        part: dict[str, Any] = {
            "tokens": mean_by_domain(rows, at(f"arms.{name}.tokens"))["value"],
            "right": mean_by_domain(rows, _right(name, "old", "edited")),
            "lost": mean_by_domain(rows, _lost(name)),
            "span": mean_by_domain(rows, _span(name)),
        }
        for ask in ("old", "edited", "stale_readers", "readers_again"):
            if any(ask in row["arms"].get(name, {}) for row in rows):
                part[ask] = {"right": mean_by_domain(rows, _right(name, ask))}
        summary["arms"][name] = part
    return summary


def _right(name: str, *asked: str) -> Value:
    """The share of an arm's decisions that are right: under the old value its action, else the new value's."""

    def right(row: Row) -> float | None:
        found = row["arms"].get(name)
        if found is None or any(ask not in found for ask in asked):
            return None
        is_right = [bool(found[ask]["choice"] == row["right"][ask != "old"]) for ask in asked]
        return is_right[0] if len(is_right) == 1 else fmean(is_right)

    return right


def _lost(name: str) -> Value:
    """The share of right decisions lost compared with plain causal reading, on one policy."""

    def lost(row: Row) -> float | None:
        here, plain = (_right(each, "old", "edited")(row) for each in (name, "causal"))
        return None if here is None or plain is None else plain - here

    return lost


def _span(name: str) -> Value:
    """The share of the gap's span by which the field still moves it: 1 as under plain causal reading, 0 not at all."""

    def span(row: Row) -> float | None:
        found = row["arms"].get(name)
        if found is None:
            return None
        return float(found["edited"]["gap"] - found["old"]["gap"]) / float(row["new_gap"] - row["old_gap"])

    return span


PREVENTION = Experiment(
    name="prevention",
    version=1,
    title="Which tokens have to read a field for the decision to be right, and for an edit to work",
    measure=measure,
    summarise=summarise,
    scenarios=336,
    seconds=3.4,
    quick=partial(measure, few=True),
)
