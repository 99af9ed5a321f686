"""The committed record of the training run says what the adapter's own `training.json` says."""

from __future__ import annotations

from pathlib import Path

import pytest

from programmable_kv.models.fetch import adapter_folder
from programmable_kv.records import read_record
from training.design.record import NAME, record_of

ROOT = Path(__file__).parents[2]


def test_the_record_is_made_of_the_run_s_own_scores() -> None:
    committed = read_record(ROOT / "results" / f"{NAME}.json")
    again = record_of(
        adapter_folder("embedded"), fingerprint=committed.model_fingerprint, command=committed.command,
        commit=committed.commit, started=committed.started, machine=committed.machine, notes=committed.notes,
    )  # fmt: skip
    assert again == committed
    assert all(row["after"]["n"] >= 500 for row in committed.rows)


@pytest.mark.weights
def test_the_record_names_the_model_that_loads(embedded: object) -> None:
    assert read_record(ROOT / "results" / f"{NAME}.json").model_fingerprint == embedded.fingerprint  # type: ignore[attr-defined]
