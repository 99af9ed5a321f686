"""The report of `explain_miss`: what became of each request, and the causes ranked by what they cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RequestFinding:
    """What became of one request."""

    number: int
    """from 1, in the order of the log"""
    source: str
    """file and line"""
    model: str
    protocol: str
    cause: str
    """the class; 'appended', 'first request' and 'new conversation' are no misses"""
    missed: bool
    """whether a prefix that was sent before was computed again"""
    compared_with: int | None
    """the number of the earlier request that this one continues"""
    place: str
    """the part in which the two first differ: tool list, system prompt, message n"""
    path: str
    """the same as a path in the request: `messages[3].content[0]`"""
    byte: int | None
    """bytes of text that are equal before the first difference"""
    token: int | None
    """equal tokens before the first difference, where a tokenizer was named or blocks are known"""
    total: int | None
    """the request's input in the report's unit; None where the upstream did not count it"""
    hit: int | None
    """what a prefix cache gave, or would have given"""
    lost: int | None
    """what was computed again though an earlier request had it"""
    money: float | None
    """what the loss cost; None where tokens or prices are not known"""
    line: str
    """the line at fault, with the changing value left out"""
    before: str
    """the earlier request's text around the first difference"""
    after: str
    """this request's text there"""
    behind: tuple[str, ...] = ()
    """what else differs behind it: the class and the place of each"""
    seconds: float | None = None
    """time since the request it was compared with"""


@dataclass(frozen=True, slots=True)
class MissCause:
    """One cause, over all requests that it struck."""

    name: str
    what: str
    """what happened"""
    fix: str
    """what to do about it"""
    place: str
    line: str
    """the line at fault, with the changing value left out"""
    requests: tuple[int, ...]
    """numbers of the requests"""
    lost: int
    share: float
    """of the whole input"""
    money: float | None
    worst: int
    """the number of the request that lost most by it"""


@dataclass(frozen=True, slots=True)
class MissReport:
    """What a log tells about its prefix cache."""

    unit: str
    """'tokens' or 'bytes'"""
    basis: str
    """where the numbers come from"""
    at_most: bool
    """whether losses are upper bounds"""
    total: int
    hit: int
    lost: int
    money: float | None
    currency: str
    findings: tuple[RequestFinding, ...]
    causes: tuple[MissCause, ...]
    """the dearest first"""
    notes: tuple[str, ...]
    """what the reader must know about the numbers"""
    skipped: tuple[str, ...] = ()
    """lines of the log that could not be read"""

    @property
    def share_lost(self) -> float:
        """The part of the input that was computed again."""
        return self.lost / self.total if self.total else 0.0

    @property
    def headline(self) -> str:
        """The report in one sentence."""
        if not self.findings:
            return "There is no request to compare."
        if not self.causes:
            if len(self.findings) == 1:
                return "There is one request, and nothing to compare it with."
            return "No prefix was lost: every request begins as an earlier one does, or begins a new conversation."
        count = len(self.causes)
        which = "One cause costs" if count == 1 else f"{count} causes cost"
        most = "at most " if self.at_most else ""
        price = "" if self.money is None else f", {self.currency} {self.money:,.2f}"
        return f"{which} you {most}{self.share_lost:.0%} of your input: {self.lost:,} of {self.total:,} {self.unit}{price}."

    def as_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        found = asdict(self)
        return {"headline": self.headline, "share_lost": self.share_lost, **found}

    def __str__(self) -> str:
        lines = [self.headline]
        for rank, cause in enumerate(self.causes, start=1):
            lines.append(
                f"{rank}. {cause.name}, {cause.place}: {cause.lost:,} {self.unit} ({cause.share:.0%}). {cause.what} {cause.fix}"
            )
        return "\n".join(lines)
