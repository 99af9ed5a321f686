"""One policy of each committed record measured again, on the real weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

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
RECORDED = [name for name in EXPERIMENTS if (RESULTS / f"{name}.json").exists()]


@pytest.fixture(scope="module")
def pair(embedded: Any) -> Pair:
    found = pair_of(embedded, cases(NUMBER + 1)[NUMBER])
    assert isinstance(found, Pair), found
    return found


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(each, f"{path}.{key}")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from leaves(each, f"{path}.{index}")
    else:
        yield path, value


@pytest.mark.xdist_group("experiments")  # the pair is prefilled once
@pytest.mark.parametrize("name", RECORDED)
def test_a_slice_of_the_record(name: str, pair: Pair) -> None:
    record = read_record(RESULTS / f"{name}.json")
    assert record.version == EXPERIMENTS[name].version
    [row] = [row for row in record.rows if (row["part"], row["number"]) == ("scoring", NUMBER)]
    again = EXPERIMENTS[name].measure(pair, of_other_domains(record.rows, pair.case.domain))
    committed = dict(leaves({key: row[key] for key in again}))
    found = dict(leaves(again))
    assert found.keys() == committed.keys()
    far = {
        path: (value, committed[path]) for path, value in found.items()
        if (value != pytest.approx(committed[path], **CLOSE) if isinstance(value, float) else value != committed[path])
    }  # fmt: skip
    # An order of near equals (the best tokens, the farthest) may differ, and with it what was drawn beside them.
    assert len(far) <= len(found) / 50, far
