"""Which tables of rotary frequencies a forward computes with.

Some scalings choose the table by the length that a forward reaches, which is its largest position plus one. LongRoPE has two:
one up to the length of the first training, one beyond. Dynamic NTK makes a new one for every length beyond what the model was
configured for. Keys computed with one table and queries computed with another give attention scores that no full forward
gives, so rows of two tables must not meet in one cache.
Source: transformers, `modeling_rope_utils.dynamic_rope_update`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from programmable_kv.errors import FrequencyRegimeError

Tables = tuple[int, ...]
"""One number for each rule of a model: 0 for the table that it is loaded with, another number for another table."""


@dataclass(frozen=True, slots=True)
class FrequencyRule:
    """How one scaling chooses its table."""

    name: str
    within: int
    """the largest length that the first table serves, in positions"""
    every_length: bool = False
    """whether each length beyond has a table of its own (or else all share one)"""

    def table(self, length: int) -> int:
        """The table of a forward that reaches `length` positions."""
        if length <= self.within:
            return 0
        return length if self.every_length else 1


def tables_at(rules: Sequence[FrequencyRule], length: int) -> Tables:
    """The tables of a forward that reaches `length` positions."""
    return tuple(rule.table(length) for rule in rules)


def first_reaching(rules: Sequence[FrequencyRule], positions: Sequence[int]) -> int:
    """How many of the ascending positions a forward must have so that it computes with the tables that all of them need."""
    if not positions or not rules:
        return min(1, len(positions))
    final = tables_at(rules, positions[-1] + 1)
    low, high = 1, len(positions)
    while low < high:
        middle = (low + high) // 2
        if tables_at(rules, positions[middle - 1] + 1) == final:
            high = middle
        else:
            low = middle + 1
    return low


def require_same(rules: Sequence[FrequencyRule], length: int, cached: Tables | None, model_type: str) -> Tables:
    """The tables of a forward that reaches `length` positions beside rows that were computed with `cached` (None: no rows).

    Raises:
        FrequencyRegimeError: the two differ.
    """
    tables = tables_at(rules, length)
    if cached is not None and cached != tables:
        raise FrequencyRegimeError(
            f"a forward that reaches position {length - 1} would compute with other rotary frequencies than the tokens in the "
            f"cache: {_described(rules, model_type)}. Stay on the cached tokens' side of that bound, or compute the whole "
            "context anew, from its start, in one forward."
        )
    return tables


def require_first(rules: Sequence[FrequencyRule], tables: Tables | None, model_type: str) -> None:
    """
    Raises:
        FrequencyRegimeError: keys that were computed with these tables cannot be rotated, because relocation was proved for
            the first ones only.
    """
    if tables is not None and any(tables):
        raise FrequencyRegimeError(
            "keys cannot be rotated here: relocation was proved for the first frequencies only, and "
            f"{_described(rules, model_type)}. Compute the text anew at its place."
        )


def _described(rules: Sequence[FrequencyRule], model_type: str) -> str:
    return f"{model_type} has {' and '.join(f'{rule.name}, which change beyond {rule.within} positions' for rule in rules)}"
