"""Do readers carry a decision on a model that was not trained for this? On short policies in everyday words.

A policy that full prefill does not solve under both values is counted but not measured further: it has no decision to
preserve.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from programmable_kv.edits.modes import Mode
from programmable_kv.lab import mentions, same_budget
from programmable_kv.models.load import Model
from programmable_kv.notebook.decision import Decision
from programmable_kv.notebook.suggesting import SHARE
from programmable_kv.records import Record, Recorder, digest_of, record_on, wilson
from programmable_kv.scenarios.everyday import EVERYDAY, everyday
from programmable_kv.scenarios.mentioned import Mentioned

SEED = 93_000
ARMS = (*mentions.ARMS, str(Mode.SUFFIX), *same_budget.ARMS)


def record_name(model: Model) -> str:
    """The name of a model's record."""
    return record_on("stock-readers", model.name)


def cases(count: int) -> Iterator[tuple[int, Mentioned]]:
    """Yield `count` policies of each way, in turn, with their numbers. A longer draw starts with a shorter one."""
    for number in range(count):
        for way in EVERYDAY:
            yield number, everyday(random.Random(f"{SEED}/{way.name}/{number}"), way)


def run(
    model: Model, count: int, path: Path, *, report: Callable[[int, int], None] | None = None, command: str = ""
) -> Record:
    """Change the field of `count` policies of each way, in every arm, and compare with full prefill."""
    drawn = list(cases(count))
    recorder = Recorder(
        path,
        name=record_name(model),
        version=1,
        title="Agreement with full prefill of readers and other edits on a stock model",
        command=command,
        model=Path(model.name).name,
        model_fingerprint=model.fingerprint,
        data_digest=digest_of(case.text() for _, case in drawn),
        seeds=[SEED],
        settings={"count": count, "share": SHARE, "dtype": str(model.engine.dtype)},
    )
    recorder.collect(
        drawn,
        lambda it: {"number": it[0], "way": it[1].way.name},
        lambda it: {"number": it[0], **_row(model, it[1], it[0])},
        report,
    )
    return recorder.finish(summarise(recorder.rows))


def _row(model: Model, case: Mentioned, number: int) -> dict[str, Any]:
    notebook = mentions.notebook_of(model, case)
    row = mentions.outcome(notebook, case)
    if not mentions.solved(row):
        return row
    row |= mentions.arms(notebook, case)
    row[str(Mode.SUFFIX)] = mentions.edited(notebook, case, Mode.SUFFIX)
    declared = mentions.declaring(notebook, case.field, case.declared)

    def ask(mode: Mode, k: int) -> Decision:
        return declared.decide(None, case.options, edits={case.field: case.new}, mode=mode, k=k)

    rng = random.Random(f"{SEED}/lines/{case.way.name}/{number}")
    for arm, decision in same_budget.decisions(declared, {case.field: case.new}, rng, ask):
        row[arm] = mentions.measured(decision)
    return row


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many policies are solved, and the agreement (Wilson) among those, by way."""
    ways = {way.name: [row for row in rows if row["way"] == way.name] for way in EVERYDAY}
    summary = {}
    for name, found in {"all": rows, **ways}.items():
        part = mentions.part_of(found, ARMS)
        part["solved"] = wilson(part["counted"], part["drawn"]).model_dump()
        summary[name] = part
    return summary
