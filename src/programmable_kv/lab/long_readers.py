"""Recompute a field and its readers in contexts of about 4,000 tokens, with hundreds of unrelated rules.

The request comes before the edit. Only the cheap arms run. A policy that full prefill does not solve under both values
is not measured further.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from programmable_kv.edits.modes import Mode
from programmable_kv.lab import readers, same_budget
from programmable_kv.lab.experiments.summaries import share_true
from programmable_kv.models.load import Model
from programmable_kv.notebook.decision import Decision
from programmable_kv.records import Record, Recorder, digest_of

FILLERS = 410
KINDS = tuple(
    readers.Kind(f"{name}_long", gates, two_hop, FILLERS)
    for name, gates, two_hop in (("one_set", 1, False), ("two_hops", 1, True), ("two_sets", 2, None))
)
ARMS = (*map(str, readers.LATER), str(Mode.IN_PLACE), same_budget.RANDOM_LINES)


def run(
    model: Model, count: int, path: Path, *, report: Callable[[int, int], None] | None = None, command: str = ""
) -> Record:
    """Change one field in each of `count` policies of each kind, and compare with full prefill."""
    drawn = list(readers.cases(count, KINDS))
    recorder = Recorder(
        path,
        name=path.stem,
        version=1,
        title="Agreement with full prefill where a field and its readers are computed again, in long contexts",
        command=command,
        model=model.name,
        model_fingerprint=model.fingerprint,
        data_digest=digest_of(case.text() for case in drawn),
        seeds=[readers.SEED],
        settings={"count": count, "fillers": FILLERS},
    )
    recorder.collect(drawn, lambda it: {"number": it.number, "kind": it.kind.name}, lambda it: _row(model, it), report)
    return recorder.finish(summarise(recorder.rows))


def _row(model: Model, case: readers.Case) -> dict[str, Any]:
    notebook = readers.notebook_of(model, case, asked=True)
    row: dict[str, Any] = {
        "number": case.number, "kind": case.kind.name, "domain": case.scenario.domain, "tokens": len(notebook),
        "old": case.gate.actions[case.old], "new": case.gate.actions[case.new],
        "before": notebook.decide(None, case.scenario.options).choice,
    }  # fmt: skip
    if row["before"] != row["old"]:
        return row
    row["full"] = readers.edited(notebook, None, case, Mode.FULL)
    if row["full"]["choice"] != row["new"]:
        return row
    for mode in (*readers.LATER, Mode.IN_PLACE):
        row[str(mode)] = readers.edited(notebook, None, case, mode)

    def ask(mode: Mode, k: int) -> Decision:
        return readers.decision_of(notebook, None, case, mode, k)

    rng = random.Random(f"{readers.SEED}/lines/{case.kind.name}/{case.number}")
    null = (same_budget.RANDOM_LINES,)
    for arm, decision in same_budget.decisions(notebook, {case.gate.field: case.new}, rng, ask, null):
        row[arm] = readers.measured(decision)
    return row


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Agreement and share of a full prefill's tokens, where full prefill is right under both values.

    The intervals allow for domains.
    """
    kinds = {kind.name: [row for row in rows if row["kind"] == kind.name] for kind in KINDS}
    return {name: _part(found) for name, found in {"all": rows, **kinds}.items()}


def _part(rows: list[dict[str, Any]]) -> dict[str, Any]:
    right = [row for row in rows if ARMS[0] in row]
    full = sum(row["full"]["tokens_computed"] for row in right)
    part: dict[str, Any] = {"drawn": len(rows), "counted": len(right)}
    part["full"] = {"mean_tokens_computed": round(full / max(1, len(right)), 1)}
    for arm in ARMS:
        computed = sum(row[arm]["tokens_computed"] for row in right)
        part[arm] = {
            "agreement": share_true(right, [row[arm]["choice"] == row["full"]["choice"] for row in right]),
            "mean_tokens_computed": round(computed / max(1, len(right)), 1),
            "share_of_tokens": round(computed / max(1, full), 5),
        }
    return part
