"""What an experiment is: one question, and the cases that it is asked of. `runs.py` carries it out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from programmable_kv.lab.experiments.cases import RANKING_SEED, SEED, Case, cases, domain_names
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.records import digest_of, record_on

Row = dict[str, Any]

PAIR_SECONDS = 0.4
"""what the making of a drawn case's pair takes for the embedded model on one core, about"""
RANKING = 48
"""cases on which roles are ranked, in an experiment that ranks any: three of each held-out domain"""


@dataclass(frozen=True, slots=True)
class Experiment:
    """One question, asked of pairs of contexts."""

    name: str
    version: int
    title: str
    measure: Callable[[Pair, Sequence[Row]], Row]
    """a pair's row. The rows given are those of `rank`, of other domains than the pair's"""
    summarise: Callable[[Sequence[Row]], dict[str, Any]]
    """from the rows of `measure`, those of skipped cases left out"""
    rank: Callable[[Pair], Row] | None = None
    """what is found out on other policies first; positions are never chosen on the policy on which they are scored"""
    wrong_too: bool = False
    """whether cases are measured too that a full prefill decides wrongly: where it is asked how often it is right"""
    scenarios: int = 336
    """cases that are drawn by default; about two thirds have two values that are equally many tokens long"""
    ranking: int = RANKING
    """cases that `rank` is asked about, at most"""
    sets: int = 1
    """sets of rules in a policy, each about a field of its own; the question's topic says which of them counts"""
    values: int | None = None
    """values that a set of rules tells apart (None: two to four)"""
    seconds: float = 0.0
    """what a drawn case takes for the embedded model on one core, about; of all parts of the experiment, and its pair"""
    quick: Callable[[Pair, Sequence[Row]], Row] | None = None
    """a part of what `measure` does, where that takes long: for `briefly`"""

    @property
    def minutes(self) -> float:
        """What all of it takes for the embedded model on one core, about."""
        return self.seconds * self.scenarios / 60

    def minutes_beside(self, others: Iterable[Experiment]) -> float:
        """The same in a process that carries out others too: what several draw is made once."""
        same = [each.scenarios for each in others if (each.sets, each.values) == (self.sets, self.values)]
        return self.minutes - PAIR_SECONDS * min(self.scenarios, max(same, default=0)) / 60

    def briefly(self) -> Experiment:
        """The same experiment with less of it in each row: does everything still run?"""
        return self if self.quick is None else replace(self, measure=self.quick)

    def cases(self, count: int, *, everyday: bool = False) -> list[tuple[str, Case]]:
        """Every case with what it is for, `ranking` or `scoring`."""
        ranked = (
            cases(min(self.ranking, count), RANKING_SEED, everyday=everyday, sets=self.sets, values=self.values)
            if self.rank is not None
            else []
        )
        scored = cases(count, SEED, everyday=everyday, sets=self.sets, values=self.values)
        return [("ranking", case) for case in ranked] + [("scoring", case) for case in scored]

    def digest(self, count: int, *, everyday: bool = False) -> str:
        """Of the text of every case, by which a record says what it was made on."""
        return digest_of(case.text() for _, case in self.cases(count, everyday=everyday))


def record_name(experiment: Experiment, model: str) -> str:
    """The embedded model's record has the experiment's name, any other's the model's too."""
    return experiment.name if model == "embedded" else record_on(experiment.name, model)


def of_other_domains(rows: Sequence[Row], domain: str) -> list[Row]:
    """The rows that rank positions for a domain: those of the other half of the domains, so that it is not among them."""
    half = {name: number % 2 for number, name in enumerate(domain_names())}
    ranking = [row for row in rows if row["part"] == "ranking" and "skipped" not in row]
    return [row for row in ranking if half[row["domain"]] != half[domain]]
