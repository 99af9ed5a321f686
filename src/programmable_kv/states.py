"""The state of a cached token: how its keys and values relate to a full prefill, on one scale, strongest first."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum


class TokenState(StrEnum):
    """How a cached token's keys and values relate to a full prefill of the current text.

    The members are ordered: the state of several tokens is the weakest among them. The first two are exact, which
    implies that every token before them is exact too.
    """

    EXACT = "exact"
    """a full prefill of these tokens at these positions gives the same numbers"""
    REPAIRED = "repaired"
    """exact too: the first tokens of a spliced skill, recomputed in their place"""
    RELOCATED = "relocated"
    """compiled apart from this context and rotated to its position here; or stored in fewer bits"""
    REFRESHED = "refreshed"
    """recomputed on the current text, but on a cache that was not exact"""
    AFTER_EDIT = "after edit"
    """computed on the current text, but reading tokens of an earlier text or several values of a field"""
    STALE = "stale"
    """computed on another text, or under a value that has changed since"""

    @property
    def rank(self) -> int:
        """The rank on the scale; 0 is the strongest."""
        return _RANKS[self]

    @property
    def exact(self) -> bool:
        """Whether a full prefill gives the same keys and values."""
        return self.rank <= TokenState.REPAIRED.rank


_RANKS = {state: rank for rank, state in enumerate(TokenState)}


def weakest(states: Iterable[TokenState]) -> TokenState:
    """The weakest of several states; exact if there are none."""
    return max(states, key=lambda state: state.rank, default=TokenState.EXACT)
