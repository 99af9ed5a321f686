"""When are notes written, when are they read, and when is the decision made? By layer: probes, the lens, and exchanges.

There are three exchanges with the new context: the notes' stream before a layer (are they written by then, and not yet
read?), what the deciding row reads of them from a layer on (does it still have to read them?), and the deciding row's
own stream before a layer (has it decided by then?). `_depths` defines what counts as written, read and committed.
Probes are fit on policies of other domains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.engine import Rows
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.kept import Kept
from programmable_kv.lab.experiments.note_rows import NoteRows
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.lab.experiments.read_by_layer import Items, LayerProbes
from programmable_kv.lab.experiments.summaries import Value, arm, at, mean_by_domain, nested, share
from programmable_kv.lab.tools.changes import replaced
from programmable_kv.lab.tools.lens import logit_lens
from programmable_kv.lab.tools.sites import Place, Site, changed, recorded
from programmable_kv.lab.tools.together import Probe, probed

READABLE = 0.9
"""Accuracy from which a conclusion counts as readable, as published."""
HALF = 0.5
"""Share of the best layer's recovery (notes), or of the new decision (deciding row), that counts as reached."""


class Streams:
    """The streams that the probes of both places learn from and are scored on."""

    def __init__(self, pair: Pair) -> None:
        self.notes = NoteRows(pair)
        self.old, self.new = (self.notes.streams(buffer) for buffer in (pair.old, pair.fresh))
        self.last = {"old": last_streams(pair, pair.old), "new": last_streams(pair, pair.fresh)}
        self.items = {"notes": self.notes.items(self.old, self.new), "last": self._deciding(pair)}

    def _deciding(self, pair: Pair) -> Items:
        """The deciding row in both contexts. Label: does the first of the two rules apply? Kind: the right action.

        Actions differ from policy to policy, but which rule of the text applies can be said in all of them.
        """
        first = self.notes.applies["old"][0]
        streams = torch.cat((self.last["old"], self.last["new"]), dim=1)
        return Items(streams, (first, not first), pair.actions)


def last_streams(pair: Pair, buffer: KVBuffer) -> torch.Tensor:
    """The deciding row's stream before each layer and after the last one, [L + 1, 1, d]. The buffer is unchanged."""
    slot = pair.text.last
    sites = [Site(Place.RESIDUAL, layer) for layer in range(len(buffer) + 1)]
    with recorded(pair.engine, buffer, sites, [slot]) as found:
        pair.engine.compute(buffer, Rows((pair.token,), (slot,), (slot,)))
    return torch.stack([found[site] for site in sites])


def _items_of(pair: Pair) -> dict[str, Items]:
    return Streams(pair).items


def _probes_of(several: Sequence[dict[str, Items]]) -> dict[str, LayerProbes]:
    return {place: LayerProbes(Items.together([each[place] for each in several])) for place in ("notes", "last")}


_ITEMS = Kept(_items_of, _probes_of)


def rank(pair: Pair) -> Row:
    """Keep the policy's streams for the probes. The row is empty."""
    _ITEMS.add(pair)
    return {}


def measure(pair: Pair, others: Sequence[Row]) -> Row:
    """By layer: gaps after the three exchanges, the lens in both contexts, and how well the conclusion is read."""
    streams, layers = Streams(pair), len(pair.old)
    notes, text = streams.notes, pair.text
    lens = [
        pair.gap_in(logit_lens(pair.engine, buffer, Rows((pair.token,), (text.last,), (text.last,)))[:, -1]).tolist()
        for buffer in (pair.old, pair.fresh)
    ]
    row: Row = {
        "written": _numbered(
            range(layers), notes.gaps([(layer, replaced(streams.new[layer])) for layer in range(layers)])
        ),
        "read_from": _numbered(
            range(layers + 1),
            pair.gaps([Probe(notes.slots, layers=tuple(range(layer, layers))) for layer in range(layers + 1)]),
        ),
        "committed": _numbered(range(layers + 1), deciding(pair, streams.last["new"])),
        "lens": {name: _numbered(range(layers + 1), gaps) for name, gaps in zip(("old", "new"), lens, strict=True)},
    }
    row["depth"] = _depths(pair, row)
    if others:
        probes = _ITEMS.learnt(pair, others)
        row["probes"] = {
            place: {
                name: [round(each, 4) for each in found]
                for name, found in probes[place].read(streams.items[place], pair.case.number).items()
            }
            for place in ("notes", "last")
        }
    return row


def deciding(pair: Pair, streams: torch.Tensor) -> list[float]:
    """The gap in the old context if the deciding row has another stream [L + 1, 1, d] before layer 0, 1, ..., L.

    Takes one forward, with a copy of the row for each layer. The context is unchanged.
    """
    first = pair.old.length
    with ExitStack() as stack:
        for layer, stream in enumerate(streams):
            site = Site(Place.RESIDUAL, layer)
            stack.enter_context(changed(pair.engine, pair.old, site, replaced(stream), [first + layer]))
        found = probed(pair.engine, pair.old, pair.token, [Probe()] * len(streams))
    return [float(each) for each in pair.gap_in(found)]


def _numbered(layers: Sequence[int], gaps: Sequence[float]) -> dict[str, float]:
    return {str(layer): round(gap, 4) for layer, gap in zip(layers, gaps, strict=True)}


def _depths(pair: Pair, row: Row) -> dict[str, float | None]:
    """The depths at which notes are written and read and the decision is made, as shares of the model's depth.

    `written`: the first layer before which exchanged notes recover half of what they recover before the best layer.
    `read`: the last layer from which on reading them recovers half of what reading them in all layers does.
    `committed`: the first layer from which on the deciding row's stream recovers half of the new decision.
    """
    span = pair.scale.new - pair.scale.old
    found = {
        name: {int(layer): (gap - pair.scale.old) / span for layer, gap in row[name].items()}
        for name in ("written", "read_from", "committed")
    }
    most, whole = max(found["written"].values()), found["read_from"][0]
    there = [layer for layer, each in found["written"].items() if each >= HALF * most]
    reading = [layer for layer, each in found["read_from"].items() if each >= HALF * whole]
    still_old = [layer for layer, each in found["committed"].items() if each < HALF]
    layers = len(pair.old)
    return {
        "written": round(min(there) / layers, 4) if most > 0 else None,
        "read": round(max(reading) / layers, 4) if whole > 0 else None,
        "committed": round((max(still_old, default=-1) + 1) / layers, 4),
    }


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """By layer: recovery of each exchange, the lens, accuracy of the probes. Also the depths."""
    summary: dict[str, Any] = {"depth": nested(rows, "depth")}
    for name in ("written", "read_from", "committed"):
        layers = dict.fromkeys(layer for row in rows for layer in row[name])
        summary[name] = {layer: arm(rows, at(f"{name}.{layer}"))["recovery"] for layer in layers}
    summary["lens"] = {
        layer: {"moved": mean_by_domain(rows, _lens_moved(layer)), "right": share(rows, _lens_right(layer))}
        for layer in dict.fromkeys(layer for row in rows for layer in row["lens"]["old"])
    }
    learned = [row for row in rows if "probes" in row]
    summary["learned"] = len(learned)
    if learned:
        summary["probes"] = nested(learned, "probes")
        for place in ("notes", "last"):
            accuracy = [each["value"] for each in summary["probes"][place]["applies"].values()]
            first = next((layer for layer, each in enumerate(accuracy) if each >= READABLE), None)
            # 1 if no layer is read that well, or only the last one; `best` tells the two apart.
            summary["probes"][place]["readable_from"] = 1.0 if first is None else first / (len(accuracy) - 1)
            summary["probes"][place]["best"] = max(accuracy)
    return summary


def _lens_moved(layer: str) -> Value:
    """How far apart the lens puts the two contexts before a layer; 1 is as far as the model's own output."""

    def moved(row: Row) -> float | None:
        apart = float(row["lens"]["new"][layer]) - float(row["lens"]["old"][layer])
        return apart / (row["new_gap"] - row["old_gap"]) if row["valid"] else None

    return moved


def _lens_right(layer: str) -> Callable[[Row], bool]:
    """Whether the lens decides correctly in both contexts. A lens with the same sign in both never does."""
    return lambda row: bool(row["lens"]["old"][layer] < 0 < row["lens"]["new"][layer])


TIMING = Experiment(
    name="timing",
    version=1,
    title="When notes are written and read, and when the decision is made: probes, lens and exchanges by layer",
    measure=measure,
    summarise=summarise,
    rank=rank,
    scenarios=336,
    seconds=1.5,
)
