"""Records: the JSON files that every experiment and bench writes, and that every figure in a document comes from.

A record is a file in `results/`. It says what was run, on which model and machine, with which seeds, and contains every
row measured and a summary with intervals. A `Recorder` writes it row by row, so that an interrupted run resumes where
it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from programmable_kv.errors import RecordError

Case = TypeVar("Case")
"""The type of what one row of an experiment measures: a policy, a scenario."""
Turn = TypeVar("Turn")

_NAME = r"^[a-z0-9][a-z0-9-]*$"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Machine(_Strict):
    """The machine that made a record: enough to judge a time, nothing that says where the machine is."""

    processor: str
    cores: int
    threads: int
    python: str
    torch: str
    transformers: str

    @classmethod
    def here(cls) -> Machine:
        import torch
        import transformers

        return cls(
            processor=_processor(),
            cores=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=transformers.__version__,
        )


RESAMPLES = 10_000
"""How often a bootstrap interval resamples."""


class Interval(_Strict):
    """An estimate with its 95% interval and the method that gave the interval."""

    value: float
    low: float
    high: float
    n: int
    method: Literal["wilson", "clustered wilson", "clopper-pearson", "cluster bootstrap", "bootstrap", "none"]


class Record(_Strict):
    """One run of one experiment or bench."""

    schema_version: Literal[1] = 1
    name: str = Field(pattern=_NAME)
    version: int
    """version of the experiment; rows of different versions must not be compared"""
    title: str
    command: str
    commit: str
    started: datetime
    wall_seconds: float
    model: str
    model_fingerprint: str
    data_digest: str
    """sha256 of the data from which the rows were computed; equal digests mean the same data"""
    seeds: list[int]
    machine: Machine
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Interval | float | int | str | dict[str, Any]]
    complete: bool
    notes: list[str] = []

    def figure(self, path: str) -> float:
        """A number of the summary, by its dotted path (`field_erratum.agreement.value`); an interval gives its value.

        Raises:
            RecordError: the summary has nothing at that path, or not a number.
        """
        found: Any = self.summary
        for key in path.split("."):
            if isinstance(found, Interval):
                found = getattr(found, key)
            elif isinstance(found, dict) and key in found:
                found = found[key]
            else:
                raise RecordError(f"record {self.name} has no figure {path!r}")
        if isinstance(found, Interval):
            found = found.value
        if not isinstance(found, int | float):
            raise RecordError(f"figure {path!r} of record {self.name} is not a number")
        return float(found)


def results_folder() -> Path:
    """The folder that `PKV_RESULTS` names, or `results/` in the working folder."""
    return Path(os.environ.get("PKV_RESULTS", "results"))


def record_slug(name: str) -> str:
    """A name in the form that records use: lower-case letters, digits and single `-`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def record_on(stem: str, model: str) -> str:
    """The name of a record about one model: the stem, and the model's name without its folder and `.gguf`."""
    return f"{stem}-{record_slug(Path(model).name.lower().removesuffix('.gguf'))}"


def record_for(stem: str, model: str, usual: str) -> str:
    """The name of a record: the stem alone for the model that such records are usually about, else with the model."""
    return stem if model == usual else record_on(stem, model)


def read_record(path: Path) -> Record:
    """
    Raises:
        RecordError: the file is missing or does not fit the schema.
    """
    try:
        return Record.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(f"there is no record at {path}") from None
    except ValidationError as error:
        raise RecordError(f"{path} is not a record of schema 1: {error}") from error


def write_record(record: Record, path: Path) -> None:
    """Write a record. A file at the path is replaced when the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(_compact_json(record), encoding="utf-8")
    temporary.replace(path)


def all_records(folder: Path | None = None) -> list[Record]:
    return [read_record(path) for path in sorted((folder or results_folder()).glob("*.json"))]


class Recorder:
    """Collects rows into a record on disk; rows that an interrupted run has written are kept and not measured again.

    A partial file with another name, version, model, data, seeds or settings is refused.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        version: int,
        title: str,
        command: str,
        model: str,
        model_fingerprint: str,
        data_digest: str,
        seeds: Sequence[int],
        settings: dict[str, Any],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            clock: returns seconds; `wall_seconds` is measured with it. A clock that can be stopped leaves out other
                work.
        """
        self.path = path
        self._partial = path.with_suffix(".partial")
        self._clock, self._began = clock, clock()
        if not re.match(_NAME, name):
            raise RecordError(
                f"invalid record name {name!r}: use lower-case letters, digits and '-', starting with a letter or digit"
            )
        self.record = Record(
            name=name,
            version=version,
            title=title,
            command=command,
            commit=_commit(),
            started=datetime.now(UTC),
            wall_seconds=0.0,
            model=model,
            model_fingerprint=model_fingerprint,
            data_digest=data_digest,
            seeds=list(seeds),
            machine=Machine.here(),
            settings=settings,
            rows=[],
            summary={},
            complete=False,
        )
        self._earlier_seconds = 0.0
        if self._partial.exists():
            self._resume()

    def _resume(self) -> None:
        earlier = read_record(self._partial)
        same = ("name", "version", "model_fingerprint", "data_digest", "seeds", "settings")
        differing = [key for key in same if getattr(earlier, key) != getattr(self.record, key)]
        if differing:
            raise RecordError(
                f"{self._partial} is an interrupted run with a different {', '.join(differing)}. Finish that run with "
                "its settings, or delete the file."
            )
        if earlier.commit != self.record.commit:
            earlier.notes.append(f"resumed at commit {self.record.commit} after {len(earlier.rows)} rows")
        self.record = earlier
        self._earlier_seconds = earlier.wall_seconds

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.record.rows

    def done(self, **key: Any) -> bool:
        """Whether the record has a row with these entries."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def collect(
        self,
        cases: Sequence[Case],
        key: Callable[[Case], dict[str, Any]],
        measure: Callable[[Case], dict[str, Any]],
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        """Measure and add the row of each case that has no row yet.

        Args:
            key: returns the entries that identify a case's row.
            measure: returns the whole row, including the entries of the key.
            report: called with the number of cases that are done and the number of all cases.
        """
        for number, case in enumerate(cases, start=1):
            if not self.done(**key(case)):
                self.add(measure(case))
            if report is not None:
                report(number, len(cases))

    def add(self, row: dict[str, Any]) -> None:
        """Add a row and write it to disk."""
        self.rows.append(row)
        self._write(self._partial)

    def finish(self, summary: dict[str, Any], notes: Iterable[str] = ()) -> Record:
        """Complete the record and move it to its final path."""
        self.record = self.record.model_copy(
            update={"summary": summary, "complete": True, "notes": [*self.record.notes, *notes]},
        )
        self._write(self._partial)
        # Read it back, which validates it, before it gets the name of a finished record.
        record = read_record(self._partial)
        self._partial.replace(self.path)
        return record

    def _write(self, path: Path) -> None:
        self.record.wall_seconds = round(self._earlier_seconds + self._clock() - self._began, 3)
        write_record(self.record, path)


def digest_of(items: Iterable[str]) -> str:
    """sha256 over strings, each preceded by its length, so that different lists have different digests."""
    digest = hashlib.sha256()
    for item in items:
        encoded = item.encode()
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()


def wilson(successes: int, n: int) -> Interval:
    """A proportion with Wilson's 95% interval."""
    from statsmodels.stats.proportion import proportion_confint

    if n == 0:
        return Interval(value=float("nan"), low=0.0, high=1.0, n=0, method="wilson")
    low, high = proportion_confint(successes, n, alpha=0.05, method="wilson")
    return Interval(value=successes / n, low=float(low), high=float(high), n=n, method="wilson")


def clustered_wilson(clusters: Sequence[Sequence[bool]]) -> Interval:
    """A proportion with a 95% interval for items that come in clusters, whose items are not independent.

    It is Wilson's interval of as many independent items as give the same variance: n over the design effect, which is
    the variance between clusters over that of n independent items (Rao and Scott, A simple method for the analysis of
    clustered binary data, 1992). An effect below 1, which chance may give, counts as 1. Where all items agree, or there is
    one cluster, nothing shows the effect: it is Wilson's plain interval, and says so. (An interval from resampling
    clusters has no width there.) Where nearly all agree, it can be too narrow.
    """
    from statsmodels.stats.proportion import proportion_confint

    filled = [cluster for cluster in clusters if len(cluster)]
    n, successes = sum(map(len, filled)), sum(map(sum, filled))
    if not 0 < successes < n or len(filled) < 2:
        return wilson(successes, n)
    share = successes / n
    between = sum((sum(cluster) - share * len(cluster)) ** 2 for cluster in filled) * len(filled) / (len(filled) - 1)
    effect = max(1.0, between / (n * share * (1 - share)))
    low, high = proportion_confint(successes / effect, n / effect, alpha=0.05, method="wilson")
    return Interval(value=share, low=float(low), high=float(high), n=n, method="clustered wilson")


def bootstrap_mean(values: Sequence[float], *, statistic: str = "mean", seed: int = 0) -> Interval:
    """A mean or median with a percentile bootstrap interval (`RESAMPLES` resamples of the items, seeded)."""
    import numpy as np
    from scipy.stats import bootstrap

    function: Any = {"mean": np.mean, "median": np.median}[statistic]
    if len(values) < 2 or len(set(values)) == 1:
        value = float(values[0]) if values else float("nan")
        return Interval(value=value, low=value, high=value, n=len(values), method="none")
    outcome = bootstrap(
        (np.asarray(values, dtype=float),), function, n_resamples=RESAMPLES, method="percentile",
        rng=np.random.default_rng(seed), vectorized=True, batch=1000,
    )  # fmt: skip
    interval = outcome.confidence_interval
    return Interval(
        value=float(function(values)), low=float(interval.low), high=float(interval.high), n=len(values),
        method="bootstrap",
    )  # fmt: skip


def by_thirds(conversations: Sequence[Sequence[Turn]]) -> dict[str, list[Sequence[Turn]]]:
    """The first, middle and last third of each conversation's turns: name of the third -> one sequence of turns each."""
    return {
        name: [turns[index * len(turns) // 3 : (index + 1) * len(turns) // 3] for turns in conversations]
        for index, name in enumerate(("first", "middle", "last"))
    }


def cluster_bootstrap(clusters: Sequence[Sequence[float]], *, resamples: int | None = None, seed: int = 0) -> Interval:
    """The mean over all items, with an interval from resampling whole clusters, whose items are not independent."""
    import numpy as np

    sums = np.array([sum(cluster) for cluster in clusters], dtype=float)
    sizes = np.array([len(cluster) for cluster in clusters], dtype=float)
    drawn = np.random.default_rng(seed).integers(len(clusters), size=(resamples or RESAMPLES, len(clusters)))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(
        value=float(sums.sum() / sizes.sum()), low=float(low), high=float(high), n=int(sizes.sum()),
        method="cluster bootstrap",
    )  # fmt: skip


def _compact_json(record: Record) -> str:
    """Indented JSON with one line for each row, so that a diff of two records is readable."""
    body = record.model_dump(mode="json")
    rows = body.pop("rows")
    text = json.dumps({**body, "rows": "@rows"}, indent=1)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    return text.replace('"@rows"', f"[\n  {lines}\n ]" if rows else "[]") + "\n"


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
