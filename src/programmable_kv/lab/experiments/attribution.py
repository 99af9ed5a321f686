"""Does one forward and one backward rank tokens as patching each of them does?

Exact: the deciding row is computed once for each later token, with that token's keys and values from the new context.
Estimated: first-order attribution in three variants (`lab.tools.attribution`), from one row and its gradients. For
comparison: two scores that need no gradient, how far a token moves and how much attention it gets, and the estimates in
random order.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any, TypeVar

import torch

from programmable_kv.engine import Rows
from programmable_kv.lab.experiments.blast_radius import distances
from programmable_kv.lab.experiments.cases import SEED
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.lab.experiments.summaries import arm, at, mean_by_domain, rounded
from programmable_kv.lab.experiments.written import RULES, Part
from programmable_kv.lab.statistics.intervals import cluster_interval
from programmable_kv.lab.statistics.ranks import overlap, spearman
from programmable_kv.lab.tools.attribution import attribute
from programmable_kv.lab.tools.together import Probe

Found = TypeVar("Found")

PLACES = 96
"""(layer, KV head, token) places whose exact effect is computed: this many in rules' actions, and as many elsewhere."""
TOP = 8
FELT = 0.01
"""Nats. A token with a smaller exact effect does nothing, and its rank means nothing."""
VARIANTS = {
    "attributed": "the softmax computed anew, all else to first order (AtP*)",
    "linear": "plain gradients of keys and values",
    "dropped": "AtP* with gradients dropped at each layer in turn; without sign",
}
BACKWARD = 2
"""A backward counts as this many forwards."""


def measure(pair: Pair, _: Sequence[Row], *, dropping: bool = True) -> Row:
    """Exact and estimated effects of tokens and single places, and how alike they rank. `dropping`: `dropped` too."""
    later = list(pair.text.later)
    rng = random.Random(f"{SEED}/attribution/{pair.case.number}")
    rows = Rows((pair.token,), (pair.text.last,), (pair.text.last,))
    exact, slowly = _timed(lambda: pair.gaps([Probe((slot,)) for slot in later]))
    plain, quickly = _timed(lambda: attribute(pair.engine, pair.old, pair.fresh, rows, pair.gap_in))
    places = {"attributed": plain.rows, "linear": plain.linear}
    seconds = {"tokens": slowly, "attributed": quickly}
    if dropping:
        dropped, seconds["dropped"] = _timed(
            lambda: attribute(pair.engine, pair.old, pair.fresh, rows, pair.gap_in, drop=True)
        )
        places["dropped"] = dropped.rows
    tokens = {name: each.sum(dim=(0, 1))[later].tolist() for name, each in places.items()}
    effects = [gap - pair.scale.old for gap in exact]
    shuffled = rng.sample(tokens["attributed"], len(later))
    others = {"shuffled": shuffled, "moved": _moved(pair, later), "attention": _attended(pair, rows, later)}
    chosen = _places(pair, rng)
    single = [gap - pair.scale.old for gap in pair.gaps([Probe((s,), layers=(i,), heads=(h,)) for i, h, s in chosen])]
    layers, heads = len(pair.old), pair.old.keys(0).shape[1]
    return {
        "tokens": _compared(effects, tokens | others),
        "places": _compared(single, {name: [float(each[at]) for at in chosen] for name, each in places.items()}),
        "top": _top(pair, later, effects, tokens | {"shuffled": shuffled}),
        "exact": [_short(each) for each in effects],
        "attributed": [_short(each) for each in tokens["attributed"]],
        # Rows through all layers that each needs; a backward of one row counts as BACKWARD of them. Dropping needs only
        # one forward, but it runs once for each layer: rows side by side are faster than backwards one after the other.
        "rows": {
            "tokens": len(later),
            "places": layers * heads * len(later),
            "attributed": 1 + BACKWARD,
            "dropped": 1 + BACKWARD * (1 + layers),
        },
        "seconds": rounded(seconds),
    }


def _timed(what: Callable[[], Found]) -> tuple[Found, float]:
    began = time.perf_counter()
    found = what()
    return found, time.perf_counter() - began


def _moved(pair: Pair, later: Sequence[int]) -> list[float]:
    """How far each token's keys and values move, summed over layers."""
    apart = torch.stack([each.mean(dim=0) for each in distances(pair.old, pair.fresh).values()]).sum(dim=0)
    found: list[float] = apart[list(later)].tolist()
    return found


def _attended(pair: Pair, rows: Rows, later: Sequence[int]) -> list[float]:
    """The deciding row's attention to each token, summed over layers and heads."""
    weights = torch.stack([each.sum(dim=0) for each in pair.engine.attention_weights(pair.old, rows)]).sum(dim=0)
    found: list[float] = weights[list(later)].tolist()
    return found


def _places(pair: Pair, rng: random.Random) -> list[tuple[int, int, int]]:
    """(layer, KV head, slot): random ones among the rules' actions, and random ones among all others."""
    text = pair.text
    actions = [slot for slot in text.of(*RULES) if text.parts[slot] is Part.ACTION]
    rest = [slot for slot in text.later if slot not in actions]
    layers, heads = range(len(pair.old)), range(pair.old.keys(0).shape[1])
    drawn: list[tuple[int, int, int]] = []
    for slots in (actions, rest):
        every = [(layer, head, slot) for layer in layers for head in heads for slot in slots]
        drawn += rng.sample(every, min(PLACES, len(every)))
    return drawn


def _compared(exact: Sequence[float], scores: dict[str, list[float]]) -> Row:
    """By score, rank correlations with the exact effects (by size, among felt ones, signed) and overlap at the top."""
    sizes = [abs(each) for each in exact]
    felt = [index for index, each in enumerate(sizes) if each > FELT]
    row: Row = {"felt": len(felt)}
    for name, found in scores.items():
        magnitudes = [abs(each) for each in found]
        row[name] = rounded(
            {
                "sizes": spearman(magnitudes, sizes),
                "felt": spearman([magnitudes[i] for i in felt], [sizes[i] for i in felt]),
                "first": overlap(magnitudes, sizes, TOP),
            }
            | ({"signed": spearman(found, exact)} if name in ("attributed", "linear", "shuffled") else {})
        )
    return row


def _top(pair: Pair, later: Sequence[int], exact: Sequence[float], scores: dict[str, list[float]]) -> Row:
    """The gap if the best tokens by each score are patched together."""
    chosen = {
        name: tuple(sorted(later[i] for i in sorted(range(len(later)), key=lambda i: (-found[i], -i))[:TOP]))
        for name, found in ({"exact": list(exact)} | scores).items()
    }
    gaps = pair.gaps([Probe(slots) for slots in chosen.values()])
    return rounded(dict(zip(chosen, gaps, strict=True)))


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Mean rank correlations by variant, the pooled one, what the best tokens recover, and what each variant costs."""
    summary: dict[str, Any] = {}
    for part in ("tokens", "places"):
        names = [name for name in (rows[0][part] if rows else {}) if name != "felt"]
        summary[part] = {"felt": mean_by_domain(rows, at(f"{part}.felt"))} | {
            name: {key: mean_by_domain(rows, at(f"{part}.{name}.{key}")) for key in rows[0][part][name]}
            for name in names
        }
    summary["top"] = {name: arm(rows, at(f"top.{name}")) for name in (rows[0]["top"] if rows else {})}
    summary["pooled"] = _pooled(rows)
    for part in ("rows", "seconds"):
        summary[part] = {
            name: mean_by_domain(rows, at(f"{part}.{name}"))["value"] for name in (rows[0][part] if rows else {})
        }
    if rows:
        summary["fewer"] = {
            "tokens": _ratio(rows, "rows.tokens", "rows.attributed"),
            "tokens_dropped": _ratio(rows, "rows.tokens", "rows.dropped"),
            "places": _ratio(rows, "rows.places", "rows.attributed"),
            "places_dropped": _ratio(rows, "rows.places", "rows.dropped"),
            "tokens_in_time": _ratio(rows, "seconds.tokens", "seconds.attributed"),
        }
    return summary


def _ratio(rows: Sequence[Row], above: str, below: str) -> float:
    """How many times less the second costs, over all policies."""
    return round(fmean(at(above)(row) or 0.0 for row in rows) / fmean(at(below)(row) or 1.0 for row in rows), 2)


def _pooled(rows: Sequence[Row]) -> dict[str, Any]:
    """The rank correlation over the tokens of all policies, each in units of its policy's span."""
    clusters: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        span = row["new_gap"] - row["old_gap"] if row["valid"] else 1.0
        pairs = zip(row["attributed"], row["exact"], strict=True)
        clusters.setdefault(row["domain"], []).extend((a / span, b / span) for a, b in pairs)
    if len(clusters) < 2:
        return {}
    return {
        name: cluster_interval(clusters, partial(_correlation, sizes), resamples=200).model_dump()
        for name, sizes in (("signed", False), ("sizes", True))
    }


def _correlation(sizes: bool, pairs: Sequence[tuple[float, float]]) -> float:
    first, second = ([abs(each) if sizes else each for each in score] for score in zip(*pairs, strict=True))
    return spearman(first, second) or 0.0


ATTRIBUTION = Experiment(
    name="attribution",
    version=1,
    title="Whether one forward and one backward rank tokens as patching each of them does",
    measure=measure,
    summarise=summarise,
    scenarios=336,
    seconds=2.0,
    quick=partial(measure, dropping=False),
)
