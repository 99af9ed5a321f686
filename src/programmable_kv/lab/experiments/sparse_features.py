"""Are there features for the conclusion? A sparse autoencoder of the stream that notes are read from, and its controls.

Notes are the first tokens of both rules' actions, before the layer at which `conclusion` exchanges most. The
autoencoder is trained on policies of the training split and on plain text. The controls are an autoencoder with random
directions of which only the encoder is trained, the stream's own coordinates, random features that are as often active
and move a note as far, and one direction: the difference of two means. Features are chosen on policies of other
domains.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch

from programmable_kv.lab.experiments.activations import Amount, streams_before
from programmable_kv.lab.experiments.cases import SEED
from programmable_kv.lab.experiments.conclusion import SITE
from programmable_kv.lab.experiments.dissociation import donors
from programmable_kv.lab.experiments.experiment import Experiment, Row
from programmable_kv.lab.experiments.features import Chosen, Coordinates, Dictionary
from programmable_kv.lab.experiments.kept import Kept
from programmable_kv.lab.experiments.learned import along_means
from programmable_kv.lab.experiments.note_rows import NoteRows
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.lab.experiments.read_by_layer import Items
from programmable_kv.lab.experiments.summaries import arm, at, mean_by_domain, nested, rounded
from programmable_kv.lab.tools.changes import interchanged, replaced
from programmable_kv.lab.tools.sparse_autoencoder import SparseAutoencoder, train
from programmable_kv.models.load import Model

COUNTS = (1, 3, 10, 30)
"""Numbers of features that are exchanged, as published."""
WIDER = 4
"""Features for each dimension of the stream, as published."""
ACTIVE = 32
DRAWS = 2
"""Random sets of features that are exchanged. Only one random set is ablated."""
KINDS = ("trained", "frozen", "coordinates")


@dataclass(frozen=True, slots=True)
class Effort:
    """How much the autoencoders are trained."""

    learned: Amount
    held_out: Amount
    steps: int


FULL = Effort(Amount(200, 50), Amount(24, 24), 900)
BRIEF = Effort(Amount(6, 2), Amount(1, 1), 20)


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """Both autoencoders, and their scores on held-out prompts."""

    dictionaries: dict[str, SparseAutoencoder]
    held_out: dict[str, dict[str, float | None]]


def _notes_of(pair: Pair) -> Items:
    notes = NoteRows(pair)
    return notes.items(notes.streams(pair.old), notes.streams(pair.fresh))


_NOTES = Kept(_notes_of, Items.together)
_TRAINED: dict[tuple[str, Effort], Trained] = {}


def layer_of(layers: int) -> int:
    """The layer before which notes are changed. It is not the first, whose stream is only the token."""
    return min(layers - 1, max(1, round(SITE * layers)))


def rank(pair: Pair) -> Row:
    """Keep the notes for learning. The row says how far they move between the contexts, relative to their length."""
    _NOTES.add(pair)
    notes, layer = NoteRows(pair), layer_of(len(pair.old))
    old, new = (notes.streams(buffer)[layer] for buffer in (pair.old, pair.fresh))
    return {"moved": round(float(((new - old).norm(dim=1) / old.norm(dim=1)).mean()), 4)}


def measure(pair: Pair, others: Sequence[Row], effort: Effort = FULL) -> Row:
    """Gaps after features of the notes are exchanged or ablated, by dictionary and number; how well one is read."""
    notes, layer = NoteRows(pair), layer_of(len(pair.old))
    streams = {"old": notes.streams(pair.old), "new": notes.streams(pair.fresh)}
    old, new = streams["old"][layer], streams["new"][layer]
    row: Row = {"whole": round(notes.gap(layer, replaced(new)), 4)}
    # Features are never chosen on the policy on which they are scored, so other policies are needed.
    if not others:
        return row
    seen = _NOTES.learnt(pair, others)
    rows, labels, _ = seen.at(layer)
    here, marks, _ = notes.items(streams["old"], streams["new"]).at(layer)
    unit = along_means(rows, labels)[0][:, None]
    row["mean"] = {
        "gap": round(notes.gap(layer, interchanged(new, unit)), 4),
        "auc": Chosen.of(_Line(unit), rows, labels).read(here, marks),
    }
    trained = _trained(pair.model, layer, effort)
    dictionaries: dict[str, Dictionary] = {**trained.dictionaries, "coordinates": Coordinates(rows.shape[1])}
    there = {name: notes.streams(donor)[layer] for name, donor in donors(pair).items() if name != "field"}
    for kind, dictionary in dictionaries.items():
        chosen = Chosen.of(dictionary, rows, labels)
        row[kind] = _changed(notes, layer, _exchanges(pair, chosen, old, new, there), _ablations(pair, chosen, new))
        row[kind]["auc"] = chosen.read(here, marks)
        if kind in trained.held_out:
            row[kind]["held_out"] = trained.held_out[kind]
    return row


@dataclass(frozen=True, slots=True, eq=False)
class _Line:
    """One direction [d, 1] as a dictionary."""

    unit: torch.Tensor

    @property
    def directions(self) -> torch.Tensor:
        return self.unit.T

    def codes(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self.unit


Notes = dict[tuple[str, str], torch.Tensor]
"""(arm, number of features or donor) -> notes [n, d] that replace a context's own."""


def _exchanges(
    pair: Pair, chosen: Chosen, old: torch.Tensor, new: torch.Tensor, there: dict[str, torch.Tensor]
) -> Notes:
    """The old context's notes with features of the new one, with random ones, and with features of other donors."""
    rng = random.Random(f"{SEED}/sparse-features/{pair.case.number}")
    found: Notes = {}
    for count in _counts(chosen):
        first = chosen.order[:count]
        found["exchanged", str(count)] = chosen.exchanged(old, new, first)
        for draw in range(DRAWS):
            found["random", f"{count}/{draw}"] = chosen.randomly_exchanged(old, new, first, rng)
    found["exchanged", "all"] = chosen.exchanged(old, new, chosen.order)
    most = chosen.order[: _counts(chosen)[-1]]
    return found | {("donors", name): chosen.exchanged(old, streams, most) for name, streams in there.items()}


def _ablations(pair: Pair, chosen: Chosen, new: torch.Tensor) -> Notes:
    """The new context's notes with features at their mean, with random ones, and as an autoencoder rebuilds them."""
    rng = random.Random(f"{SEED}/sparse-features/ablated/{pair.case.number}")
    found: Notes = {}
    for count in _counts(chosen):
        first = chosen.order[:count]
        found["ablated", str(count)] = chosen.ablated(new, first)
        found["random_ablated", str(count)] = chosen.ablated(new, chosen.matched(first, rng))
    if isinstance(chosen.dictionary, SparseAutoencoder):
        found["rebuilt", "all"] = chosen.dictionary.decoded(chosen.dictionary.codes(new)).to(new)
    return found


def _counts(chosen: Chosen) -> list[int]:
    """Numbers of features to change: at most half of a small dictionary, so that as many others are left."""
    return [count for count in COUNTS if 2 * count <= len(chosen.order)]


def _changed(notes: NoteRows, layer: int, exchanges: Notes, ablations: Notes) -> Row:
    """The gap of each, by arm and number: exchanges in the old context, ablations in the new one."""
    drawn: dict[str, dict[str, list[float]]] = {}
    for part, noising in ((exchanges, False), (ablations, True)):
        gaps = notes.gaps([(layer, replaced(streams)) for streams in part.values()], noising=noising)
        for (name, count), gap in zip(part, gaps, strict=True):
            drawn.setdefault(name, {}).setdefault(count.partition("/")[0], []).append(gap)
    return {name: {count: round(fmean(each), 4) for count, each in by.items()} for name, by in drawn.items()}


def _trained(model: Model, layer: int, effort: Effort) -> Trained:
    """A model's autoencoders, trained once in a run."""
    key = (model.fingerprint, effort)
    if key not in _TRAINED:
        rows = streams_before(model, layer, effort.learned)
        features = WIDER * rows.shape[1]
        active = min(ACTIVE, features // 8)
        found = {kind: train(rows, features, active, steps=effort.steps, frozen=kind == "frozen") for kind in KINDS[:2]}
        _TRAINED[key] = Trained(found, _on_held_out(model, layer, effort.held_out, found))
    return _TRAINED[key]


def _on_held_out(
    model: Model, layer: int, amount: Amount, found: dict[str, SparseAutoencoder]
) -> dict[str, dict[str, float | None]]:
    """By autoencoder: variance unexplained in policies and in plain text, and the share of features ever used."""
    parts = {
        "policies": streams_before(model, layer, Amount(amount.policies, 0), split="held_out"),
        "plain": streams_before(model, layer, Amount(0, amount.windows), split="held_out"),
    }
    scores: dict[str, dict[str, float | None]] = {}
    for kind, each in found.items():
        used = torch.stack([(each.codes(rows) > 0).any(dim=0) for rows in parts.values()]).any(dim=0)
        scores[kind] = rounded({name: each.unexplained(rows) for name, rows in parts.items()})
        scores[kind]["used"] = round(float(used.float().mean()), 4)
    return scores


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Every change as an arm, by dictionary and number of features. Ablations say what of the new decision remains."""
    summary: dict[str, Any] = {"whole": arm(rows, at("whole"))}
    learned = [row for row in rows if "trained" in row]
    summary["learned"] = len(learned)
    if not learned:
        return summary
    summary["mean"] = arm(learned, at("mean.gap")) | {"auc": mean_by_domain(learned, at("mean.auc"))}
    for kind in KINDS:
        part: dict[str, Any] = {"auc": mean_by_domain(learned, at(f"{kind}.auc"))}
        for change in ("exchanged", "random", "ablated", "random_ablated", "donors", "rebuilt"):
            names = dict.fromkeys(name for row in learned for name in row[kind].get(change, ()))
            part[change] = {name: arm(learned, at(f"{kind}.{change}.{name}")) for name in names}
        if "held_out" in learned[0][kind]:
            part["held_out"] = nested(learned, f"{kind}.held_out")
        summary[kind] = part
    return summary


SPARSE_FEATURES = Experiment(
    name="sparse-features",
    version=1,
    title="Whether a sparse autoencoder has features for the conclusion: read, exchanged and ablated, beside its controls",
    measure=measure,
    summarise=summarise,
    rank=rank,
    quick=partial(measure, effort=BRIEF),
    scenarios=336,
    seconds=2.7,
)
