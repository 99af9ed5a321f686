"""The two kinds of visibility: what a token may read of the context before it."""

from __future__ import annotations

from enum import StrEnum


class Visibility(StrEnum):
    """What a token may read of the text before it."""

    CAUSAL = "causal"
    """everything before it, as in any causal model"""
    DESIGN = "design"
    """a field is read only by lines that mention it, a skill reads only itself, turns read everything"""
