"""The figures of the documents; `pkv figures` draws them from the records in `results/`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from programmable_kv.drawing import BLUE, GREEN, GREY, ORANGE, RED, SKY, bars
from programmable_kv.figures_circuit import FIGURES as CIRCUIT
from programmable_kv.figures_doses import FIGURES as DOSES
from programmable_kv.figures_layers import FIGURES as LAYERS
from programmable_kv.figures_notes import FIGURES
from programmable_kv.figures_reading import FIGURES as READING
from programmable_kv.records import Record, read_record, results_folder

_MODE_ORDER = ("stale", "in_place", "selective", "erratum", "field_erratum", "suffix", "full")
_WAYS = {
    "full": ("full prefill", GREY),
    "suffix": ("suffix", RED),
    "clone": ("clone a cache, append", ORANGE),
    "selective": ("selective (k = 32)", GREEN),
    "field_erratum": ("field + erratum (default)", BLUE),
    "bare": ("one forward of as many tokens", SKY),
}

_COMPILED = (
    ("seam_4", "compiled alone, seam of 4", GREY),
    ("influence_16", "alone, 16 tokens recomputed by influence", ORANGE),
    ("preface_0", "compiled behind a preface", BLUE),
    ("preface_influence_16", "both", GREEN),
)
_COMPETING = {
    "rule_sets_1": "one set\nof rules",
    "rule_sets_2": "two sets",
    "rule_sets_3": "three sets",
    "rule_sets_6": "six sets",
    "fact": "one of\ntwo facts",
    "updates": "two\nupdates",
    "coupled": "facts are\noutside",
    "two_hops_split": "a lookup\nsplit in two",
}
_READERS = {
    "by_name": ("readers by name", GREY),
    "declared": ("declared", BLUE),
    "suggested": ("suggested", GREEN),
    "field_erratum": ("field + erratum", ORANGE),
}
_SPOKEN_OF = {
    "by_name": "by name",
    "often": "by name,\noften",
    "every_other": "one rule\nby name",
    "under_a_heading": "under a\nheading",
    "by_value": "by value\nonly",
    "by_pronoun": "by a\npronoun",
    "in_german": "in\nGerman",
    "through_a_group": "through\na group",
}


def draw_all(folder: Path) -> list[Path]:
    """Draw every figure whose record exists; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, (record_name, draw) in _FIGURES.items():
        source = results_folder() / f"{record_name}.json"
        if source.exists():
            path = folder / f"{name}.svg"
            _save(draw, read_record(source), path)
            drawn.append(path)
    return drawn


def _save(draw: Callable[[Any, Record], None], record: Record, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # The salt and the empty metadata make the same record give the same file, byte for byte.
    with matplotlib.rc_context({"svg.hashsalt": "pkv", "font.size": 10, "svg.fonttype": "path"}):
        figure, axes = pyplot.subplots(figsize=(7.2, 3.8), layout="constrained")
        draw(axes, record)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def _modes(axes: Any, record: Record) -> None:
    """Agreement with a full prefill, by edit mode; answered at once, and after restating the field."""
    series = (("asked_before", "answers at once", BLUE), ("think", "restates the field first", ORANGE))
    for number, (key, label, colour) in enumerate(series):
        part: Any = record.summary[key]
        shares = [part[mode]["agreement"] for mode in _MODE_ORDER]
        bars(axes, shares, number, len(series), label, colour)
    axes.set_xticks(
        range(len(_MODE_ORDER)), [mode.replace("_", "\n+ " if mode == "field_erratum" else " ") for mode in _MODE_ORDER]
    )
    axes.set_ylabel("decides as a full prefill")
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False, loc="upper left")


def _composing(axes: Any, record: Record) -> None:
    """Agreement with a full prefill of skills compiled alone, repaired, and behind a preface, by kind of question."""
    summary: Any = record.summary
    for number, (arm, label, colour) in enumerate(_COMPILED):
        shares = [summary[kind]["system_512"][arm]["agreement"] for kind in _COMPETING]
        bars(axes, shares, number, len(_COMPILED), label, colour)
    axes.set_xticks(range(len(_COMPETING)), list(_COMPETING.values()), fontsize=9)
    axes.set_ylabel("decides as a full prefill")
    axes.set_ylim(0, 1.25)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.legend(frameon=False, loc="upper left", ncols=2, fontsize=9)


def _mentions(axes: Any, record: Record) -> None:
    """Agreement with a full prefill of readers by name, declared and suggested, by how the rules refer to the field."""
    summary: Any = record.summary
    for number, (arm, (label, colour)) in enumerate(_READERS.items()):
        shares = [summary[way][arm]["agreement"] for way in _SPOKEN_OF]
        bars(axes, shares, number, len(_READERS), label, colour)
    axes.set_xticks(range(len(_SPOKEN_OF)), list(_SPOKEN_OF.values()), fontsize=9)
    axes.set_ylabel("decides as a full prefill")
    axes.set_ylim(0, 1.25)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.legend(frameon=False, loc="upper left", ncols=4, fontsize=9)


def _ttft(axes: Any, record: Record) -> None:
    """Time to the first token against context length, both axes logarithmic."""
    rows = sorted(record.rows, key=lambda row: row["length"])
    lengths = [row["tokens"] for row in rows]
    for way, (label, colour) in _WAYS.items():
        style = "--" if way == "bare" else "-"
        axes.plot(
            lengths, [row["ttft_ms"][way] for row in rows], style, marker="o", markersize=4, color=colour, label=label
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xlabel("tokens in the context")
    axes.set_ylabel("ms to the first answer token")
    axes.legend(frameon=False, fontsize=8)


_FIGURES: dict[str, tuple[str, Callable[[Any, Record], None]]] = {
    "edit-modes": ("edit-modes", _modes),
    "edit-ttft": ("edit-ttft", _ttft),
    "composing": ("compose-embedded-plain", _composing),
    "mentions": ("mentions", _mentions),
    **FIGURES,
    **READING,
    **CIRCUIT,
    **LAYERS,
    **DOSES,
}
