"""The report of `explain_miss`: a finding for each request, and the causes ranked by their cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RequestFinding:
    """How a prefix cache served one request."""

    number: int
    """The request's number, from 1, in the order of the log."""
    source: str
    """The request's file and line."""
    model: str
    protocol: str
    cause: str
    """The class of the cause. Some are not misses, such as 'appended', 'first request' and 'new conversation'."""
    missed: bool
    """Whether a prefix that was sent before was recomputed."""
    compared_with: int | None
    """The number of the earlier request that this one is compared with."""
    place: str
    """The part in which the two requests first differ: tool list, system prompt, message n."""
    path: str
    """The same place as a path in the request: `messages[3].content[0]`."""
    byte: int | None
    """Equal bytes of text before the first difference."""
    token: int | None
    """Equal tokens before the first difference, if a tokenizer was named or blocks are known."""
    total: int | None
    """The request's input in the report's unit; None if the upstream did not count it."""
    hit: int | None
    """The amount that a prefix cache supplied, or would have supplied."""
    lost: int | None
    """The amount that was recomputed although an earlier request had it."""
    money: float | None
    """The cost of the loss; None if tokens or prices are unknown."""
    line: str
    """The line at fault, without the value that changes."""
    before: str
    """The earlier request's text around the first difference."""
    after: str
    """This request's text around the first difference."""
    behind: tuple[str, ...] = ()
    """Further differences behind the first: the class and the place of each."""
    seconds: float | None = None
    """Seconds since the request that it was compared with."""


@dataclass(frozen=True, slots=True)
class MissCause:
    """One cause of misses, summed over all requests that it affected."""

    name: str
    what: str
    """What happened."""
    fix: str
    """How to fix it."""
    place: str
    line: str
    """The line at fault, without the value that changes."""
    requests: tuple[int, ...]
    """The numbers of the affected requests."""
    lost: int
    share: float
    """The loss as a share of the whole input."""
    money: float | None
    worst: int
    """The number of the request that lost most."""


@dataclass(frozen=True, slots=True)
class MissReport:
    """What a log shows about the prefix cache."""

    unit: str
    """'tokens' or 'bytes'."""
    basis: str
    """The source of the numbers."""
    at_most: bool
    """Whether losses are upper bounds."""
    total: int
    hit: int
    lost: int
    money: float | None
    currency: str
    findings: tuple[RequestFinding, ...]
    causes: tuple[MissCause, ...]
    """The causes, the most expensive first."""
    notes: tuple[str, ...]
    """What the reader must know about the numbers."""
    skipped: tuple[str, ...] = ()
    """One sentence for each line of the log that could not be read."""

    @property
    def share_lost(self) -> float:
        """The share of the input that was recomputed although an earlier request had it."""
        return self.lost / self.total if self.total else 0.0

    @property
    def headline(self) -> str:
        """The report in one sentence."""
        if not self.findings:
            return "There are no requests to compare."
        if not self.causes:
            if len(self.findings) == 1:
                return "There is only one request, so there is nothing to compare it with."
            return "No prefix was lost: every request continues an earlier one or begins a new conversation."
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
