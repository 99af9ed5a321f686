"""Shared drawing code of the figures: colours, bars and curves with intervals, and axes of shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# The palette of Okabe and Ito (2008), whose colours remain distinct under the common forms of colour blindness.
BLUE, SKY, ORANGE, GREEN, RED, GREY = "#0072b2", "#56b4e9", "#e69f00", "#009e73", "#d55e00", "#777777"


def bars(axes: Any, shares: list[Any], number: int, of: int, label: str, colour: str) -> None:
    """Draw one series of proportions with their intervals: number `number` (from 0) of `of` series side by side."""
    width = 0.72 / of
    places = [index + (number - (of - 1) / 2) * width for index in range(len(shares))]
    # A proportion of 0 or 1 equals its own bound up to rounding, so a difference may come out negative.
    below = [max(0.0, share["value"] - share["low"]) for share in shares]
    above = [max(0.0, share["high"] - share["value"]) for share in shares]
    axes.bar(places, [share["value"] for share in shares], width=0.94 * width, color=colour, label=label)
    axes.errorbar(
        places, [share["value"] for share in shares], yerr=(below, above), fmt="none", ecolor="#222222", elinewidth=1,
        capsize=2,
    )  # fmt: skip


def curve(axes: Any, places: Sequence[float], found: Sequence[Any], label: str, colour: str, style: str = "-") -> None:
    """Draw a line through estimates, over a band of their intervals."""
    axes.fill_between(
        places, [each["low"] for each in found], [each["high"] for each in found], color=colour, alpha=0.15, lw=0
    )
    axes.plot(places, [each["value"] for each in found], style, marker="o", markersize=4, color=colour, label=label)


def shares(
    axes: Any, measure: str, *, low: float = 0.0, top: float, legend: str = "upper right", ncols: int = 1
) -> None:
    """Set up axes of shares: ticks from 0 to 1, room for a legend above them, and a line at 0 if `low` is negative."""
    if low < 0:
        axes.axhline(0, color="#222222", lw=0.6)
    axes.set_ylabel(measure)
    axes.set_ylim(low, top)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.legend(frameon=False, fontsize=8, loc=legend, ncols=ncols)
