"""What the figures share: colours, and bars with intervals."""

from __future__ import annotations

from typing import Any

# Okabe and Ito's palette (2008), which the common colour blindnesses tell apart.
BLUE, SKY, ORANGE, GREEN, RED, GREY = "#0072b2", "#56b4e9", "#e69f00", "#009e73", "#d55e00", "#777777"


def bars(axes: Any, shares: list[Any], number: int, of: int, label: str, colour: str) -> None:
    """One series of proportions with their intervals, the `number`th of `of` that stand side by side."""
    width = 0.72 / of
    places = [index + (number - (of - 1) / 2) * width for index in range(len(shares))]
    # A proportion of 0 or 1 meets its own bound, up to rounding.
    below = [max(0.0, share["value"] - share["low"]) for share in shares]
    above = [max(0.0, share["high"] - share["value"]) for share in shares]
    axes.bar(places, [share["value"] for share in shares], width=0.94 * width, color=colour, label=label)
    axes.errorbar(
        places, [share["value"] for share in shares], yerr=(below, above), fmt="none", ecolor="#222222", elinewidth=1,
        capsize=2,
    )  # fmt: skip
