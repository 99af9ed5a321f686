"""Do notes say what the field is, or what follows from it? The field and the rules are changed separately and together.

There are four contexts: the field has the old or the new value, and the two rules name their values as written or
exchanged. The right action follows from both. Keys and values of a few tokens of one context are put into another,
whose text is unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.knock_out import bands
from programmable_kv.lab.experiments.pair import Pair, prefilled
from programmable_kv.lab.experiments.summaries import arm, at, mean_by_domain, share
from programmable_kv.lab.experiments.written import TAIL, Part, Text, Written, ruled, written
from programmable_kv.lab.tools.together import Probe, probed

DONORS = {
    "field": "the field changed, the rules held: what is right changes",
    "rules": "the field held, the rules exchanged: what is right changes",
    "both": "both changed: what is right stays",
}
EXCHANGED = ("rules", "both")


def sets(text: Written) -> dict[str, tuple[int, ...]]:
    """The slots that are taken from a donor."""
    rules = text.of(Text.OLD_RULE, Text.NEW_RULE)
    actions = tuple(slot for slot in rules if text.parts[slot] is Part.ACTION)
    first = tuple(slot for slot in actions if text.parts[slot - 1] is not Part.ACTION)
    return {
        "field": tuple(text.field.range),
        "values": tuple(slot for slot in rules if text.parts[slot] is Part.VALUE),
        "actions": actions,
        "first_of_actions": first,
        "rest_of_actions": tuple(slot for slot in actions if slot not in first),
        "tail": text.of(*TAIL),
        "later": text.later,
    }


def exchanged_rules(pair: Pair) -> str:
    """The policy's template with the values of its two rules exchanged. Their actions and all else are unchanged."""
    other = dict(zip(pair.change, reversed(pair.change), strict=True))
    lines = []
    for line in pair.case.scenario.prompt.splitlines(keepends=True):
        value = ruled(line, pair.case)
        if value in other:
            start = line.index(value, line.index(pair.case.gate.field) + len(pair.case.gate.field))
            line = line[:start] + other[value] + line[start + len(value) :]
        lines.append(line)
    return "".join(lines)


def donors(pair: Pair) -> dict[str, KVBuffer]:
    """The contexts to take keys and values from. Those with exchanged rules are left out if tokens would move."""
    prefilled_texts = {name: prefilled(pair.engine, text) for name, text in exchanged_texts(pair).items()}
    return {"field": pair.fresh} | prefilled_texts


def exchanged_texts(pair: Pair) -> dict[str, Written]:
    """Contexts with exchanged rules, if no token moves: `rules` with the old value, `both` with the new one."""
    found, system = {}, exchanged_rules(pair)
    for name, value in zip(EXCHANGED, pair.change, strict=True):
        text = written(pair.model, pair.case, pair.change, pair.case.values(value), system=system)
        if len(text.ids) == len(pair.text.ids) and _same_outside_values(text, pair.text):
            found[name] = text
    return found


def _same_outside_values(text: Written, own: Written) -> bool:
    may = {*own.field.range, *(slot for slot in own.later if own.parts[slot] is Part.VALUE)}
    return all(slot in may or a == b for slot, (a, b) in enumerate(zip(text.ids, own.ids, strict=True)))


def measure(pair: Pair, _: Sequence[Row]) -> Row:
    """The gap and the choice after each set is taken from each donor."""
    chosen = sets(pair.text)
    row: Row = {"actions": list(pair.actions)}
    for name, donor in donors(pair).items():
        logits = probed(pair.engine, pair.old, pair.token, [Probe(slots) for slots in chosen.values()], donor)
        own = probed(pair.engine, donor, pair.token, [Probe()])[0]
        row[name] = {"right": pair.decides(own) == pair.actions[name != "both"]} | {
            key: _outcome(pair, each) for key, each in zip(chosen, logits, strict=True)
        }
    row["depth"] = _by_depth(pair, chosen["actions"])
    row["third"] = _third(pair, chosen["actions"])
    return row


def _outcome(pair: Pair, logits: torch.Tensor) -> dict[str, float | str]:
    """The gap, the choice among all actions, and the probability of the two actions together."""
    tokens = [pair.first_tokens[action] for action in pair.actions]
    mass = float(torch.softmax(logits.cpu().double(), dim=-1)[tokens].sum())
    return {"gap": round(float(pair.gap_in(logits)), 4), "choice": pair.decides(logits), "mass": round(mass, 4)}


def _by_depth(pair: Pair, slots: tuple[int, ...]) -> dict[str, float]:
    """The gap if the actions' notes are the field donor's, in thirds of the layers and from each layer on."""
    layers = bands(len(pair.old))
    which = {name: each for name, each in layers.items() if name != "all"}
    which |= {f"from_{layer}": layers["all"][layer:] for layer in layers["all"]}
    gaps = pair.gaps([Probe(slots, layers=each) for each in which.values()])
    return {name: round(gap, 4) for name, gap in zip(which, gaps, strict=True)}


def _third(pair: Pair, slots: tuple[int, ...]) -> dict[str, bool] | None:
    """Take the actions of every rule from a context with a third value: does the decision follow to a third action?

    None if no third value has as many tokens.
    """
    text, case = pair.text, pair.case
    for value, action in case.gate.actions.items():
        if action in pair.actions:
            continue
        other = written(pair.model, case, pair.change, case.values(value))
        if other.field == text.field and len(other.ids) == len(text.ids):
            donor = prefilled(pair.engine, other)
            more = [slot for slot in text.of(Text.OTHER_RULE) if text.parts[slot] is Part.ACTION]
            logits = probed(pair.engine, pair.old, pair.token, [Probe(tuple(sorted({*slots, *more})))], donor)[0]
            own = probed(pair.engine, donor, pair.token, [Probe()])[0]
            return {"right": pair.decides(own) == action, "followed": pair.decides(logits) == action}
    return None


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """By donor and set: recovery, and the share of decisions for the new action. Only donors that are right count."""
    summary: dict[str, Any] = {}
    for donor in DONORS:
        kept = [row for row in rows if donor in row and row[donor]["right"]]
        part: dict[str, Any] = {"counted": len(kept)}
        for name in [key for key in (kept[0][donor] if kept else {}) if key != "right"]:
            part[name] = arm(kept, at(f"{donor}.{name}.gap")) | {
                "chosen": share(kept, partial(_chosen, donor, name)),
                "mass": mean_by_domain(kept, at(f"{donor}.{name}.mass")),
            }
        summary[donor] = part
    names = dict.fromkeys(name for row in rows for name in row["depth"])
    summary["depth"] = {name: arm(rows, at(f"depth.{name}")) for name in names}
    summary["third"] = share(
        [r for r in rows if r["third"] and r["third"]["right"]], lambda row: row["third"]["followed"]
    )
    return summary


def _chosen(donor: str, name: str, row: Mapping[str, Any]) -> bool:
    """Whether the choice among all actions is the new value's."""
    return bool(row[donor][name]["choice"] == row["actions"][1])


DISSOCIATION = Experiment(
    name="dissociation",
    version=1,
    title="Notes follow what is concluded: field and rules changed one by one, and notes injected",
    measure=measure,
    summarise=summarise,
    seconds=1.6,
)
