"""A run: consecutive cached tokens that were computed together, with the version that they have read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from programmable_kv.ledger.version import TOKEN_BYTES, Content, Statement, Version


class Origin(StrEnum):
    """How a run's keys and values were made."""

    COMPUTED = "computed"
    """appended, or recomputed together with everything after it"""
    REPAIRED = "repaired"
    """tokens of a spliced skill, recomputed in their place"""
    REFRESHED = "refreshed"
    """recomputed in the middle of the context by an edit"""
    COMPILED = "compiled"
    """spliced: computed apart from this context"""
    PENDING = "pending"
    """a gap that the plan's next step fills"""


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens (ids of four bytes each), the version that they read, and the field values that they state themselves."""

    tokens: bytes
    version: Version
    """what was before the first token when the run was computed"""
    statements: tuple[Statement, ...] = ()
    """ascending by offset"""
    origin: Origin = Origin.COMPUTED
    skill: Content | None = None
    """for a compiled run, the skill's own tokens before it"""

    def __len__(self) -> int:
        return len(self.tokens) // TOKEN_BYTES

    def split(self, at: int) -> tuple[Run, Run]:
        """Split into two runs; the version of the second includes the first."""
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
