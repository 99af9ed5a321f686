"""The figures of `docs/mechanism.md` about the information in the keys and values of a prefilled context."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from programmable_kv.drawing import BLUE, GREEN, GREY, ORANGE, RED, SKY, bars, curve, shares
from programmable_kv.records import Record

_COUNTS = (1, 2, 4, 8, 16, 32)
_RANKED = {
    "same": ("chosen on the same policy, as published", GREY, "--"),
    "held_out": ("chosen by their roles on other policies", BLUE, "-"),
    "moved": ("tokens that move farthest", ORANGE, "-"),
    "random": ("random, from the same places", GREEN, "-"),
}
_SETS = {
    "first_of_actions": "first tokens\nof actions",
    "rule_action": "actions of\nboth rules",
    "rule_name": "names in\nboth rules",
    "rule_value": "values in\nboth rules",
    "other_rules": "other\nrules",
    "delimiters": "all\ndelimiters",
    "question": "question",
    "template": "template",
}
_MOVED = {
    "state": "other\nfields",
    "old_rule": "rule of the\nold value",
    "new_rule": "rule of the\nnew value",
    "other_rule": "other\nrules",
    "filler": "other\nlines",
    "rest": "headings",
    "question": "question",
    "template": "template",
}
_BLOCKED = {
    "field": "field",
    "old_rule": "rule that\napplies",
    "actions": "all rules'\nactions",
    "random_as_actions": "as many\nrandom",
    "rules": "all rules",
    "random_as_rules": "as many\nrandom",
    "delimiters": "delimiters",
    "filler": "other\nlines",
    "sinks": "first four\ntokens",
}
_DONORS = {
    "field": ("field changed", BLUE),
    "rules": ("rules exchanged, field unchanged", ORANGE),
    "both": ("both: same conclusion", GREY),
}
_TAKEN = {
    "field": "field",
    "values": "values in\nthe rules",
    "first_of_actions": "first tokens\nof actions",
    "actions": "actions",
    "tail": "question,\ntemplate",
    "later": "all later\ntokens",
}


def _locality(axes: Any, record: Record) -> None:
    """Recovery by the number of patched tokens, for each way of choosing them."""
    patched: Any = record.summary["patched"]
    for arm, (label, colour, style) in _RANKED.items():
        found = [patched[f"{arm}_{k}"]["recovery"] for k in _COUNTS]
        curve(axes, _COUNTS, found, label, colour, style)
    axes.axhline(patched["field"]["recovery"]["value"], color=RED, lw=1, label="the field alone")
    axes.set_xscale("log", base=2)
    axes.set_xticks(_COUNTS, [str(k) for k in _COUNTS])
    axes.set_xlabel("later tokens patched")
    shares(axes, "recovery of the new decision", low=-0.1, top=1.5, legend="upper left")


def _where(axes: Any, record: Record) -> None:
    """Recovery from patching one set of tokens, compared with as many random tokens of the same places."""
    found: Any = record.summary["sets"]
    series = (("patched", "these tokens patched", BLUE), ("random", "as many random tokens from the same places", GREY))
    for number, (arm, label, colour) in enumerate(series):
        bars(axes, [found[name][arm]["recovery"] for name in _SETS], number, len(series), label, colour)
    _finish(axes, _SETS, "recovery of the new decision")


def _blast_radius(axes: Any, record: Record) -> None:
    """How far keys and values move, by kind of text; the bands show the movement from bfloat16 rounding alone."""
    for number, (name, colour) in enumerate((("keys", SKY), ("values", BLUE))):
        part: Any = record.summary[name]
        bars(axes, [part["kinds"][kind] for kind in _MOVED], number, 2, name, colour)
        band = part["null"]["bfloat16"]
        axes.axhspan(band["low"], band["high"], color=colour, alpha=0.3, lw=0, label=f"{name}: bfloat16 rounding only")
    _finish(axes, _MOVED, "relative distance", top=None)


def _knock_out(axes: Any, record: Record) -> None:
    """Share of decisions that change when attention to a set is blocked, and the attention that the set receives."""
    blocked: Any = record.summary["blocked"]
    attention: Any = record.summary["attention"]
    bars(axes, [blocked[name]["all"]["changed"] for name in _BLOCKED], 0, 2, "decisions that change", BLUE)
    bars(axes, [attention[name]["all"] for name in _BLOCKED], 1, 2, "attention of the deciding row", ORANGE)
    _finish(axes, _BLOCKED, "share")


def _dissociation(axes: Any, record: Record) -> None:
    """Share of decisions that flip when tokens are taken from contexts with another field, other rules, or both."""
    for number, (donor, (label, colour)) in enumerate(_DONORS.items()):
        part: Any = record.summary[donor]
        bars(axes, [part[name]["flipped"] for name in _TAKEN], number, len(_DONORS), label, colour)
    _finish(axes, _TAKEN, "decisions that flip")


def _finish(axes: Any, names: Mapping[str, str], measure: str, *, top: float | None = 1.3) -> None:
    axes.set_xticks(range(len(names)), list(names.values()), fontsize=8)
    axes.set_ylabel(measure)
    axes.axhline(0, color="#222222", lw=0.6)
    if top is not None:
        axes.set_ylim(min(axes.get_ylim()[0], -0.02), top)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.legend(frameon=False, fontsize=8, loc="upper right")


FIGURES: dict[str, tuple[str, Callable[[Any, Record], None]]] = {
    "locality": ("locality", _locality),
    "where-notes-are": ("where-notes-are", _where),
    "blast-radius": ("blast-radius", _blast_radius),
    "knock-out": ("knock-out", _knock_out),
    "dissociation": ("dissociation", _dissociation),
}
"""Figure name -> its record's name and the function that draws it."""
