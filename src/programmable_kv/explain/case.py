"""A case for the recognisers: two pieces that differ, and the requests around them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from programmable_kv.explain.difference import Change, Difference, common_length
from programmable_kv.explain.history import same_conversation
from programmable_kv.explain.pieces import Kind, Piece, Request
from programmable_kv.explain.volatile import Value, labels_before, line_bounds, volatile_at

_DIGITS = re.compile(r"\d+(?:[.,]\d+)*")
_EXCERPT = 120


@dataclass(frozen=True)
class Case:
    """A change, and the two requests in which it was found."""

    difference: Difference
    change: Change

    @property
    def earlier(self) -> Request:
        return self.difference.earlier

    @property
    def later(self) -> Request:
        return self.difference.later

    @property
    def before(self) -> Piece | None:
        return self.change.before

    @property
    def after(self) -> Piece | None:
        return self.change.after

    @property
    def both(self) -> bool:
        return self.before is not None and self.after is not None

    @property
    def texts(self) -> tuple[str, str]:
        return (self.before.text if self.before else "", self.after.text if self.after else "")

    @property
    def kinds(self) -> set[Kind]:
        return {piece.kind for piece in (self.before, self.after) if piece is not None}

    @property
    def same_kind(self) -> bool:
        return self.both and len(self.kinds) == 1

    @property
    def in_head(self) -> bool:
        """Whether the change is in the tools or the system prompt, before the conversation begins."""
        return bool(self.kinds & {Kind.TOOL, Kind.SYSTEM})

    @property
    def shown(self) -> bool:
        """Whether the texts of the change may be printed and searched."""
        return not any(piece.secret for piece in (self.before, self.after) if piece is not None)

    @cached_property
    def value(self) -> Value | None:
        """The clock, id or counter in which the two texts first differ, if it is one."""
        if not self.same_kind or not self.shown:
            return None
        return volatile_at(*self.texts, self.change.offset)

    @cached_property
    def lines(self) -> tuple[str, str]:
        """The line in which the texts first differ, in each of them."""
        start, stop, stop_after = line_bounds(*self.texts, self.change.offset)
        return self.texts[0][start:stop], self.texts[1][start:stop_after]

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The tags that are open where the texts first differ, or the heading above if no tag is open."""
        return labels_before(self.texts[1] or self.texts[0], self.change.offset)

    @cached_property
    def same_conversation(self) -> bool:
        """Whether the two requests have a message in common."""
        return same_conversation(self.earlier, self.later)

    @cached_property
    def other_conversation(self) -> bool:
        """Whether the requests have no message in common and the differing texts are not versions of one text."""
        return not self.same_conversation and not (self.same_kind and alike(*self.texts))

    @property
    def following_before(self) -> tuple[Piece, ...]:
        return self.earlier.pieces[self.difference.index + 1 :]

    @property
    def following_after(self) -> tuple[Piece, ...]:
        return self.later.pieces[self.difference.index + 1 :]

    @cached_property
    def template(self) -> str:
        """The line at fault without the value that changes: the same for every request in which this line changes."""
        if Kind.BLOCK in self.kinds or (Kind.TOOL in self.kinds and self.value is None):
            return ""
        line = self.lines[1] or self.lines[0]
        if self.value is None:
            return _shortened(_DIGITS.sub("#", line).strip())
        start = self.texts[1].rfind("\n", 0, self.change.offset) + 1
        head, tail = self.texts[1][start : self.value.start], line[self.value.stop_after - start :]
        return _shortened(f"{head[-_EXCERPT // 2 :]}…{tail[: _EXCERPT // 2]}".strip())


def alike(one: str, other: str) -> bool:
    """Whether one text is an edited form of the other: at least half of the longer text is in both, counted by lines or
    at its two ends."""
    longest = max(len(one), len(other))
    if longest == 0:
        return True
    start = common_length(one, other)
    rest = min(len(one), len(other)) - start
    end = min(common_length(one[::-1], other[::-1]), rest)
    lines = Counter(one.splitlines()) & Counter(other.splitlines())
    return 2 * max(start + end, sum(len(line) * count for line, count in lines.items())) >= longest


def without_numbers(text: str) -> str:
    """The text with every number replaced by `#`."""
    return _DIGITS.sub("#", text)


def _shortened(text: str) -> str:
    return text if len(text) <= _EXCERPT else f"{text[: _EXCERPT - 1]}…"
