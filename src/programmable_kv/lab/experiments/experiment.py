"""An experiment: one question, and the cases that it is asked about. `runs.py` carries it out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from programmable_kv.lab.experiments.cases import RANKING_SEED, SEED, Case, cases, domain_names
from programmable_kv.lab.experiments.pair import Pair
from programmable_kv.models.names import EMBEDDED_PLAIN
from programmable_kv.records import digest_of, record_for

Row = dict[str, Any]

PAIR_SECONDS = 0.4
"""About how many seconds the pair of a drawn case takes to make, for `embedded-plain` on one core."""
RANKING = 48
"""Cases on which roles are ranked, in an experiment that ranks any: three from each held-out domain."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """One question, asked of pairs of contexts."""

    name: str
    version: int
    title: str
    measure: Callable[[Pair, Sequence[Row]], Row]
    """Makes a pair's row. It also gets the rows of `rank`, from other domains than the pair's."""
    summarise: Callable[[Sequence[Row]], dict[str, Any]]
    """Summarises the rows of `measure`, without those of skipped cases."""
    rank: Callable[[Pair], Row] | None = None
    """Makes the row of a ranking policy. Positions are never chosen on the policy on which they are scored."""
    wrong_too: bool = False
    """Whether to also measure cases that a full prefill gets wrong, where the question is how often it is right."""
    scenarios: int = 336
    """Cases drawn by default. About two thirds have two values with equally many tokens."""
    ranking: int = RANKING
    """Largest number of cases that `rank` is asked about."""
    sets: int = 1
    """Sets of rules in a policy, each about a field of its own. The question's topic says which of them counts."""
    values: int | None = None
    """Values that a set of rules tells apart (None: two to four)."""
    seconds: float = 0.0
    """About how many seconds a drawn case takes for `embedded-plain` on one core, with all parts and its pair."""
    quick: Callable[[Pair, Sequence[Row]], Row] | None = None
    """A part of `measure`, for `briefly`, if the whole takes long."""

    @property
    def minutes(self) -> float:
        """About how many minutes the whole experiment takes for `embedded-plain` on one core."""
        return self.seconds * self.scenarios / 60

    def minutes_beside(self, others: Iterable[Experiment]) -> float:
        """The minutes in a process that also runs other experiments, which share the pairs of equal cases."""
        same = [each.scenarios for each in others if (each.sets, each.values) == (self.sets, self.values)]
        return self.minutes - PAIR_SECONDS * min(self.scenarios, max(same, default=0)) / 60

    def briefly(self) -> Experiment:
        """The same experiment with less in each row, to check that everything still runs."""
        return self if self.quick is None else replace(self, measure=self.quick)

    def cases(self, count: int, *, everyday: bool = False) -> list[tuple[str, Case]]:
        """Every case with its purpose, `ranking` or `scoring`."""
        ranked = (
            cases(min(self.ranking, count), RANKING_SEED, everyday=everyday, sets=self.sets, values=self.values)
            if self.rank is not None
            else []
        )
        scored = cases(count, SEED, everyday=everyday, sets=self.sets, values=self.values)
        return [("ranking", case) for case in ranked] + [("scoring", case) for case in scored]

    def digest(self, count: int, *, everyday: bool = False) -> str:
        """Digest of the text of every case, by which a record says what it was made on."""
        return digest_of(case.text() for _, case in self.cases(count, everyday=everyday))


def record_name(experiment: Experiment, model: str) -> str:
    """The experiment's name; for another model than `embedded-plain`, with the model's name."""
    return record_for(experiment.name, model, EMBEDDED_PLAIN)


def of_other_domains(rows: Sequence[Row], domain: str) -> list[Row]:
    """The rows that rank positions for a domain: those of the half of the domains that it does not belong to."""
    half = {name: number % 2 for number, name in enumerate(domain_names())}
    ranking = [row for row in rows if row["part"] == "ranking" and "skipped" not in row]
    return [row for row in ranking if half[row["domain"]] != half[domain]]
