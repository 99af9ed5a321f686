"""The figures of `docs/mechanism.md` by layer, by feature, by share of the adapter, and by step of its training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from programmable_kv.drawing import BLUE, GREEN, GREY, ORANGE, RED, SKY, curve, shares
from programmable_kv.records import Record

_EXCHANGED = (
    ("written", "notes' stream exchanged before this layer", BLUE, "-"),
    ("read_from", "new notes read from this layer on", SKY, "-"),
    ("committed", "deciding row's stream exchanged before it", ORANGE, "-"),
)
_READ = (("notes", "probe of notes", GREEN), ("last", "probe of the deciding row", RED))
_DICTIONARIES = (
    ("trained", "trained features", BLUE, "-"),
    ("frozen", "features of random directions", ORANGE, "-"),
    ("coordinates", "coordinates of the stream", GREEN, "-"),
)
_CARRIED = (
    ("actions", "recovered by the actions' notes", BLUE),
    ("field", "recovered by the field", RED),
    ("random_as_actions", "recovered by random tokens", GREY),
)


def _conclusion(axes: Any, record: Record) -> None:
    """By layer: accuracy of a probe for the conclusion; recovery from exchanging notes whole or along one direction."""
    summary: Any = record.summary
    for key, label, colour in (
        ("applies", "probe of the conclusion", GREEN),
        ("control", "probe of control tasks", GREY),
    ):
        found = summary["read"][key]
        curve(axes, [int(layer) for layer in found], list(found.values()), label, colour)
    for key, label, colour in (("whole", "notes exchanged", BLUE), ("along", "exchanged along one direction", ORANGE)):
        arms = {int(layer): each["recovery"] for layer, each in summary[key].items()}
        curve(axes, sorted(arms), [arms[layer] for layer in sorted(arms)], label, colour, "--")
    axes.set_xlabel("layers below")
    shares(axes, "accuracy, and recovery (dashed)", low=-0.1, top=1.4, legend="upper left", ncols=2)


def _timing(axes: Any, record: Record) -> None:
    """By layer: recovery from three kinds of exchange, and accuracy of a probe for the conclusion in two places."""
    summary: Any = record.summary
    for key, label, colour, style in _EXCHANGED:
        _by_layer(axes, summary[key], label, colour, style)
    for place, label, colour in _READ:
        _by_layer(axes, summary["probes"][place]["applies"], label, colour, "--")
    axes.set_xlabel("layers below")
    shares(axes, "recovery, and accuracy (dashed)", low=-0.1, top=1.6, legend="upper left", ncols=2)


def _by_layer(axes: Any, found: Any, label: str, colour: str, style: str) -> None:
    layers = sorted(int(layer) for layer in found)
    curve(axes, layers, [found[str(layer)] for layer in layers], label, colour, style)


def _sparse_features(axes: Any, record: Record) -> None:
    """Recovery by number of features exchanged, for each dictionary, for random features, and for one direction."""
    summary: Any = record.summary
    counts = sorted(int(count) for count in summary["trained"]["random"])
    for kind, label, colour, style in _DICTIONARIES:
        found = summary[kind]["exchanged"]
        curve(axes, counts, [found[str(count)]["recovery"] for count in counts], label, colour, style)
    found = summary["trained"]["random"]
    curve(axes, counts, [found[str(count)]["recovery"] for count in counts], "as many random features", GREY)
    axes.axhline(summary["mean"]["recovery"]["value"], color=RED, lw=1, label="one direction, the mean difference")
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("features exchanged")
    shares(axes, "recovery of the new decision", low=-0.15, top=1.4, legend="upper left", ncols=2)


def _along_adapter(axes: Any, record: Record) -> None:
    """Right decisions, what carries them, and probe accuracy on notes, by share of the adapter's change."""
    places = _along(axes, record)
    axes.set_xticks(places, [f"{each}%" for each in places])
    axes.set_xlabel("share of the adapter's change")


def _along_training(axes: Any, record: Record) -> None:
    """Right decisions, what carries them, and probe accuracy on notes, by step of training."""
    _along(axes, record)
    axes.set_xlabel("steps of training")


def _along(axes: Any, record: Record) -> list[int]:
    parts: Any = {int(name[3:]): each for name, each in record.summary.items() if name.startswith("at_")}
    places = sorted(parts)
    curve(axes, places, [parts[each]["right"] for each in places], "right under both values", GREEN)
    best = [max((it["accuracy"] for it in parts[each]["read"].values()), key=lambda it: it["value"]) for each in places]
    curve(axes, places, best, "probe of notes, best layer", ORANGE)
    for name, label, colour in _CARRIED:
        able = [each for each in places if parts[each][name]["recovery"]["n"]]
        curve(axes, able, [parts[each][name]["recovery"] for each in able], label, colour, "--")
    shares(axes, "share, accuracy, recovery (dashed)", low=-0.1, top=1.5, legend="upper left", ncols=2)
    return places


FIGURES: dict[str, tuple[str, Callable[[Any, Record], None]]] = {
    "conclusion": ("conclusion", _conclusion),
    "timing": ("timing", _timing),
    "sparse-features": ("sparse-features", _sparse_features),
    "along-adapter": ("along-adapter", _along_adapter),
    "along-training": ("along-training", _along_training),
}
"""Figure name -> its record's name and the function that draws it."""
