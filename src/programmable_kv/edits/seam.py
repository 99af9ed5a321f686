"""The seam of a spliced skill: which of its tokens are computed again in their place.

A skill was compiled with nothing before it, or behind a preface that is not here. Its first tokens would have read most of
what precedes them, and served as the attention sink of the lone text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from programmable_kv.arguments import require
from programmable_kv.cache.buffer import KVBuffer
from programmable_kv.cache.span import Span
from programmable_kv.edits.selection import MostAttended, MostDeviating, Selection
from programmable_kv.engine import Engine, Rows
from programmable_kv.errors import InvalidEditError

DEFAULT_SEAM = 4
_SPELLED = re.compile(r"(deviation):(\d+(?:\.\d+)?)%|(influence):(\d+)")


@dataclass(frozen=True, slots=True)
class SeamRepair:
    """The first `seam` tokens, and those that `rule` picks.

    `"deviation:15%"`: the share whose keys differ most from what they would be in place (CacheBlend's rule, arXiv 2405.16444,
    section 4; finding out computes the whole skill once, which the account counts). `"influence:8"`: the tokens that its own
    last one attends to most.
    """

    seam: int = DEFAULT_SEAM
    rule: str | None = None

    def __post_init__(self) -> None:
        require(self.seam, int, "a seam is a number of tokens")
        if self.seam < 0:
            raise InvalidEditError(f"a seam has at least 0 tokens, got {self.seam}")
        if self.rule is not None and not _SPELLED.fullmatch(self.rule):
            raise InvalidEditError(
                f"there is no repair {self.rule!r}; write for example 'deviation:15%' or 'influence:8'"
            )

    @property
    def computes(self) -> bool:
        """Whether anything is computed again at all."""
        return self.seam > 0 or self.rule is not None

    def first(self, span: Span) -> Span:
        """The slots of the seam, of a skill in the slots `span`."""
        return Span(span.start, min(span.stop, span.start + self.seam))

    def selection(self, span: Span, ids: tuple[int, ...]) -> Selection | None:
        """What picks further tokens of that skill."""
        match = _SPELLED.fullmatch(self.rule) if self.rule else None
        if match is None:
            return None
        if match[1]:
            return MostDeviating(span, ids, float(match[2]) / 100)
        return MostAttended(span, ids[-1], int(match[4]))

    def slots(self, engine: Engine, buffer: KVBuffer, ids: tuple[int, ...], span: Span) -> list[int]:
        """Both, ascending, of a skill of these tokens that was just inserted into `span`. The buffer is unchanged."""
        chosen = set(self.first(span).range)
        selection = self.selection(span, ids)
        if selection is not None:
            chosen |= selection.choose(engine, buffer, Rows())
        return sorted(chosen)
