"""The figures of `docs/mechanism.md` on what reads the field: prevention, its place, other texts, memories, skills."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from programmable_kv.drawing import BLUE, GREEN, GREY, ORANGE, RED, bars, curve, shares
from programmable_kv.records import Record

_READERS = {
    "causal": "everything\n(ordinary)",
    "readers": "the rules'\nlines",
    "values_to_actions": "value to\naction",
    "values_carried_on": "values,\ncarried on",
    "all_but_actions": "all but\nactions",
    "values_and_actions": "values and\nactions",
    "values": "values",
    "actions": "actions",
    "line_ends": "line\nends",
    "random_as_readers": "random\ntokens",
    "nobody": "nothing",
}
_PLACES = {
    "above": "above\nits rules",
    "asked_first": "above, asked\nbefore",
    "among": "among\nits rules",
    "below_far": "below, then\nother lines",
    "below": "below\nits rules",
    "in_question": "in the\nquestion",
}
_PATCHED = (
    ("field", "the field's own keys and values", BLUE),
    ("actions", "actions of the rules after it", ORANGE),
    ("tail", "question and template", GREY),
)
_TEXTS = {
    "list": "a list\nof rules",
    "two_hops": "rules with\na lookup",
    "prose": "running\nprose",
    "passages": "retrieved\npassages",
    "rule_in_question": "the rule in\nthe question",
}
_IN_TEXTS = (
    ("patched", "field", "the field's own keys and values", BLUE),
    ("patched", "last_half", "the last half of the later text", ORANGE),
    ("patched", "tail", "question and template", GREY),
)
_WAYS = (("recomputed", "prefilled in place", BLUE), ("spliced", "compiled alone and spliced", ORANGE))
_EDITS = {
    "new": "prefilled with\nthe new value",
    "in_place": "edited\nin place",
    "erratum": "erratum",
    "readers": "readers",
}
_DEVIATIONS = (
    ("alone", "compiled alone", ORANGE),
    ("null", "in the context, behind other lines", GREY),
    ("preface", "compiled behind a preface", BLUE),
)


def _prevention(axes: Any, record: Record) -> None:
    """Right decisions by what may read the field, with a line at the rate of guessing."""
    arms: Any = record.summary["arms"]
    bars(axes, [arms[name]["right"] for name in _READERS], 0, 1, "right, before and after an edit", BLUE)
    axes.axhline(record.figure("guess"), color=RED, lw=1, label="guessing")
    axes.set_xticks(range(len(_READERS)), list(_READERS.values()), fontsize=7)
    axes.set_xlabel("what may read the field, besides the question")
    shares(axes, "right decisions", top=1.25)


def _boundary(axes: Any, record: Record) -> None:
    """Recovery from patching the field, the rules' actions, or the question, by where the field stands."""
    settings: Any = record.summary["settings"]
    for number, (key, label, colour) in enumerate(_PATCHED):
        found = [settings[name][key]["recovery"] for name in _PLACES]
        bars(axes, found, number, len(_PATCHED), label, colour)
    axes.set_xticks(range(len(_PLACES)), list(_PLACES.values()), fontsize=9)
    axes.set_xlabel("place of the field")
    shares(axes, "recovery of the new decision", low=-0.02, top=1.4)


def _seam(axes: Any, record: Record) -> None:
    """Relative distance of values inside a skill, by position, for each way of compiling the skill."""
    deviation: Any = record.summary["deviation"]
    positions = list(deviation["alone"]["values"]["position"])
    for name, label, colour in _DEVIATIONS:
        found = [deviation[name]["values"]["position"][position] for position in positions]
        curve(axes, range(len(found)), found, label, colour)
    axes.set_xticks(range(len(positions)), [f"from {position}" for position in positions])
    axes.set_xlabel("position in the skill")
    axes.set_ylabel("relative distance of values")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def _competing(axes: Any, record: Record) -> None:
    """The deciding row's attention to the actions of its own skill, to the other skill's, and to their first tokens."""
    two: Any = record.summary["two"]
    attention = two["attention"]
    ways = {
        "full": "one text",
        "together": "compiled\ntogether",
        "stranger": "each behind\na third policy",
        "preface": "each behind\nother lines",
        "alone": "each\nalone",
    }
    series = (("own_actions", "its actions", BLUE), ("other_actions", "the other skill's actions", ORANGE),
              ("first_tokens", "the skills' first tokens", GREEN))  # fmt: skip
    for number, (key, label, colour) in enumerate(series):
        bars(axes, [attention[way][key] for way in ways], number, len(series), label, colour)
    axes.set_xticks(range(len(ways)), list(ways.values()), fontsize=9)
    axes.set_ylabel("share of attention, last third of the layers")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _families(axes: Any, record: Record) -> None:
    """Recovery from patching the field, the last half of what follows it, or the question, by text."""
    texts: Any = record.summary["texts"]
    for number, (kind, key, label, colour) in enumerate(_IN_TEXTS):
        bars(axes, [texts[name][kind][key]["recovery"] for name in _TEXTS], number, len(_IN_TEXTS), label, colour)
    axes.set_xticks(range(len(_TEXTS)), list(_TEXTS.values()), fontsize=9)
    axes.set_ylabel("recovery of the new decision")
    axes.set_ylim(-0.05, 1.45)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _memory(axes: Any, record: Record) -> None:
    """Right decisions by edit, for a memory above or below its rules, prefilled or spliced."""
    places: Any = record.summary["places"]
    names = [(place, edit) for place in ("early", "late") for edit in _EDITS]
    for number, (way, label, colour) in enumerate(_WAYS):
        bars(axes, [places[place][way][edit]["right"] for place, edit in names], number, len(_WAYS), label, colour)
    axes.axvline(len(_EDITS) - 0.5, color=GREY, lw=0.8)
    axes.set_xticks(range(len(names)), [_EDITS[edit] for _, edit in names], fontsize=7)
    axes.set_xlabel("the memory above the rules (left), and below them (right)")
    axes.set_ylabel("right decisions")
    axes.set_ylim(0, 1.35)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.legend(frameon=False, fontsize=8, loc="upper right")


FIGURES: dict[str, tuple[str, Callable[[Any, Record], None]]] = {
    "prevention": ("prevention", _prevention),
    "boundary": ("boundary", _boundary),
    "families": ("families", _families),
    "memory": ("memory", _memory),
    "seam": ("seam", _seam),
    "competing": ("seam", _competing),
}
"""Figure name -> its record's name and the function that draws it."""
