"""What the commands of this folder share in reading their options."""

from __future__ import annotations


def positive(text: str) -> int:
    """A whole number above zero, as an argparse type.

    Raises:
        ValueError: it is none.
    """
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number
