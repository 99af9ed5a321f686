"""The figures of `docs/mechanism.md` about paths: how gradients rank tokens, and which heads write and read notes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from programmable_kv.drawing import BLUE, GREEN, GREY, ORANGE, bars, curve, shares
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
    ("felt", "tokens with any effect", BLUE),
    ("first", "first eight shared", ORANGE),
)
_ARMS = (
    ("alone", "only these heads read the new notes", BLUE, "-"),
    ("rest", "everything but these heads is new", ORANGE, "-"),
    ("random", "as many random heads", GREY, "-"),
)


def _attribution(axes: Any, record: Record) -> None:
    """How well the ranking of tokens by each score agrees with the ranking by exact effects."""
    found: Any = record.summary["tokens"]
    for number, (key, label, colour) in enumerate(_ALIKE):
        bars(axes, [found[score][key] for score in _SCORES], number, len(_ALIKE), label, colour)
    axes.set_xticks(range(len(_SCORES)), list(_SCORES.values()), fontsize=8)
    shares(axes, "agreement with exact effects", low=-0.1, top=1.25, ncols=3)


def _path_closure(axes: Any, record: Record) -> None:
    """Recovery by the number of heads that read the notes of both rules, and by the number that write the actions."""
    read: Any = record.summary["read"]
    write: Any = record.summary["write"]
    counts = sorted(int(k) for k in read["both_rules"])
    for arm, label, colour, style in _ARMS:
        curve(axes, counts, [read["both_rules"][str(k)][arm] for k in counts], label, colour, style)
    writers = sorted(int(k) for k in write)
    curve(axes, writers, [write[str(k)]["alone"] for k in writers], "these heads write the actions", GREEN, "--")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(k) for k in counts])
    axes.set_xlabel("heads")
    shares(axes, "recovery of the new decision", low=-0.15, top=1.4, legend="upper left", ncols=2)


FIGURES: dict[str, tuple[str, Callable[[Any, Record], None]]] = {
    "attribution": ("attribution", _attribution),
    "path-closure": ("path-closure", _path_closure),
}
"""Figure name -> its record's name and the function that draws it."""
