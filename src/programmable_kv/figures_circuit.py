"""The figures of `docs/mechanism.md` about paths: what gradients rank, and which heads write and read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from programmable_kv.drawing import BLUE, GREEN, GREY, ORANGE, bars
from programmable_kv.records import Record

_SCORES = {
    "attributed": "attribution",
    "dropped": "gradients\ndropped",
    "linear": "plain\ngradients",
    "moved": "how far\nit moves",
    "attention": "attention",
    "shuffled": "random\norder",
}
_ALIKE = (
    ("sizes", "all tokens", GREY),
    ("felt", "tokens that do anything", BLUE),
    ("first", "first eight shared", ORANGE),
)
_ARMS = (
    ("alone", "only these heads read the new notes", BLUE, "-"),
    ("rest", "everything else is new", ORANGE, "-"),
    ("random", "as many random heads", GREY, "-"),
)


def _attribution(axes: Any, record: Record) -> None:
    """How alike each score and the exact effects rank tokens."""
    found: Any = record.summary["tokens"]
    for number, (key, label, colour) in enumerate(_ALIKE):
        bars(axes, [found[score][key] for score in _SCORES], number, len(_ALIKE), label, colour)
    axes.set_xticks(range(len(_SCORES)), list(_SCORES.values()), fontsize=8)
    axes.set_ylabel("agreement with exact effects")
    axes.axhline(0, color="#222222", lw=0.6)
    axes.set_ylim(-0.1, 1.25)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=3)


def _path_closure(axes: Any, record: Record) -> None:
    """Recovery by the number of heads that read the notes of both rules, and by those that write the actions."""
    read: Any = record.summary["read"]
    write: Any = record.summary["write"]
    for arm, label, colour, style in _ARMS:
        _curve(axes, {int(k): each[arm] for k, each in read["both_rules"].items()}, label, colour, style)
    _curve(axes, {int(k): each["alone"] for k, each in write.items()}, "these heads write the actions", GREEN, "--")
    counts = sorted(int(k) for k in read["both_rules"])
    axes.axhline(0, color="#222222", lw=0.6)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(k) for k in counts])
    axes.set_xlabel("heads")
    axes.set_ylabel("recovery of the new decision")
    axes.set_ylim(-0.15, 1.4)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


def _curve(axes: Any, found: dict[int, Any], label: str, colour: str, style: str) -> None:
    counts = sorted(found)
    axes.fill_between(
        counts, [found[k]["low"] for k in counts], [found[k]["high"] for k in counts], color=colour, alpha=0.15, lw=0
    )
    axes.plot(counts, [found[k]["value"] for k in counts], style, marker="o", markersize=4, color=colour, label=label)


FIGURES: dict[str, tuple[str, Callable[[Any, Record], None]]] = {
    "attribution": ("attribution", _attribution),
    "path-closure": ("path-closure", _path_closure),
}
"""each figure's record, and what draws it"""
