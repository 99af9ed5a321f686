"""How far do keys and values of later tokens move when a field changes? By kind of text, layer and distance.

Two comparisons: a field in the same context that no rule mentions, and the movement that another attention kernel or
dtype causes when nothing changes. Before the field nothing may move at all.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.engine import Engine
from programmable_kv.lab.experiments.cases import SEED
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.pair import Pair, prefilled
from programmable_kv.lab.experiments.summaries import Value, at, mean_by_domain
from programmable_kv.lab.experiments.written import LATER, Part, Text, written
from programmable_kv.lab.statistics.null_band import null_band
from programmable_kv.models.load import Model

NULLS = 16
"""Number of cases that are also prefilled under another kernel and dtype."""
DISTANCES = ((0, 8), (8, 32), (32, 64), (64, 128), (128, 1 << 20))
THRESHOLD = 0.1
"""Relative distance above which a position counts as deviating, as published."""
VARIANTS = ("eager", "bfloat16")


def distances(first: KVBuffer, second: KVBuffer, slots: slice = slice(None)) -> dict[str, torch.Tensor]:
    """For `keys` and `values`, [L, S]: the distance of a slot's rows, relative to the size of the first buffer's."""
    found = {}
    for name, read in (("keys", KVBuffer.keys), ("values", KVBuffer.values)):
        rows = []
        for layer in range(len(first)):
            here, there = (read(buffer, layer)[:, :, slots].cpu().double() for buffer in (first, second))
            off, size = ((t * t).sum(dim=(0, 1, 3)) for t in (there - here, here))
            rows.append((off / size.clamp_min(torch.finfo(torch.float64).tiny)).sqrt())
        found[name] = torch.stack(rows)
    return found


def measure(pair: Pair, _: Sequence[Row]) -> Row:
    """The mean relative distance of keys and values, by kind of text, layer and distance."""
    apart = distances(pair.old, pair.fresh)
    text = pair.text
    row: Row = {"before_largest": max(float(each[:, : text.field.start].max()) for each in apart.values())}
    row |= {name: _described(each, pair) for name, each in apart.items()}
    both = (apart["keys"] + apart["values"]) / 2
    row["radius"] = float((both[:, list(text.later)].mean(dim=0) > THRESHOLD).float().mean())
    other = _other_field(pair)
    if other is not None:
        buffer, start = other
        moved = distances(pair.old, buffer)
        later = [slot for slot in text.later if slot >= start]
        row["unread"] = {
            "keys": _mean(moved["keys"], later), "values": _mean(moved["values"], later),
            "radius": float((((moved["keys"] + moved["values"]) / 2)[:, later].mean(dim=0) > THRESHOLD).float().mean()),
            "gated_keys": _mean(apart["keys"], later), "gated_values": _mean(apart["values"], later),
        }  # fmt: skip
    if pair.case.number < NULLS:
        row["null"] = dict(_nulls(pair))
    return row


def _described(apart: torch.Tensor, pair: Pair) -> dict[str, Any]:
    text = pair.text
    kinds, rules = {kind: text.of(kind) for kind in LATER}, text.of(Text.OLD_RULE, Text.NEW_RULE)
    within = {f"{a}_{b}": [s for s in text.later if a <= s - text.field.stop < b] for a, b in DISTANCES}
    return {
        "field": _mean(apart, text.field.range),
        "later": _mean(apart, text.later),
        "delimiters": _mean(apart, text.delimiters),
        "words": _mean(apart, [s for s in text.later if s not in text.delimiters]),
        "kinds": {str(kind): _mean(apart, slots) for kind, slots in kinds.items()},
        "parts": {str(part): _mean(apart, [s for s in rules if text.parts[s] is part]) for part in Part if part},
        "distance": {name.replace(str(1 << 20), "on"): _mean(apart, slots) for name, slots in within.items()},
        "layers": [round(float(each), 5) for each in apart[:, list(text.later)].mean(dim=1)],
    }


def _mean(apart: torch.Tensor, slots: Sequence[int]) -> float | None:
    return round(float(apart[:, list(slots)].mean()), 6) if len(slots) else None


def _other_field(pair: Pair) -> tuple[KVBuffer, int] | None:
    """The old context with another value of a field that no rule mentions, and the slot after it; None if none fits."""
    rng = random.Random(f"{SEED}/unread/{pair.case.number}")
    values = pair.case.values(pair.change[0])
    for name, others in sorted(pair.case.scenario.irrelevant.items()):
        for value in rng.sample(list(others), len(others)):
            text = written(pair.model, pair.case, pair.change, {**values, name: value})
            differing = [slot for slot, (a, b) in enumerate(zip(text.ids, pair.text.ids, strict=False)) if a != b]
            if len(text.ids) == len(pair.text.ids) and differing:
                return prefilled(pair.engine, text), max(max(differing) + 1, pair.text.field.stop)
    return None


def _nulls(pair: Pair) -> Iterator[tuple[str, dict[str, float | None]]]:
    """Yield, by variant, the distance between the old context and itself under another kernel or dtype."""
    for name in VARIANTS:
        apart = distances(pair.old, prefilled(_variant(pair.model, name), pair.text))
        later = pair.text.later
        yield name, {key: _mean(each, later) for key, each in apart.items()}


@lru_cache(maxsize=len(VARIANTS))
def _variant(model: Model, name: str) -> Engine:
    copied = copy.deepcopy(model.engine.model)
    if name == "bfloat16":
        return Engine(copied.to(torch.bfloat16))
    copied.set_attn_implementation(name)
    return Engine(copied)


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Means over policies, with intervals that resample domains. The null bands are full ranges."""
    summary: dict[str, Any] = {
        "before_largest": max((row["before_largest"] for row in rows), default=0.0),
        "radius": mean_by_domain(rows, at("radius")),
        "unread": {
            name: mean_by_domain(rows, at(f"unread.{name}"))
            for name in ("radius", "keys", "values", "gated_keys", "gated_values")
        },
    }
    for name in ("keys", "values"):
        part: dict[str, Any] = {
            key: mean_by_domain(rows, at(f"{name}.{key}")) for key in ("field", "later", "delimiters", "words")
        }
        for group in ("kinds", "parts", "distance"):
            keys = dict.fromkeys(key for row in rows for key in row[name][group])
            part[group] = {key: mean_by_domain(rows, at(f"{name}.{group}.{key}")) for key in keys}
        layers = [row[name]["layers"] for row in rows]
        part["layers"] = {str(i): mean_by_domain(rows, _layer(name, i)) for i in range(len(layers[0]) if layers else 0)}
        part["null"] = _bands(rows, name)
        summary[name] = part
    return summary


def _layer(name: str, layer: int) -> Value:
    return lambda row: float(row[name]["layers"][layer])


def _bands(rows: Sequence[Row], name: str) -> dict[str, Any]:
    measured = {v: [row["null"][v][name] for row in rows if "null" in row] for v in VARIANTS}
    bands = {v: null_band({v: values}) for v, values in measured.items() if values}
    return {v: {"low": band.low, "high": band.high, "n": band.n} for v, band in bands.items()}


BLAST_RADIUS = Experiment(
    name="blast-radius",
    version=1,
    title="How far keys and values of later tokens move when a field changes",
    measure=measure,
    summarise=summarise,
    seconds=0.8,
)
