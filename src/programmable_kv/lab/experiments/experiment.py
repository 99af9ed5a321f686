"""What an experiment is, and carrying one out into a record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from programmable_kv.lab.experiments.cases import RANKING_SEED, SEED, Case, cases, domain_names
from programmable_kv.lab.experiments.control import RANDOM_WEIGHTS
from programmable_kv.lab.experiments.pair import Pair, pair_of
from programmable_kv.models.load import Model
from programmable_kv.records import Record, Recorder, digest_of, record_on

Row = dict[str, Any]
Report = Callable[[int, int], None]

WRONG = "a full prefill decides wrongly"
"""why a case is not measured: there is no decision to carry"""
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
    scenarios: int = 320
    """cases that are drawn by default; about two thirds have two values that are equally many tokens long"""
    ranking: int = RANKING
    """cases that `rank` is asked about, at most"""
    sets: int = 1
    """sets of rules in a policy, each about a field of its own; the question's topic says which of them counts"""
    values: int | None = None
    """values that a set of rules tells apart (None: two to four)"""
    seconds: float = 0.0
    """what a drawn case takes for the embedded model on one core, about; of all parts of the experiment"""
    quick: Callable[[Pair, Sequence[Row]], Row] | None = None
    """a part of what `measure` does, where that takes long: for `briefly`"""

    @property
    def minutes(self) -> float:
        """What all of it takes for the embedded model on one core, about."""
        return self.seconds * self.scenarios / 60

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


def record_name(experiment: Experiment, model: Model) -> str:
    """The embedded model's record has the experiment's name, any other's the model's too."""
    if model.name == "embedded":
        return experiment.name
    return record_on(experiment.name, model.name)


def run(
    experiment: Experiment, model: Model, count: int, path: Path, *, everyday: bool = False,
    report: Report | None = None, command: str = "",
) -> Record:  # fmt: skip
    """Measure `count` cases and summarise what was found.

    A case counts where both full prefills decide as the policy says, unless `wrong_too`. With random weights none does, and all
    are measured: what is of interest there is how little anything does.
    """
    drawn = experiment.cases(count, everyday=everyday)
    recorder = Recorder(
        path,
        name=record_name(experiment, model),
        version=experiment.version,
        title=experiment.title,
        command=command,
        model=Path(model.name).name,
        model_fingerprint=model.fingerprint,
        data_digest=experiment.digest(count, everyday=everyday),
        seeds=[SEED] + [RANKING_SEED] * (experiment.rank is not None),
        settings={"scenarios": count} | ({"everyday": True} if everyday else {}),
    )
    model.engine.verify()

    def row(it: tuple[str, Case]) -> Row:
        part, case = it
        known: Row = {"part": part, "number": case.number, "domain": case.domain}
        pair = pair_of(model, case)
        if isinstance(pair, str):
            return known | {"skipped": pair}
        if not pair.scale.valid and not experiment.wrong_too and model.name != RANDOM_WEIGHTS:
            return known | {"skipped": WRONG}
        if part == "ranking":
            assert experiment.rank is not None
            return known | experiment.rank(pair)
        known |= {"old_gap": round(pair.scale.old, 4), "new_gap": round(pair.scale.new, 4), "valid": pair.scale.valid}
        return known | experiment.measure(pair, of_other_domains(recorder.rows, case.domain))

    recorder.collect(drawn, lambda it: {"part": it[0], "number": it[1].number}, row, report)
    scored = [row for row in recorder.rows if row["part"] == "scoring"]
    counted = [row for row in scored if "skipped" not in row]
    summary = {
        "drawn": len(scored),
        "aligned": len([row for row in scored if row.get("skipped", WRONG) == WRONG]),
        "right_both_ways": sum(row["valid"] for row in counted),
        "counted": len(counted),
        "domains": len({row["domain"] for row in counted}),
    }
    return recorder.finish(summary | experiment.summarise(counted))


def of_other_domains(rows: Sequence[Row], domain: str) -> list[Row]:
    """The rows that rank positions for a domain: those of the other half of the domains, so that it is not among them."""
    half = {name: number % 2 for number, name in enumerate(domain_names())}
    ranking = [row for row in rows if row["part"] == "ranking" and "skipped" not in row]
    return [row for row in ranking if half[row["domain"]] != half[domain]]
