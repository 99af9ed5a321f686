"""One policy of each committed record measured again, on the real weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from programmable_kv.edits.modes import Mode
from programmable_kv.lab.experiments import (
    boundary,
    conclusion,
    errata,
    families,
    memory,
    prevention,
    seam,
    skills,
)
from programmable_kv.lab.experiments.cases import cases
from programmable_kv.lab.experiments.experiment import Row, of_other_domains
from programmable_kv.lab.experiments.pair import Pair, pair_of
from programmable_kv.lab.experiments.registry import EXPERIMENTS
from programmable_kv.records import read_record

RESULTS = Path(__file__).parents[3] / "results"
NUMBER = 3
"""the first case in which two values are equally many tokens long"""
CLOSE = {"rel": 0.01, "abs": 0.05}
"""nats, and shares of attention: another machine's arithmetic moves them less"""


def few_arms(pair: Pair) -> Row:
    arms = prevention.readers(pair.text)
    return {"arms": prevention.by_arm(pair, {name: arms[name] for name in ("nobody", "readers", "values_carried_on")})}


def one_skill(pair: Pair) -> Row:
    return {"one": seam.compared(pair, skills.layout(pair, []), dict(pair.first_tokens), deviates=True)}


def two_settings(pair: Pair) -> Row:
    (below,) = (each for each in boundary.settings(pair.case) if each.name == "below")
    other = boundary.in_setting(pair, below)
    assert isinstance(other, Pair)
    return {"settings": {"above": boundary.patched_in(pair), "below": boundary.patched_in(other)}}


def default_wording(pair: Pair) -> Row:
    notebook = errata.prefilled(pair, errata.DEFAULT_TEMPLATE)
    edits = {name: partial(errata.edited, pair, notebook, mode) for name, mode in (
        ("default", Mode.ERRATUM), ("stale", Mode.STALE))}  # fmt: skip
    back = errata.tried(notebook, partial(errata.back, pair, notebook, Mode.ERRATUM))
    return {
        "wording": {name: errata.tried(notebook, edit) for name, edit in edits.items()},
        "back": {str(Mode.ERRATUM): back},
    }


def without_learning(pair: Pair) -> Row:
    return conclusion.measure(pair, [])


PARTS: dict[str, Callable[[Pair], Row]] = {
    "prevention": few_arms, "seam": one_skill, "boundary": two_settings, "errata": default_wording,
    "conclusion": without_learning, "memory": partial(memory.measure, _=[], brief=True),
    "families": partial(families.measure, _=[], texts=("list", "prose")),
}  # fmt: skip
"""of experiments that take long, what is measured again"""
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
def test_a_slice_of_the_record(name: str, pair: Pair, embedded: Any) -> None:
    record, experiment = read_record(RESULTS / f"{name}.json"), EXPERIMENTS[name]
    assert record.version == experiment.version
    rows = [row for row in record.rows if row["part"] == "scoring"]
    if experiment.sets > 1 or experiment.values is not None:  # other policies
        row = next(row for row in rows if "skipped" not in row)
        drawn = pair_of(embedded, experiment.cases(row["number"] + 1)[-1][1])
        assert isinstance(drawn, Pair)
        pair = drawn
    else:
        (row,) = (row for row in rows if row["number"] == NUMBER)
    others = of_other_domains(record.rows, pair.case.domain)
    again = PARTS[name](pair) if name in PARTS else experiment.measure(pair, others)
    found = dict(leaves(again))
    everything = dict(leaves({key: row[key] for key in again}))
    committed = {path: everything[path] for path in found}
    assert name in PARTS or found.keys() == everything.keys()
    far = {
        path: (value, committed[path]) for path, value in found.items()
        if (value != pytest.approx(committed[path], **CLOSE) if isinstance(value, float) else value != committed[path])
    }  # fmt: skip
    # An order of near equals (the best tokens, the farthest) may differ, and with it what was drawn beside them.
    assert len(far) <= len(found) / 50, far
