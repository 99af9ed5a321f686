"""Experiments that run in several processes make the same records as one process."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from conftest import tiny_model, tokenizer
from programmable_kv.cli import app, main
from programmable_kv.errors import ExperimentError, InvalidArgumentError, RecordError
from programmable_kv.lab.experiments.cases import Case
from programmable_kv.lab.experiments.control import randomised
from programmable_kv.lab.experiments.every import Every, balanced, run_every
from programmable_kv.lab.experiments.experiment import PAIR_SECONDS, record_name
from programmable_kv.lab.experiments.pair import Pair, pair_of
from programmable_kv.lab.experiments.registry import EXPERIMENTS, experiment
from programmable_kv.lab.experiments.runs import Run, run, run_together
from programmable_kv.models.load import Model, load_model
from programmable_kv.records import read_record

NAMES = ("blast-radius", "boundary")


@pytest.fixture
def asked(tmp_path: Path) -> Every:
    folder = tmp_path / "model"
    tiny_model("llama", dtype=torch.float32, max_position_embeddings=8192).save_pretrained(folder)
    tokenizer("byte-level").save_pretrained(folder)
    return Every(str(folder), tmp_path / "records", scenarios=3)


def test_two_processes_make_the_records_that_one_makes(asked: Every) -> None:
    outcomes = {each.name: each for each in run_every(asked, 2, NAMES)}
    assert outcomes.keys() == {*NAMES}
    model = load_model(asked.model)
    for name, each in outcomes.items():
        found = read_record(each.path)
        alone = run(experiment(name), model, 3, asked.folder / "alone.json")
        assert not each.kept
        assert found.rows == alone.rows
        assert found.command == f"pkv lab run {name} --model {asked.model} --scenarios 3"


@pytest.mark.parametrize("workers", [1, 2])
def test_cases_are_told_of_all_experiments_together(asked: Every, workers: int) -> None:
    told: list[tuple[int, int]] = []
    list(run_every(asked, workers, NAMES, lambda *some: told.append(some)))
    assert told == sorted(told)
    assert {total for _, total in told} == {6}
    assert told[-1] == (6, 6)
    list(run_every(asked, workers, NAMES, lambda *some: told.append(some)))
    assert told[-1] == (6, 6), "what is there is done"


def test_a_pair_is_made_once_and_rows_are_those_of_one_experiment_alone(
    asked: Every, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def counted(model: Model, case: Case) -> Pair | str:
        made.append(case.text())
        return pair_of(model, case)

    monkeypatch.setattr("programmable_kv.lab.experiments.runs.pair_of", counted)
    model = randomised(load_model(asked.model))  # so that wrong decisions are measured too
    chosen = [experiment(name).briefly() for name in ("prevention", "dose", "locality", "errata")]

    def runs(folder: str) -> list[Run]:
        return [Run(each, model, 3, tmp_path / folder / f"{each.name}.json") for each in chosen]

    began = time.perf_counter()
    together = {run.experiment.name: record for run, record in run_together(runs("together"))}
    took = time.perf_counter() - began
    assert len(made) == len(set(made)), "a pair was made twice"
    assert {*made} == {case.text() for each in chosen for _, case in each.cases(3)}
    seconds = [record.wall_seconds for record in together.values()]
    assert all(each > 0 for each in seconds)
    assert sum(seconds) < took + 1
    for each in chosen:
        alone = run(each, model, 3, tmp_path / "alone" / f"{each.name}.json")
        assert alone.figure("counted") > 0
        assert together[each.name].rows == alone.rows
        assert together[each.name].summary == alone.summary

    class Interrupted(Exception):
        pass

    def interrupt(done: int, _: int) -> None:
        if done == 9:  # within the cases of one pair
            raise Interrupted

    with pytest.raises(Interrupted):
        list(run_together(runs("later"), interrupt))
    assert not list((tmp_path / "later").glob("*.json"))
    later = {run.experiment.name: record.rows for run, record in run_together(runs("later"))}
    assert later == {name: record.rows for name, record in together.items()}


def test_shares_take_about_equally_long() -> None:
    everything = list(EXPERIMENTS.values())
    for workers in (1, 2, 3, 40):
        shares = balanced(everything, workers)
        assert len(shares) == min(workers, len(everything))
        assert sorted(each.name for share in shares for each in share) == sorted(EXPERIMENTS)
        minutes = []
        for share in shares:
            minutes.append(sum(each.minutes_beside(share[:place]) for place, each in enumerate(share)))
        assert max(minutes) - min(minutes) < max(each.minutes for each in everything)
    assert sum(minutes) == pytest.approx(sum(each.minutes for each in everything))
    (both,) = balanced([experiment("seam"), experiment("prevention")], 1)
    alike = both[1].minutes_beside(both[:1])
    assert alike == pytest.approx(both[1].minutes - PAIR_SECONDS * both[1].scenarios / 60)
    assert experiment("dose").minutes_beside(both) == experiment("dose").minutes, "its policies are others"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_folder_that_cannot_be_written_is_told_as_by_pkv_lab_run(
    asked: Every, workers: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked.folder.write_text("a file")
    words = ["lab", "every", "--model", asked.model, "--scenarios", "1", "--workers", str(workers)]
    monkeypatch.setattr("programmable_kv.lab.experiments.every.EXPERIMENTS", NAMES)
    monkeypatch.setattr("sys.argv", ["pkv", *words, "--folder", str(asked.folder)])
    with pytest.raises(SystemExit, match="1"):
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert "error (OS)" in line
    assert "make room or choose another place" in line


def test_records_that_are_there_are_kept_unless_they_are_of_other_policies(asked: Every) -> None:
    def kept(asked: Every) -> bool:
        (outcome,) = run_every(asked, 1, NAMES[:1])
        return outcome.kept

    assert not kept(asked)
    assert kept(asked)
    assert not kept(replace(asked, again=True))
    assert not kept(replace(asked, scenarios=2))


def test_the_time_of_a_whole_run_is_recorded(asked: Every, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: experiment(name) for name in NAMES}
    for module in ("every", "whole_time", "registry"):
        monkeypatch.setattr(f"programmable_kv.lab.experiments.{module}.EXPERIMENTS", few)
    words = ["lab", "every", "--model", asked.model, "--workers", "1", "--folder", str(asked.folder)]
    monkeypatch.setattr("sys.argv", ["pkv", *words])

    def timed(*more: str) -> bool:
        for path in asked.folder.glob("lab-time*"):
            path.unlink()
        assert CliRunner().invoke(app, [*words, "--scenarios", "2", *more]).exit_code == 0
        return bool(list(asked.folder.glob("lab-time*.json")))

    assert timed()
    (path,) = asked.folder.glob("lab-time*.json")
    record = read_record(path)
    assert [row["name"] for row in record.rows] == list(NAMES)
    assert record.figure("cases") == 4
    assert record.wall_seconds == pytest.approx(60 * record.figure("minutes"), abs=0.01)
    assert not timed(), "everything was kept"
    assert timed("--again")
    (asked.folder / f"{record_name(experiment(NAMES[0]), asked.model)}.json").rename(
        asked.folder / f"{record_name(experiment(NAMES[0]), asked.model)}.partial"
    )
    assert not timed(), "one was kept, the other continued"


def test_what_a_process_refuses_is_refused_here(asked: Every) -> None:
    with pytest.raises(InvalidArgumentError, match="unknown experiment 'nothing'"):
        next(run_every(asked, 1, ["nothing"]))
    (first,) = run_every(asked, 1, NAMES[:1])
    first.path.rename(first.path.with_suffix(".partial"))  # as of an interrupted run
    with pytest.raises(RecordError, match="interrupted run with a different data_digest, settings"):
        list(run_every(replace(asked, scenarios=2), 1, NAMES[:1]))


def test_a_killed_process_is_told(asked: Every) -> None:
    def kill() -> None:
        for each in multiprocessing.active_children():
            each.kill()

    killer = threading.Timer(1.0, kill)
    killer.start()
    with pytest.raises(ExperimentError, match=r"was killed, .* run the same command again"):
        list(run_every(asked, 2, NAMES))
    killer.join()


def test_processes_end_with_the_one_that_started_them(asked: Every) -> None:
    words = [sys.executable, "-m", "programmable_kv", "lab", "every", "--model", asked.model, "--workers", "2"]
    started = subprocess.Popen(
        [*words, "--folder", str(asked.folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait(lambda: len(list(asked.folder.glob("*.partial"))) > 1, "no rows were measured")
        children = _children(started.pid)
        assert len(children) >= 2
    finally:
        started.kill()
        started.wait()
    _wait(lambda: not children & _running(), "a process goes on without the one that started it")


def _children(parent: int) -> set[int]:
    return {process for process, its_parent in _processes() if its_parent == parent}


def _running() -> set[int]:
    return {process for process, _ in _processes()}


def _processes() -> list[tuple[int, int]]:
    """Every process that has not ended, with its parent's id."""
    told = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,state="], capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in told.splitlines()]
    return [(int(process), int(parent)) for process, parent, state in lines if not state.startswith("Z")]


def _wait(until: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 120
    while not until():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)


def test_the_command_prints_a_line_for_each(asked: Every, monkeypatch: pytest.MonkeyPatch) -> None:
    # Existing records are kept, so the second run measures nothing.
    monkeypatch.setattr("programmable_kv.lab.experiments.every.EXPERIMENTS", NAMES)
    (first, second) = (_every(asked) for _ in range(2))
    assert [line.split()[0] for line in sorted(first)] == [*NAMES]
    assert all(" min: " in line for line in first)
    assert all(" policies, kept: " in line for line in second)


def _every(asked: Every) -> list[str]:
    words = [
        "lab",
        "every",
        "--model",
        asked.model,
        "--scenarios",
        "1",
        "--workers",
        "1",
        "--folder",
        str(asked.folder),
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    return [line for line in done.stdout.splitlines() if "policies" in line]
