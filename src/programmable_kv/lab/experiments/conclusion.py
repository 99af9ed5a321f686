"""Is the conclusion a direction? Where notes say whether their rule applies: from which layer, in how many dimensions.

A note is the first token of an action. Its token is the same in both contexts, and only the conclusion differs. Probes,
mean differences and learned subspaces come from policies of other domains. Along a subspace, notes get their values
from another context: one with a changed field, changed rules, or both. What carries the conclusion follows it and not
the field.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch

from programmable_kv.engine import Rows
from programmable_kv.lab.experiments.dissociation import exchanged_texts
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.kept import Kept
from programmable_kv.lab.experiments.learned import DIMENSIONS, Example, Learned
from programmable_kv.lab.experiments.note_rows import NoteRows, shifted
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.lab.experiments.summaries import arm, at, mean_by_domain, nested, rounded
from programmable_kv.lab.tools.changes import interchanged, projected_out, replaced
from programmable_kv.lab.tools.hooks import Change
from programmable_kv.lab.tools.lens import logit_lens

DEPTHS = (0.33, 0.5, 0.6, 0.67, 0.7, 0.73, 0.77, 0.8, 0.87)
"""Fractions of the model's depth. Notes are exchanged before the layer there."""
SITE = 0.77
"""Depth of the learned subspaces if no policy says which layer is best."""
READABLE = 0.9
"""Accuracy from which a conclusion counts as readable, as published."""
DRAWS = 2
_EXAMPLES = Kept(Example.of, Learned)


def layers(pair: Pair) -> list[int]:
    """The layers at `DEPTHS`."""
    return sorted({min(len(pair.old) - 1, max(1, round(depth * len(pair.old)))) for depth in DEPTHS})


def rank(pair: Pair) -> Row:
    """What exchanging the whole streams recovers, by layer. It decides before which layer subspaces are learnt."""
    _EXAMPLES.add(pair)
    notes = NoteRows(pair)
    new, span = notes.streams(pair.fresh), pair.scale.new - pair.scale.old
    return {"whole": {layer: round((gap - pair.scale.old) / span, 4) for layer, gap in _whole(notes, new).items()}}


def measure(pair: Pair, others: Sequence[Row], dimensions: Sequence[int] = DIMENSIONS) -> Row:
    """How well the conclusion is read by layer, and what exchanges along directions and subspaces do."""
    notes = NoteRows(pair)
    old, new = notes.streams(pair.old), notes.streams(pair.fresh)
    row: Row = {"committed": _committed(pair)}
    # A single policy does not tell the conclusion from the field, so nothing is learnt without others.
    if not others:
        return row | {"whole": rounded(_whole(notes, new))}
    learned = _EXAMPLES.learnt(pair, others)
    read = learned.probes.read(notes.items(old, new), pair.case.number)
    row["read"] = {name: [round(each, 4) for each in found] for name, found in read.items()}
    site = _site(pair, others)
    return row | {"site": site} | _exchanged(pair, notes, learned, site, new, dimensions)


def _whole(notes: NoteRows, new: torch.Tensor) -> dict[str, float]:
    """The gap if the notes' streams are the new context's, by the layer before which they are replaced."""
    every = layers(notes.pair)
    gaps = notes.gaps([(layer, replaced(new[layer])) for layer in every])
    return {str(layer): gap for layer, gap in zip(every, gaps, strict=True)}


def _site(pair: Pair, others: Sequence[Row]) -> int:
    """The layer before which whole streams do most on other policies; of equals, the later one."""
    means = {int(layer): fmean(row["whole"][layer] for row in others) for layer in others[0]["whole"]}
    return max(means, key=lambda layer: (means[layer], layer)) if means else round(SITE * len(pair.old))


def _committed(pair: Pair) -> float:
    """The depth, 0 to 1, from which on the deciding row's logit lens has the old decision's sign and keeps it."""
    text = pair.text
    found = logit_lens(pair.engine, pair.old, Rows((pair.token,), (text.last,), (text.last,)))[:, -1]
    right = (pair.gap_in(found) < 0) == (pair.scale.old < 0)
    wrong = [layer for layer, each in enumerate(right.tolist()) if not each]
    return round((max(wrong, default=-1) + 1) / (len(found) - 1), 4)


def _exchanged(
    pair: Pair, notes: NoteRows, learned: Learned, site: int, new: torch.Tensor, dimensions: Sequence[int]
) -> Row:
    """Gaps after exchanges: by layer, whole and along the mean direction; at the site also along subspaces, by donor.

    All exchanges in the old context take one forward.
    """
    changes: dict[tuple[str, str], tuple[int, Change]] = {}
    for layer in layers(pair):
        along = learned.direction(layer)[0][:, None]
        changes["whole", str(layer)] = (layer, replaced(new[layer]))
        changes["along", str(layer)] = (layer, interchanged(new[layer], along))
    unit, apart, middle = learned.direction(site)
    spaces = {"mean": unit[:, None]} | {f"learned_{k}": learned.subspace(pair.engine, site, k) for k in dimensions}
    spaces |= {f"changes_{k}": learned.changes(site, k) for k in dimensions[1:]}
    for k in dimensions:
        for seed in range(DRAWS):
            changes["random", f"{k}/{seed}"] = (site, interchanged(new[site], learned.random(site, k, seed)))
    signs = [-1.0 if applies else 1.0 for applies in notes.applies["old"]]
    for name, times in (("added", 1), ("added_twice", 2)):
        changes["moved", name] = (site, shifted(unit, [times * sign * apart for sign in signs]))
    exchanged = {name: notes.streams_of(text, noising=name == "both") for name, text in exchanged_texts(pair).items()}
    for name, donor in ({"field": new} | exchanged).items():
        streams = donor[site]
        changes[name, "whole"] = (site, replaced(streams))
        changes |= {(name, key): (site, interchanged(streams, basis)) for key, basis in spaces.items()}
    left = {
        ("moved", "projected_out"): (site, projected_out(unit[:, None], middle)),
        ("moved", "projected_out_learned"): (site, projected_out(spaces[f"learned_{dimensions[-1]}"], middle)),
    }
    found: dict[str, dict[str, list[float]]] = {}
    for part, noising in ((changes, False), (left, True)):
        for (name, key), gap in zip(part, notes.gaps(list(part.values()), noising=noising), strict=True):
            found.setdefault(name, {}).setdefault(key.partition("/")[0], []).append(gap)
    return {name: rounded({key: fmean(each) for key, each in by.items()}) for name, by in found.items()}


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Accuracy by layer, where it is first readable, where the decision is committed; and every exchange as an arm."""
    summary: dict[str, Any] = {"committed": mean_by_domain(rows, at("committed"))}
    learned = [row for row in rows if "read" in row]
    summary["learned"] = len(learned)
    if learned:
        summary["read"] = nested(learned, "read")
        accuracy = [each["value"] for each in summary["read"]["applies"].values()]
        first = next((layer for layer, each in enumerate(accuracy) if each >= READABLE), None)
        summary["readable_from"] = 1.0 if first is None else first / (len(accuracy) - 1)
        summary["best_accuracy"] = max(accuracy)
        summary["site"] = mean_by_domain(learned, at("site"))
    for part in ("whole", "along", "random", "moved", "field", "rules", "both"):
        names = dict.fromkeys(name for row in rows for name in row.get(part, ()))
        summary[part] = {name: arm(rows, at(f"{part}.{name}")) for name in names}
    return summary


CONCLUSION = Experiment(
    name="conclusion",
    version=1,
    title="Whether the conclusion is a direction: from which layer it is read, and along how many dimensions it is exchanged",
    measure=measure,
    summarise=summarise,
    rank=rank,
    scenarios=336,
    ranking=16,
    seconds=1.6,
    quick=partial(measure, dimensions=DIMENSIONS[:1]),
)
