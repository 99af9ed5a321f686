"""Runs every experiment in several processes. Each loads the model once and runs its share case by case."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from programmable_kv.errors import ExperimentError, RecordError
from programmable_kv.lab.experiments.experiment import Experiment, record_name
from programmable_kv.lab.experiments.registry import EXPERIMENTS, experiment
from programmable_kv.lab.experiments.runs import Report, Run, run_together
from programmable_kv.models.load import Model, load_model
from programmable_kv.models.names import EMBEDDED_PLAIN
from programmable_kv.records import Record, read_record

_LOOK = 0.2
"""Seconds between two checks whether a process has reported something."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of an experiment."""

    name: str
    counted: int
    """Number of policies that counted."""
    seconds: float
    path: Path
    kept: bool
    """Whether the record was there before, for the same policies and weights."""


@dataclass(frozen=True, slots=True)
class Every:
    """What each process has to do."""

    model: str
    folder: Path
    """Folder of the records."""
    scenarios: int | None = None
    """Held-out policies to draw (None: the experiment's default)."""
    everyday: bool = False
    again: bool = False
    """Whether to make existing records again."""

    def count(self, chosen: Experiment) -> int:
        """The number of held-out policies that an experiment draws."""
        return chosen.scenarios if self.scenarios is None else self.scenarios

    def cases(self, chosen: Experiment) -> int:
        """The number of all cases, including those on which roles are ranked."""
        return len(chosen.cases(self.count(chosen), everyday=self.everyday))

    def path(self, chosen: Experiment) -> Path:
        """The path of an experiment's record."""
        return self.folder / f"{record_name(chosen, self.model)}.json"

    def there(self, chosen: Experiment) -> Record | None:
        """An experiment's complete record of the same policies, if there is one and it is not to be made again."""
        try:
            found = read_record(self.path(chosen))
        except RecordError:
            return None
        digest = chosen.digest(self.count(chosen), everyday=self.everyday)
        same = found.complete and found.version == chosen.version and found.data_digest == digest
        return found if same and not self.again else None


def run_every(
    asked: Every, workers: int, names: Sequence[str] | None = None, report: Report | None = None
) -> Iterator[Outcome]:
    """Run every experiment, or those named, and yield each outcome as it comes. A single worker is this process.

    Each process goes through its share of the experiments case by case (`run_together`). If a process raises, its error
    is raised here, after the others have measured their current case. Measured rows are kept, and the same call
    continues from them.

    Args:
        report: called with the number of cases done over all experiments, and the number of all cases.

    Raises:
        InvalidArgumentError: no experiment has one of the names.
        RecordError: an interrupted run in this folder had other settings.
        ExperimentError: a process was killed.
        OSError: a record cannot be written, for example because the disk is full.
    """
    chosen = [experiment(name) for name in (EXPERIMENTS if names is None else names)]
    there = {each.name for each in chosen if asked.there(each) is not None}
    shares = [
        [each.name for each in share]
        for share in balanced([each for each in chosen if each.name not in there], workers)
    ] or [[]]
    # A record that is there costs nothing if it is of these weights. The process that loads the model checks that.
    for number, name in enumerate(sorted(there)):
        shares[number % len(shares)].append(name)
    if len(shares) == 1:
        yield from _outcomes(asked, shares[0], load_model(asked.model), report)
    else:
        total = sum(map(asked.cases, chosen))
        done = [0] * len(shares)
        for number, told in _in_processes(asked, shares):
            if isinstance(told, Outcome):
                yield told
            else:
                done[number] = told
                if report is not None:
                    report(sum(done), total)


def balanced(chosen: Sequence[Experiment], workers: int) -> list[list[Experiment]]:
    """Divide experiments into shares that take about equally long, at most one for each worker.

    The longest experiments come first. Each goes to the share that is the shortest with it included.
    """
    shares: list[list[Experiment]] = [[] for _ in range(min(workers, len(chosen)))]
    minutes = [0.0] * len(shares)
    for each in sorted(chosen, key=lambda each: -each.minutes):
        longer = [before + each.minutes_beside(share) for before, share in zip(minutes, shares, strict=True)]
        shortest = longer.index(min(longer))
        shares[shortest].append(each)
        minutes[shortest] = longer[shortest]
    return [share for share in shares if share]


def _in_processes(asked: Every, shares: Sequence[Sequence[str]]) -> Iterator[tuple[int, Outcome | int]]:
    """Yield what each share's process reports: an outcome, or the number of its cases done."""
    threads = max(1, (os.cpu_count() or 1) // len(shares))
    # Spawned, not forked: threads that torch has started by then do not survive a fork.
    context = multiprocessing.get_context("spawn")
    told, stop = context.SimpleQueue(), context.Event()
    pool = ProcessPoolExecutor(len(shares), context, initializer=_begin, initargs=(threads, told, stop))
    try:
        waiting = {pool.submit(_share, asked, number, names) for number, names in enumerate(shares)}
        while waiting:
            ended, waiting = wait(waiting, timeout=_LOOK, return_when=FIRST_COMPLETED)
            while not told.empty():  # processes that ended have reported everything by now
                yield told.get()
            for each in ended:
                each.result()
    except BrokenProcessPool:
        raise ExperimentError(
            "a worker process was killed, for example because memory ran out. Measured rows are kept: run the same command "
            "again, with fewer workers if memory was short"
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


_TOLD: list[Any] = []
"""This process's end of the queue, and the event that tells it to stop."""


def _begin(threads: int, told: Any, stop: Any) -> None:
    import torch

    torch.set_num_threads(threads)
    _TOLD.extend((told, stop))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process with the one that started it, for example when that is killed: nobody would read its results."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class _StoppedError(Exception):
    """Another process has failed, so this one stops."""


def _share(asked: Every, number: int, names: Sequence[str]) -> None:
    told, stop = _TOLD

    def report(done: int, _: int) -> None:
        told.put((number, done))
        if stop.is_set():
            raise _StoppedError

    for outcome in _outcomes(asked, names, load_model(asked.model), report):
        told.put((number, outcome))


def _outcomes(
    asked: Every, names: Sequence[str], model: Model, report: Callable[[int, int], None] | None
) -> Iterator[Outcome]:
    """Run some experiments on a model and yield their outcomes."""
    runs, kept = [], 0
    for chosen in map(experiment, names):
        found = asked.there(chosen)
        if found is not None and found.model_fingerprint == model.fingerprint:
            kept += asked.cases(chosen)
            yield _outcome(asked, chosen, found, kept=True)
        else:
            count, path, words = asked.count(chosen), asked.path(chosen), _command(asked, chosen)
            runs.append(Run(chosen, model, count, path, everyday=asked.everyday, command=words))

    def with_kept(done: int, total: int) -> None:
        if report is not None:
            report(kept + done, kept + total)

    for run, record in run_together(runs, with_kept):
        yield _outcome(asked, run.experiment, record, kept=False)


def _outcome(asked: Every, chosen: Experiment, record: Record, *, kept: bool) -> Outcome:
    return Outcome(chosen.name, int(record.figure("counted")), record.wall_seconds, asked.path(chosen), kept)


def _command(asked: Every, chosen: Experiment) -> str:
    """The command that makes this one record alone."""
    words = ["pkv lab run", chosen.name]
    words += [] if asked.model == EMBEDDED_PLAIN else ["--model", asked.model]
    words += [] if asked.scenarios in (None, chosen.scenarios) else ["--scenarios", str(asked.scenarios)]
    return " ".join(words + ["--everyday"] * asked.everyday)
