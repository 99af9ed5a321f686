"""The two ways to read a context."""

from __future__ import annotations

from enum import StrEnum

from programmable_kv.errors import InvalidArgumentError


class Visibility(StrEnum):
    """What a token may read of the text before it."""

    CAUSAL = "causal"
    """everything: the way of any model"""
    DESIGN = "design"
    """a field only where a line mentions it, a skill nothing but itself, turns everything"""


def parse_visibility(visibility: str | Visibility) -> Visibility:
    """
    Raises:
        InvalidArgumentError: there is no such way; the message lists them.
    """
    try:
        return Visibility(visibility)
    except ValueError:
        raise InvalidArgumentError(f"visibility is one of {', '.join(Visibility)}; got {visibility!r}") from None
