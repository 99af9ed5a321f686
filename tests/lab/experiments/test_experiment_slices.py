"""One policy of each committed record measured again, on the real weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from leaves import leaves
from programmable_kv.lab.experiments.cases import cases
from programmable_kv.lab.experiments.experiment import of_other_domains
from programmable_kv.lab.experiments.pair import Pair, pair_of
from programmable_kv.lab.experiments.registry import EXPERIMENTS
from programmable_kv.records import read_record

RESULTS = Path(__file__).parents[3] / "results"
NUMBER = 3
"""the first case in which two values are equally many tokens long"""
CLOSE = {"rel": 0.01, "abs": 0.05}
"""nats, and shares of attention: another machine's arithmetic moves them less"""


LEARNING = ("conclusion", "sparse-features", "timing")
"""experiments that learn from other policies' activations, which no record holds: measured again without"""
RECORDED = [name for name in EXPERIMENTS if (RESULTS / f"{name}.json").exists()]


@pytest.fixture(scope="module")
def pair(embedded_plain: Any) -> Pair:
    found = pair_of(embedded_plain, cases(NUMBER + 1)[NUMBER])
    assert isinstance(found, Pair), found
    return found


@pytest.mark.xdist_group("experiments")  # the pair is prefilled once
@pytest.mark.parametrize("name", RECORDED)
def test_a_slice_of_the_record(name: str, pair: Pair, embedded_plain: Any) -> None:
    record, experiment = read_record(RESULTS / f"{name}.json"), EXPERIMENTS[name]
    assert record.version == experiment.version
    rows = [row for row in record.rows if row["part"] == "scoring"]
    if experiment.sets > 1 or experiment.values is not None:  # other policies
        row = next(row for row in rows if "skipped" not in row)
        drawn = pair_of(embedded_plain, experiment.cases(row["number"] + 1)[-1][1])
        assert isinstance(drawn, Pair)
        pair = drawn
    else:
        (row,) = (row for row in rows if row["number"] == NUMBER)
    others = [] if name in LEARNING else of_other_domains(record.rows, pair.case.domain)
    again = experiment.briefly().measure(pair, others)
    found = dict(leaves(again))
    everything = dict(leaves({key: row[key] for key in again}))
    committed = {path: everything[path] for path in found}
    assert experiment.quick is not None or found.keys() == everything.keys()
    far = {
        path: (value, committed[path]) for path, value in found.items()
        if (value != pytest.approx(committed[path], **CLOSE) if isinstance(value, float) else value != committed[path])
    }  # fmt: skip
    # An order of near equals (the best tokens, the farthest) may differ, and with it what was drawn beside them.
    assert len(far) <= len(found) / 50, far
