"""The figures of `docs/mechanism.md` about wrong notes, thoughts, and models during training."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from programmable_kv.drawing import BLUE, GREEN, GREY, ORANGE, RED, SKY, bars, shares
from programmable_kv.records import Record

_REPAIRED = {
    "0": "none",
    "8": "8 tokens",
    "all": "all later\ntokens",
    "times_2": "8 tokens,\ntwice as far",
    "times_4": "8 tokens,\n4 times as far",
    "random_times_4": "8 random,\n4 times as far",
}
_REPAIRS = (("erratum", "erratum", ORANGE), ("field_erratum", "field + erratum", BLUE), ("readers", "readers", GREEN))
_BLOCKED = (
    (("nothing", "nothing"), "nothing"),
    (("field", "nothing"), "thought\nfrom field"),
    (("random_as_field", "nothing"), "thought from\nas many random"),
    (("rules", "nothing"), "thought\nfrom rules"),
    (("random_as_rules", "nothing"), "thought from\nas many random"),
    (("nothing", "field"), "decision\nfrom field"),
    (("nothing", "thought"), "decision\nfrom thought"),
    (("nothing", "random_as_thought"), "decision from\nas many random"),
)
_CARRIED = (
    ("actions", "actions of the rules", BLUE),
    ("field", "the field", RED),
    ("random_as_actions", "random", GREY),
)


def _dose(axes: Any, record: Record) -> None:
    """Share of edits that a cache with wrong notes follows, by dose and by edit mode."""
    repaired: Any = record.summary["repaired"]
    for number, (mode, label, colour) in enumerate(_REPAIRS):
        bars(axes, [repaired[dose][mode]["right"] for dose in _REPAIRED], number, len(_REPAIRS), label, colour)
    axes.set_xticks(range(len(_REPAIRED)), list(_REPAIRED.values()), fontsize=8)
    axes.set_xlabel("notes of another value in the cache")
    shares(axes, "edits that take effect", top=1.3, ncols=3)


def _reasoning(axes: Any, record: Record) -> None:
    """Right decisions after a thought, by what the thought or the decision could not read; edited and fresh cache."""
    summary: Any = record.summary
    for number, (cache, label, colour) in enumerate((("in_place", "edited in place", BLUE), ("fresh", "fresh", SKY))):
        right = [summary[cache][thought][decision]["right"] for (thought, decision), _ in _BLOCKED]
        bars(axes, right, number, 2, label, colour)
    axes.set_xticks(range(len(_BLOCKED)), [name for _, name in _BLOCKED], fontsize=7)
    axes.set_xlabel("blocked reading")
    shares(axes, "right decisions", top=1.3, ncols=2)


def _emergence(axes: Any, record: Record) -> None:
    """Right decisions, obeyed updates and carriers of the decision while toy models train.

    What each carrier moves is relative to the span at the last step.
    """
    steps = [step["step"] for step in record.rows[0]["steps"]]
    found = [[row["steps"][index] for row in record.rows] for index in range(len(steps))]
    final = fmean(step["span"] for step in found[-1])
    axes.plot(steps, [fmean(s["right"] for s in each) for each in found], color=GREEN, label="right under both values")
    axes.plot(steps, [fmean(s["obeyed"] for s in each) for each in found], color=ORANGE, label="update obeyed")
    for name, label, colour in _CARRIED:
        carried = [fmean(s["moved"][name] for s in each) / final for each in found]
        axes.plot(steps, carried, "--", color=colour, label=f"carried by {label}")
    axes.set_xlabel("steps of training")
    axes.set_ylabel("share")
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.legend(frameon=False, fontsize=8)


FIGURES: dict[str, tuple[str, Callable[[Any, Record], None]]] = {
    "dose": ("dose", _dose),
    "reasoning": ("reasoning", _reasoning),
    "emergence": ("emergence", _emergence),
}
"""Figure name -> its record's name and the function that draws it."""
