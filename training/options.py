"""Argument types that the commands of this folder share."""

from __future__ import annotations


def positive(text: str) -> int:
    """Parse an integer of at least 1, as an argparse type.

    Raises:
        ValueError: the text is not such an integer.
    """
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number
