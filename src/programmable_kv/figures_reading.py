"""The figures of `docs/mechanism.md` on who reads what: prevention, the place of a field, skills compiled alone."""

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
    "below_far": "below, other\nlines follow",
    "below": "below\nits rules",
    "in_question": "in the\nquestion",
}
_PATCHED = (
    ("field", "the field's own keys and values", BLUE),
    ("actions", "actions of the rules behind it", ORANGE),
    ("tail", "question and template", GREY),
)
_DEVIATIONS = (
    ("alone", "compiled alone", ORANGE),
    ("null", "in the context, behind other lines", GREY),
    ("preface", "compiled behind a preface", BLUE),
)


def _prevention(axes: Any, record: Record) -> None:
    """Right decisions by what may read the field, beside guessing."""
    arms: Any = record.summary["arms"]
    bars(axes, [arms[name]["right"] for name in _READERS], 0, 1, "right, before and after an edit", BLUE)
    axes.axhline(record.figure("guess"), color=RED, lw=1, label="a guess")
    axes.set_xticks(range(len(_READERS)), list(_READERS.values()), fontsize=7)
    axes.set_xlabel("what may read the field, beside the question")
    shares(axes, "right decisions", top=1.25)


def _boundary(axes: Any, record: Record) -> None:
    """Recovery of the field alone, the rules' actions and the question patched, by where the field stands."""
    settings: Any = record.summary["settings"]
    for number, (key, label, colour) in enumerate(_PATCHED):
        found = [settings[name][key]["recovery"] for name in _PLACES]
        bars(axes, found, number, len(_PATCHED), label, colour)
    axes.set_xticks(range(len(_PLACES)), list(_PLACES.values()), fontsize=9)
    axes.set_xlabel("where the field stands")
    shares(axes, "recovery of the new decision", low=-0.02, top=1.4)


def _seam(axes: Any, record: Record) -> None:
    """How far values are off inside a skill, by position, behind different things."""
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
    """The deciding row's attention to the actions of the skill that is asked about, and of the other one."""
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


FIGURES: dict[str, tuple[str, Callable[[Any, Record], None]]] = {
    "prevention": ("prevention", _prevention),
    "boundary": ("boundary", _boundary),
    "seam": ("seam", _seam),
    "competing": ("seam", _competing),
}
"""each figure's record, and what draws it"""
