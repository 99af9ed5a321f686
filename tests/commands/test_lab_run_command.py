"""`pkv lab run`: lists the experiments, runs one, and prints its figures as a table or as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import tiny
from programmable_kv.cli import app
from programmable_kv.commands import lab
from programmable_kv.lab.experiments.registry import EXPERIMENTS
from programmable_kv.records import read_record


@pytest.fixture(autouse=True)
def given_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "load", lambda name: tiny(max_position_embeddings=8192))


def pkv(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["lab", "run", *arguments])


def test_the_experiments_are_listed() -> None:
    for arguments in ((), ("--list",)):
        done = pkv(*arguments)
        assert done.exit_code == 0, done.output
        lines = {line.split()[0]: line.split() for line in done.stdout.splitlines() if "min" in line}
        assert {*EXPERIMENTS, "all"} == set(lines)
        assert all(lines[name][1:3] == [f"{each.minutes:.0f}", "min"] for name, each in EXPERIMENTS.items())
        assert abs(int(lines["all"][3]) - sum(each.minutes for each in EXPERIMENTS.values())) <= 1
    assert json.loads(pkv("--list", "--json").stdout) == {each.name: each.title for each in EXPERIMENTS.values()}


def test_an_experiment_is_run_and_its_figures_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "it.json"
    done = pkv("blast-radius", "--scenarios", "3", "--out", str(path))
    assert done.exit_code == 0, done.output
    assert "before_largest" in done.stdout
    assert "95% interval" in done.stdout
    assert read_record(path).name == "blast-radius-tiny-llama"
    done = pkv("blast-radius", "--scenarios", "3", "--random-weights", "--json", "--out", str(path))
    assert json.loads(done.stdout)["before_largest"] == 0
    assert read_record(path).name == "blast-radius-random-weights"


def test_a_quick_run_keeps_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PKV_RESULTS", str(tmp_path))
    done = pkv("boundary", "--quick", "--everyday")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("boundary")
    assert "policies" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_experiment_is_refused() -> None:
    done = pkv("nothing")
    assert done.exit_code != 0
    assert "unknown experiment 'nothing'" in str(done.exception) + done.output
