"""Every experiment, in several processes: each loads the model once and takes the next experiment that is left."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from programmable_kv.errors import ExperimentError, RecordError
from programmable_kv.lab.experiments.experiment import Experiment, record_name, run
from programmable_kv.lab.experiments.registry import EXPERIMENTS, experiment
from programmable_kv.models.load import Model, load_model
from programmable_kv.records import read_record


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an experiment."""

    name: str
    counted: int
    """policies"""
    seconds: float
    path: Path
    kept: bool
    """the record was there before, of the same policies and weights"""


@dataclass(frozen=True, slots=True)
class Every:
    """What each process is asked to do."""

    model: str
    folder: Path
    """of the records"""
    scenarios: int | None = None
    """held-out policies to draw (None: as many as the experiment draws by default)"""
    everyday: bool = False
    again: bool = False
    """whether records that are there are made anew"""


def run_every(asked: Every, workers: int, names: Sequence[str] | None = None) -> Iterator[Outcome]:
    """Run every experiment, or those named, the longest first; yields each outcome as it comes. One worker is this process.

    What a process raises is raised here, after what is running has ended. Rows that were measured are kept, and the same call
    continues from them.

    Raises:
        InvalidArgumentError: there is no experiment of a name.
        RecordError: a run that was interrupted in this folder had other settings.
        ExperimentError: a process was killed.
    """
    chosen = sorted(map(experiment, EXPERIMENTS if names is None else names), key=lambda each: -each.minutes)
    if workers == 1:
        model = load_model(asked.model)
        for each in chosen:
            yield _one(asked, each, model)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    # Not forked: threads that torch has started by then do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_load, initargs=(asked.model, threads))
    try:
        waiting = [pool.submit(_one_here, asked, each.name) for each in chosen]
        for done in as_completed(waiting):
            yield done.result()
    except BrokenProcessPool:
        raise ExperimentError(
            "a process that ran experiments was killed, as where memory runs out. Rows that were measured are kept: run the "
            "same again, with fewer workers if memory was short"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_LOADED: list[Model] = []
"""the model of this process"""


def _load(model: str, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    _LOADED.append(load_model(model))


def _one_here(asked: Every, name: str) -> Outcome:
    return _one(asked, experiment(name), _LOADED[0])


def _one(asked: Every, chosen: Experiment, model: Model) -> Outcome:
    count = chosen.scenarios if asked.scenarios is None else asked.scenarios
    path = asked.folder / f"{record_name(chosen, model)}.json"
    if not asked.again and _is_there(path, chosen, model, count, everyday=asked.everyday):
        found, kept = read_record(path), True
    else:
        command = _command(asked, chosen)
        found, kept = run(chosen, model, count, path, everyday=asked.everyday, command=command), False
    return Outcome(chosen.name, int(found.figure("counted")), found.wall_seconds, path, kept)


def _is_there(path: Path, chosen: Experiment, model: Model, count: int, *, everyday: bool) -> bool:
    try:
        found = read_record(path)
    except RecordError:
        return False
    return (
        found.complete
        and found.version == chosen.version
        and found.model_fingerprint == model.fingerprint
        and found.data_digest == chosen.digest(count, everyday=everyday)
    )


def _command(asked: Every, chosen: Experiment) -> str:
    """What makes this one record, alone."""
    words = ["pkv lab run", chosen.name]
    words += [] if asked.model == "embedded" else ["--model", asked.model]
    words += [] if asked.scenarios in (None, chosen.scenarios) else ["--scenarios", str(asked.scenarios)]
    return " ".join(words + ["--everyday"] * asked.everyday)
