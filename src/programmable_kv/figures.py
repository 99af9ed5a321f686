"""Every figure of the documents, drawn from the records in `results/` by `pkv figures`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from programmable_kv.records import Record, read_record, results_folder

# Okabe and Ito's palette (2008), which the common colour blindnesses tell apart.
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#777777"
_MODE_ORDER = ("stale", "in_place", "selective", "erratum", "field_erratum", "suffix", "full")
_WAYS = {
    "full": ("full prefill", _GREY),
    "suffix": ("suffix", _RED),
    "clone": ("clone a cache, append", _ORANGE),
    "selective": ("selective (k = 32)", _GREEN),
    "field_erratum": ("field + erratum (default)", _BLUE),
    "bare": ("bare forward of as many tokens", "#56b4e9"),
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

    # The same record gives the same file, byte for byte.
    with matplotlib.rc_context({"svg.hashsalt": "pkv", "font.size": 10, "svg.fonttype": "path"}):
        figure, axes = pyplot.subplots(figsize=(7.2, 3.8), layout="constrained")
        draw(axes, record)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def _modes(axes: Any, record: Record) -> None:
    """Agreement with full prefill, by mode; direct and with a thought."""
    series = (("asked_before", "answers at once", _BLUE), ("think", "restates the field first", _ORANGE))
    for number, (key, label, colour) in enumerate(series):
        part: Any = record.summary[key]
        places = [index + (number - 0.5) * 0.36 for index in range(len(_MODE_ORDER))]
        shares = [part[mode]["agreement"] for mode in _MODE_ORDER]
        values = [share["value"] for share in shares]
        # A proportion of 0 or 1 meets its own bound, up to rounding.
        below = [max(0.0, share["value"] - share["low"]) for share in shares]
        above = [max(0.0, share["high"] - share["value"]) for share in shares]
        axes.bar(places, values, width=0.34, color=colour, label=label)
        axes.errorbar(places, values, yerr=(below, above), fmt="none", ecolor="#222222", elinewidth=1, capsize=2)
    axes.set_xticks(
        range(len(_MODE_ORDER)), [mode.replace("_", "\n+ " if mode == "field_erratum" else " ") for mode in _MODE_ORDER]
    )
    axes.set_ylabel("decides as a full prefill")
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False, loc="upper left")


def _ttft(axes: Any, record: Record) -> None:
    """Time to first token against context length, both logarithmic."""
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
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("ms to the first answer token")
    axes.legend(frameon=False, fontsize=8)


_FIGURES: dict[str, tuple[str, Callable[[Any, Record], None]]] = {
    "edit-modes": ("edit-modes", _modes),
    "edit-ttft": ("edit-ttft", _ttft),
}
