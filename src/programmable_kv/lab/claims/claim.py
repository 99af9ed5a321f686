"""A published claim with its status and its evidence, and a check that the records still support the status."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.resources import files
from typing import Any, Literal

from programmable_kv.errors import RecordError
from programmable_kv.records import Record

Bound = Literal["value", "low", "high"]


class Status(StrEnum):
    """What our records say about a claim."""

    REPRODUCED = "reproduced"
    """true here, by our own measure"""
    BOUNDED = "bounded"
    """true here, within limits that the evidence states"""
    REFUTED = "refuted"
    """false here, measured as it should be"""
    NOT_TESTED = "not tested yet"
    NOT_TESTABLE = "not testable here"

    @property
    def needs_evidence(self) -> bool:
        return self not in (Status.NOT_TESTED, Status.NOT_TESTABLE)


@dataclass(frozen=True, slots=True)
class Evidence:
    """A condition on a figure of a record."""

    record: str
    figure: str
    """the figure's path in the record's summary; an interval or a number"""
    of: str
    """what the figure measures"""
    bound: Bound = "value"
    """which end of the interval must satisfy the condition"""
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"{self.record}:{self.figure} needs exactly one condition: at_least or at_most")
        if self.bound not in ("value", "low", "high"):
            raise ValueError(f"a bound must be value, low or high, not {self.bound!r}")

    @property
    def condition(self) -> str:
        """The condition as text for a reader, such as `low end >= 0.9`."""
        sign, bar = (">=", self.at_least) if self.at_least is not None else ("<=", self.at_most)
        end = {"value": "", "low": "low end ", "high": "high end "}[self.bound]
        return f"{end}{sign} {bar:g}"

    def is_interval(self, record: Record) -> bool:
        """Whether the record has an interval for the figure."""
        try:
            record.figure(f"{self.figure}.low")
        except RecordError:
            return False
        return True

    def contradiction(self, records: Mapping[str, Record]) -> str | None:
        """Return one sentence that says why the condition is not met; None if it is met."""
        record = records.get(self.record)
        if record is None:
            return f"there is no record {self.record}"
        path = f"{self.figure}.{self.bound}" if self.is_interval(record) else self.figure
        try:
            found = record.figure(path)
        except RecordError as error:
            return str(error)
        holds = (
            found >= self.at_least if self.at_least is not None else self.at_most is not None and found <= self.at_most
        )
        return None if holds else f"{self.record}:{path} is {found:.4g}, which is not {self.condition}"


@dataclass(frozen=True, slots=True)
class Claim:
    """One published claim."""

    id: str
    group: str
    title: str
    published: str
    source: str
    settles: str
    status: Status
    evidence: tuple[Evidence, ...] = field(default=())
    note: str = ""

    def __post_init__(self) -> None:
        if self.status.needs_evidence != bool(self.evidence):
            raise ValueError(f"{self.id} is {self.status} but has {len(self.evidence)} conditions on records")

    def contradictions(self, records: Mapping[str, Record]) -> list[str]:
        """Return one sentence for each piece of evidence that the records contradict."""
        found = (each.contradiction(records) for each in self.evidence)
        return [sentence for sentence in found if sentence is not None]


def read_claims(text: str | None = None) -> list[Claim]:
    """Read the claims of `claims.toml`, or of a text in the same format.

    Raises:
        ValueError: an unknown status, a missing entry, two claims with one id, or a status whose evidence is missing or
            not allowed.
    """
    if text is None:
        text = files(__package__).joinpath("claims.toml").read_text(encoding="utf-8")
    claims = [_claim(entry) for entry in tomllib.loads(text)["claim"]]
    ids = [claim.id for claim in claims]
    twice = sorted({each for each in ids if ids.count(each) > 1})
    if twice:
        raise ValueError(f"several claims are called {', '.join(twice)}")
    return claims


def _claim(entry: dict[str, Any]) -> Claim:
    evidence = tuple(Evidence(**each) for each in entry.pop("evidence", ()))
    try:
        return Claim(**{**entry, "status": Status(entry["status"])}, evidence=evidence)
    except (TypeError, KeyError) as error:
        raise ValueError(f"claim {entry.get('id', '?')}: {error}") from error
