"""Every experiment in processes of their own: the records are those that one process makes."""

from __future__ import annotations

import multiprocessing
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from conftest import tiny_model, tokenizer
from programmable_kv.cli import app
from programmable_kv.errors import ExperimentError, InvalidArgumentError, RecordError
from programmable_kv.lab.experiments.every import Every, run_every
from programmable_kv.lab.experiments.experiment import run
from programmable_kv.lab.experiments.registry import experiment
from programmable_kv.models.load import load_model
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


def test_records_that_are_there_are_kept_unless_they_are_of_other_policies(asked: Every) -> None:
    def kept(asked: Every) -> bool:
        (outcome,) = run_every(asked, 1, NAMES[:1])
        return outcome.kept

    assert not kept(asked)
    assert kept(asked)
    assert not kept(replace(asked, again=True))
    assert not kept(replace(asked, scenarios=2))


def test_what_a_process_refuses_is_refused_here(asked: Every) -> None:
    with pytest.raises(InvalidArgumentError, match="no experiment 'nothing'"):
        next(run_every(asked, 1, ["nothing"]))
    (first,) = run_every(asked, 1, NAMES[:1])
    first.path.rename(first.path.with_suffix(".partial"))  # as of an interrupted run
    with pytest.raises(RecordError, match="interrupted run with another data_digest, settings"):
        list(run_every(replace(asked, scenarios=2), 1, NAMES[:1]))


def test_a_killed_process_is_told(asked: Every) -> None:
    def kill() -> None:
        for each in multiprocessing.active_children():
            each.kill()

    killer = threading.Timer(1.0, kill)
    killer.start()
    with pytest.raises(ExperimentError, match=r"was killed, .* run the same again"):
        list(run_every(asked, 2, NAMES))
    killer.join()


def test_the_command_prints_a_line_for_each(asked: Every, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is there is kept, so the second run measures nothing.
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
