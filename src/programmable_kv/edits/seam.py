"""The seam of a spliced skill: which of its tokens are recomputed in the context where it was spliced.

A skill was compiled with nothing before it, or after a preface that is not in this context. In this context its first
tokens would have read most of what precedes them. When the skill was compiled alone, they served as its attention sink.
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
    """Which tokens of a spliced skill to recompute: its first `seam` tokens, and those that `rule` picks.

    Args:
        seam: how many of the skill's first tokens to recompute.
        rule: `"deviation:15%"` picks that share of the tokens, those whose keys differ most from keys computed in this context
            (CacheBlend's rule, arXiv 2405.16444, section 4; this computes the whole skill once, which the account
            counts). `"influence:8"` picks the 8 tokens that the skill's last token attends to most. None picks no
            further tokens.

    Raises:
        InvalidArgumentError: `seam` is not a whole number.
        InvalidEditError: `seam` is negative, or `rule` cannot be read.
    """

    seam: int = DEFAULT_SEAM
    rule: str | None = None

    def __post_init__(self) -> None:
        require(self.seam, int, "a seam is a number of tokens")
        if self.seam < 0:
            raise InvalidEditError(f"a seam has at least 0 tokens, got {self.seam}")
        if self.rule is not None and not _SPELLED.fullmatch(self.rule):
            raise InvalidEditError(
                f"unknown repair rule {self.rule!r}; write, for example, 'deviation:15%' or 'influence:8'"
            )

    @property
    def computes(self) -> bool:
        """Whether any token is recomputed."""
        return self.seam > 0 or self.rule is not None

    def first(self, span: Span) -> Span:
        """The slots of the seam, for a skill in the slots `span`."""
        return Span(span.start, min(span.stop, span.start + self.seam))

    def selection(self, span: Span, ids: tuple[int, ...]) -> Selection | None:
        """The selection that picks further tokens of a skill in the slots `span`; None without a rule."""
        match = _SPELLED.fullmatch(self.rule) if self.rule else None
        if match is None:
            return None
        if match[1]:
            return MostDeviating(span, ids, float(match[2]) / 100)
        return MostAttended(span, ids[-1], int(match[4]))

    def slots(self, engine: Engine, buffer: KVBuffer, ids: tuple[int, ...], span: Span) -> list[int]:
        """The slots to recompute, ascending, for a skill just inserted into the slots `span`. The buffer is unchanged.

        `ids` are the skill's token ids.
        """
        chosen = set(self.first(span).range)
        selection = self.selection(span, ids)
        if selection is not None:
            chosen |= selection.choose(engine, buffer, Rows())
        return sorted(chosen)
