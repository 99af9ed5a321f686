"""The tables of rotary frequencies that a forward computes with.

Some RoPE scalings choose the table by the length of a forward, which is its largest position plus one. LongRoPE has two
tables: one up to the original training length, one beyond. Dynamic NTK makes a new table for every length beyond the
configured one. Keys from one table and queries from another give attention scores that no full forward gives, so one
cache must not contain rows of two tables.
Source: transformers, `modeling_rope_utils.dynamic_rope_update`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from programmable_kv.errors import FrequencyRegimeError

Tables = tuple[int, ...]
"""One number for each rule of a model: 0 is the table that the model is loaded with, other numbers are other tables."""


@dataclass(frozen=True, slots=True)
class FrequencyRule:
    """How one RoPE scaling chooses its frequency table."""

    name: str
    within: int
    """the largest length for which the first table is used, in positions"""
    every_length: bool = False
    """whether each length beyond has its own table; if False, all share one"""

    def table(self, length: int) -> int:
        """The table of a forward that reaches `length` positions."""
        if length <= self.within:
            return 0
        return length if self.every_length else 1


def tables_at(rules: Sequence[FrequencyRule], length: int) -> Tables:
    """The tables of a forward that reaches `length` positions."""
    return tuple(rule.table(length) for rule in rules)


def first_reaching(rules: Sequence[FrequencyRule], positions: Sequence[int]) -> int:
    """How many of the ascending positions the first forward must include to use the tables that all of them need."""
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
    """The tables of a forward that reaches `length` positions, which must equal the `cached` rows' (None: no rows).

    Raises:
        FrequencyRegimeError: the tables differ.
    """
    tables = tables_at(rules, length)
    if cached is not None and cached != tables:
        raise FrequencyRegimeError(
            f"a forward that reaches position {length - 1} would use different rotary frequencies from the cached "
            f"tokens: {_described(rules, model_type)}. Stay on the cached tokens' side of that bound, or recompute the "
            "whole context from its start in one forward."
        )
    return tables


def require_first(rules: Sequence[FrequencyRule], tables: Tables | None, model_type: str) -> None:
    """
    Raises:
        FrequencyRegimeError: keys computed with these tables cannot be rotated, because relocation was proved for the
            first tables only.
    """
    if tables is not None and any(tables):
        raise FrequencyRegimeError(
            "keys cannot be rotated here: relocation was proved for the first frequencies only, and "
            f"{_described(rules, model_type)}. Recompute the text in its place."
        )


def _described(rules: Sequence[FrequencyRule], model_type: str) -> str:
    return f"{model_type} has {' and '.join(f'{rule.name}, which change beyond {rule.within} positions' for rule in rules)}"
