"""Runs experiments, one or several case by case, so that the pair of a case is made once for all that ask for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from programmable_kv.lab.experiments.cases import RANKING_SEED, SEED, Case
from programmable_kv.lab.experiments.control import RANDOM_WEIGHTS
from programmable_kv.lab.experiments.experiment import Experiment, Row, of_other_domains, record_name
from programmable_kv.lab.experiments.pair import Pair, pair_of
from programmable_kv.models.load import Model
from programmable_kv.records import Record, Recorder

Report = Callable[[int, int], None]
"""Called with the number of cases done, and the number of all cases."""

WRONG = "a full prefill decides wrongly"
"""Why a case is not measured: there is no decision to carry."""


class Stopwatch:
    """Counts the seconds in which it runs, and those that are added."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._since: float | None = None

    def __call__(self) -> float:
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def add(self, seconds: float) -> None:
        """Add seconds that something took elsewhere for this watch's owner."""
        self._seconds += seconds

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run inside the block."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._seconds, self._since = self(), None


class Run:
    """One experiment on one model: its record so far, and the cases that are left.

    A case counts if both full prefills decide as the policy says, unless `wrong_too`. With random weights none does,
    and all are measured: the point there is how little any change does.

    Raises:
        RecordError: an interrupted run at this path had other settings.
    """

    def __init__(
        self, experiment: Experiment, model: Model, count: int, path: Path, *, everyday: bool = False, command: str = ""
    ) -> None:
        self.experiment, self.model, self.everyday = experiment, model, everyday
        self._watch = Stopwatch()
        with self._watch.running():
            self.cases = experiment.cases(count, everyday=everyday)
            self._recorder = Recorder(
                path,
                name=record_name(experiment, model.name),
                version=experiment.version,
                title=experiment.title,
                command=command,
                model=Path(model.name).name,
                model_fingerprint=model.fingerprint,
                data_digest=experiment.digest(count, everyday=everyday),
                seeds=[SEED] + [RANKING_SEED] * (experiment.rank is not None),
                settings={"scenarios": count} | ({"everyday": True} if everyday else {}),
                clock=self._watch,
            )
            model.engine.verify()

    def left(self) -> list[tuple[str, Case]]:
        """The cases without a row. Those on which roles are ranked come first."""
        done = {(row["part"], row["number"]) for row in self._recorder.rows}
        return [(part, case) for part, case in self.cases if (part, case.number) not in done]

    def add(self, part: str, case: Case, pair: Pair | str, making: float) -> None:
        """Measure a case and write its row. `making`: this run's share of the seconds in which the pair was made."""
        self._watch.add(making)
        with self._watch.running():
            self._recorder.add(self._row(part, case, pair))

    def _row(self, part: str, case: Case, pair: Pair | str) -> Row:
        known: Row = {"part": part, "number": case.number, "domain": case.domain}
        if isinstance(pair, str):
            return known | {"skipped": pair}
        if not pair.scale.valid and not self.experiment.wrong_too and self.model.name != RANDOM_WEIGHTS:
            return known | {"skipped": WRONG}
        if part == "ranking":
            assert self.experiment.rank is not None
            return known | self.experiment.rank(pair)
        known |= {"old_gap": round(pair.scale.old, 4), "new_gap": round(pair.scale.new, 4), "valid": pair.scale.valid}
        return known | self.experiment.measure(pair, of_other_domains(self._recorder.rows, case.domain))

    def finish(self) -> Record:
        """Summarise what was found and write the finished record."""
        with self._watch.running():
            return self._recorder.finish(summary_of(self.experiment, self._recorder.rows))


def summary_of(experiment: Experiment, rows: Sequence[Row]) -> dict[str, Any]:
    """What the rows of an experiment's record show."""
    scored = [row for row in rows if row["part"] == "scoring"]
    counted = [row for row in scored if "skipped" not in row]
    numbers = {
        "drawn": len(scored),
        "aligned": len([row for row in scored if row.get("skipped", WRONG) == WRONG]),
        "right_both_ways": sum(row["valid"] for row in counted),
        "counted": len(counted),
        "domains": len({row["domain"] for row in counted}),
    }
    return numbers | experiment.summarise(counted)


def run(
    experiment: Experiment, model: Model, count: int, path: Path, *, everyday: bool = False,
    report: Report | None = None, command: str = "",
) -> Record:  # fmt: skip
    """Measure `count` cases and summarise what was found (see `Run`)."""
    ((_, record),) = run_together([Run(experiment, model, count, path, everyday=everyday, command=command)], report)
    return record


def run_together(runs: Sequence[Run], report: Report | None = None) -> Iterator[tuple[Run, Record]]:
    """Measure what is left of several runs on one model, case by case. Yields each run with its record when finished.

    All cases on which roles are ranked come before the scored ones. The pair of a case is made once and given to every
    run that draws this case; only one pair is kept at a time. A record's `wall_seconds` count the time spent in its
    experiment and, for each of its pairs, an equal share of the time it took to make.
    """
    asked: dict[tuple[str, bool, int, int, int], list[tuple[Run, Case]]] = {}
    left = dict.fromkeys(runs, 0)
    for each in runs:
        for part, case in each.left():
            key = (part, each.everyday, each.experiment.sets, each.experiment.values or 0, case.number)
            asked.setdefault(key, []).append((each, case))
            left[each] += 1
    total = sum(len(each.cases) for each in runs)
    if report is not None:
        report(total - sum(left.values()), total)
    yield from ((each, each.finish()) for each, count in left.items() if not count)
    for key in sorted(asked):
        part, those = key[0], asked[key]
        began = time.perf_counter()
        # Their cases are equal: drawn with the same seed, number of sets of rules and number of values.
        pair = pair_of(those[0][0].model, those[0][1])
        making = (time.perf_counter() - began) / len(those)
        for each, case in those:
            each.add(part, case, pair, making)
            left[each] -= 1
            if report is not None:
                report(total - sum(left.values()), total)
            if not left[each]:
                yield each, each.finish()
        # Freed before the next pair is made, so that two contexts are in memory at a time, not four.
        del pair
