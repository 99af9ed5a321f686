"""The two ways to read a context."""

from __future__ import annotations

from enum import StrEnum


class Visibility(StrEnum):
    """What a token may read of the text before it."""

    CAUSAL = "causal"
    """everything: the way of any model"""
    DESIGN = "design"
    """a field only where a line mentions it, a skill nothing but itself, turns everything"""
