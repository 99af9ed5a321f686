"""A run: consecutive cached tokens that were computed together, and what they have read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from programmable_kv.ledger.version import TOKEN_BYTES, Content, Statement, Version


class Origin(StrEnum):
    """How a run's keys and values got here."""

    COMPUTED = "computed"
    """appended, or computed again with everything after it"""
    REPAIRED = "repaired"
    """a spliced skill's tokens, computed again in their place"""
    REFRESHED = "refreshed"
    """computed again in the middle of the context by an edit"""
    COMPILED = "compiled"
    """spliced: computed apart from this context"""
    PENDING = "pending"
    """a gap that the plan's next step fills"""


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens (ids in four bytes each) with the version they read and the values of fields that they hold themselves."""

    tokens: bytes
    version: Version
    """what was before its first token when it was computed"""
    statements: tuple[Statement, ...] = ()
    """ascending by offset"""
    origin: Origin = Origin.COMPUTED
    skill: Content | None = None
    """of a compiled run: the skill's own tokens before it"""

    def __len__(self) -> int:
        return len(self.tokens) // TOKEN_BYTES

    def split(self, at: int) -> tuple[Run, Run]:
        """Two runs out of one; what the second has read includes the first."""
        head, tail = self.tokens[: at * TOKEN_BYTES], self.tokens[at * TOKEN_BYTES :]
        before = tuple(statement for statement in self.statements if statement[0] < at)
        after = tuple((offset - at, name, value) for offset, name, value in self.statements if offset >= at)
        first = replace(self, tokens=head, statements=before)
        second = replace(
            self,
            tokens=tail,
            version=self.version.after(head, before),
            statements=after,
            skill=None if self.skill is None else self.skill.extended(head),
        )
        return first, second
