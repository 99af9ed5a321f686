"""Which keys and values carry a changed field to the decision: its own, a few later ones, the last ones, which layers'?

Positions are ranked by their roles (`Written.role`) on policies of other domains, and scored here. For comparison:
those that move farthest (which needs the new prefill), and those that do best on the same policy (as was published).
Copied keys and values ("patched") say where the decision is read from; recomputed tokens ("recomputed") say what an
edit achieves.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from programmable_kv.lab.experiments.blast_radius import distances
from programmable_kv.lab.experiments.cases import SEED
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.knock_out import bands
from programmable_kv.lab.experiments.nulls import matched
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.lab.experiments.summaries import Value, arm, at, mean_by_domain
from programmable_kv.lab.experiments.written import RULES, TAIL
from programmable_kv.lab.tools.together import Probe

COUNTS = (1, 2, 4, 8, 16, 32)
RECOMPUTED = (8, 32)
FRACTIONS = (5, 10, 25, 50)
"""Shares of the later tokens in per cent, counted from the last one."""
DRAWS = 4
"""Random sets for each count. Their gaps are averaged."""


def rank(pair: Pair) -> Row:
    """What each role carries: the mean recovery of its tokens, each patched alone."""
    later = pair.text.later
    span = pair.scale.new - pair.scale.old
    found: dict[str, list[float]] = {}
    for slot, gap in zip(later, pair.gaps([Probe((slot,)) for slot in later]), strict=True):
        found.setdefault(pair.text.role(slot), []).append((gap - pair.scale.old) / span)
    return {"roles": {role: round(fmean(each), 5) for role, each in found.items()}}


def ranked(pair: Pair, others: Sequence[Row]) -> list[int]:
    """The later slots, best first, by their roles' recovery on other policies. Within a role, later ones come first."""
    scores: dict[str, list[float]] = {}
    for row in others:
        for role, score in row["roles"].items():
            scores.setdefault(role, []).append(score)
    means = {role: fmean(each) for role, each in scores.items()}
    return sorted(pair.text.later, key=lambda slot: (-means.get(pair.text.role(slot), 0.0), -slot))


def measure(pair: Pair, others: Sequence[Row]) -> Row:
    """The gap after each patch and each recomputation."""
    text = pair.text
    order = ranked(pair, others)
    single = dict(zip(text.later, pair.gaps([Probe((slot,)) for slot in text.later]), strict=True))
    best = sorted(text.later, key=lambda slot: -single[slot])
    chosen = {"field": tuple(text.field.range), "later": text.later, "all": (*text.field.range, *text.later)}
    chosen |= {f"held_out_{k}": tuple(order[:k]) for k in COUNTS} | {f"same_{k}": tuple(best[:k]) for k in COUNTS}
    apart = torch.stack([each.mean(dim=0) for each in distances(pair.old, pair.fresh).values()]).sum(dim=0)
    farthest = sorted(text.later, key=lambda slot: -float(apart[slot]))
    chosen |= {f"moved_{k}": tuple(farthest[:k]) for k in COUNTS}
    chosen |= {f"suffix_{f}": _last(text.later, f) for f in FRACTIONS}
    drawn, strata = _random(pair, {k: order[:k] for k in COUNTS})
    names = [*chosen, *drawn]
    gaps = dict(zip(names, pair.gaps([Probe(tuple(slots)) for slots in (chosen | drawn).values()]), strict=True))
    row: Row = {"later": len(text.later), "strata": strata}
    row["patched"] = {name: gaps[name] for name in chosen} | dict(_averaged(gaps, drawn))
    noised = ("field", "later", *(f"held_out_{k}" for k in RECOMPUTED))
    row["noised"] = dict(zip(noised, pair.gaps([Probe(chosen[n]) for n in noised], noising=True), strict=True))
    row["bands"] = _by_layer(pair)
    # Recomputing the field and all that follows it gives the new context.
    row["recomputed"] = {"all": pair.scale.new} | _each_recomputed(pair, _recomputed(pair, chosen, drawn))
    return {key: _short(value) for key, value in row.items()}


def _last(later: Sequence[int], per_cent: int) -> tuple[int, ...]:
    return tuple(later[len(later) - max(1, round(len(later) * per_cent / 100)) :])


def _random(pair: Pair, chosen: Mapping[int, Sequence[int]]) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Random sets by name; and by count, the number of parts they were drawn from."""
    rng = random.Random(f"{SEED}/locality/{pair.case.number}")
    sets, strata = {}, {}
    for count, slots in chosen.items():
        for draw in range(DRAWS):
            found = matched(slots, pair.text.later, rng)
            if found is not None:
                sets[f"random_{count}/{draw}"], strata[str(count)] = found
    return sets, strata


def _averaged(gaps: Mapping[str, float], drawn: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    for name in dict.fromkeys(each.partition("/")[0] for each in drawn):
        yield name, fmean(gap for each, gap in gaps.items() if each.partition("/")[0] == name)


def _by_layer(pair: Pair) -> dict[str, float]:
    """The gap if all later tokens are patched in single layers, in thirds, and in all layers from one on."""
    layers = tuple(range(len(pair.old)))
    which: dict[str, tuple[int, ...]] = {f"layer_{layer}": (layer,) for layer in layers}
    which |= {name: each for name, each in bands(len(layers)).items() if name != "all"}
    which |= {f"from_{layer}": layers[layer:] for layer in layers[1:]}
    return dict(zip(which, pair.gaps([Probe(pair.text.later, layers=each) for each in which.values()]), strict=True))


def _recomputed(
    pair: Pair, chosen: Mapping[str, tuple[int, ...]], drawn: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The sets to recompute, each with the field. The set of all tokens is left out."""
    own, text = chosen["field"], pair.text
    sets: dict[str, tuple[int, ...]] = {"field": (), "rules": text.of(*RULES)}
    sets |= {"rules_and_tail": text.of(*RULES, *TAIL), "tail": text.of(*TAIL)}
    for k in RECOMPUTED:
        sets[f"held_out_{k}"] = chosen[f"held_out_{k}"]
        if f"random_{k}/0" in drawn:
            sets[f"random_{k}"] = drawn[f"random_{k}/0"]
    sets |= {f"suffix_{f}": chosen[f"suffix_{f}"] for f in FRACTIONS}
    return {name: (*own, *slots) for name, slots in sets.items()}


def _each_recomputed(pair: Pair, sets: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    return dict(zip(sets, pair.each_recomputed(list(sets.values())), strict=True))


def _short(value: Any) -> Any:
    return {k: round(v, 4) for k, v in value.items()} if isinstance(value, dict) else value


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Recovery and flips of every arm, and how often a single layer or a few tokens suffice."""
    summary: dict[str, Any] = {"later_tokens": mean_by_domain(rows, at("later"))}
    for part in ("patched", "recomputed", "bands"):
        names = dict.fromkeys(name for row in rows for name in row[part])
        summary[part] = {name: arm(rows, at(f"{part}.{name}")) for name in names}
    summary["lost"] = {
        name: mean_by_domain(rows, _lost(name)) for name in dict.fromkeys(n for row in rows for n in row["noised"])
    }
    summary["best_layer"] = mean_by_domain(rows, _best_layer)
    summary["strata_of_32"] = mean_by_domain(rows, at("strata.32"))
    return summary


def _lost(name: str) -> Value:
    """What the new context's decision loses if the old one's rows replace its own: 1 is all of it."""

    def lost(row: Row) -> float | None:
        gap = at(f"noised.{name}")(row)
        return None if gap is None or not row["valid"] else (row["new_gap"] - gap) / (row["new_gap"] - row["old_gap"])

    return lost


def _best_layer(row: Row) -> float | None:
    """The recovery of a policy's best single layer, chosen on the policy itself: an upper bound."""
    gaps = [gap for name, gap in row["bands"].items() if name.startswith("layer_")]
    return (max(gaps) - row["old_gap"]) / (row["new_gap"] - row["old_gap"]) if row["valid"] else None


LOCALITY = Experiment(
    name="locality",
    version=1,
    title="Which keys and values carry a changed field to the decision",
    measure=measure,
    summarise=summarise,
    rank=rank,
    scenarios=336,
    seconds=1.9,
)
