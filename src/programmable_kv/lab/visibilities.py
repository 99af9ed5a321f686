"""How many policies does a stock model still solve under each visibility? On short policies in everyday words.

Every policy is prefilled from scratch under both values of its field, and is solved if both answers are right. `causal`
is plain causal attention. `mentions` is the default of `visibility="design"`: the lines that mention the field read it.
Under `turns` only the open question does. An edit by design leaves the same cache as such a prefill, so the figures
also hold after edits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from programmable_kv.design.declared import ReadBy
from programmable_kv.design.visibility import Visibility
from programmable_kv.lab.mentions import written
from programmable_kv.lab.stock_readers import SEED, cases
from programmable_kv.models.load import Model
from programmable_kv.notebook.notebook import Notebook
from programmable_kv.records import Record, Recorder, digest_of, record_on, wilson
from programmable_kv.scenarios.everyday import EVERYDAY
from programmable_kv.scenarios.mentioned import Mentioned

ARMS = (str(Visibility.CAUSAL), str(ReadBy.MENTIONS), str(ReadBy.TURNS))


def record_name(model: Model) -> str:
    """The name of a model's record."""
    return record_on("visibilities", model.name)


def run(
    model: Model, count: int, path: Path, *, report: Callable[[int, int], None] | None = None, command: str = ""
) -> Record:
    """Ask `count` policies of each way under both values, in every arm."""
    drawn = list(cases(count))
    recorder = Recorder(
        path,
        name=record_name(model),
        version=1,
        title="Policies solved under each visibility",
        command=command,
        model=Path(model.name).name,
        model_fingerprint=model.fingerprint,
        data_digest=digest_of(case.text() for _, case in drawn),
        seeds=[SEED],
        settings={"count": count, "dtype": str(model.engine.dtype)},
    )
    recorder.collect(
        drawn,
        lambda it: {"number": it[0], "way": it[1].way.name},
        lambda it: {"number": it[0], **_row(model, it[1])},
        report,
    )
    return recorder.finish(summarise(recorder.rows))


def _row(model: Model, case: Mentioned) -> dict[str, Any]:
    row: dict[str, Any] = {"way": case.way.name}
    for arm in ARMS:
        chosen = {value: decided(model, case, arm, value) for value in case.actions}
        right = {value: chosen[value] == action for value, action in case.actions.items()}
        row[arm] = {"right": sum(right.values()), "solved": all(right.values()), "flips": len(set(chosen.values())) > 1}
    return row


def decided(model: Model, case: Mentioned, arm: str, value: str) -> str:
    """The choice with that value in the text."""
    return notebook_under(model, case, arm, value).decide(None, case.options).choice


def notebook_under(model: Model, case: Mentioned, arm: str, value: str) -> Notebook:
    """A prefilled notebook with the policy, the request and that value."""
    way = Visibility.CAUSAL if arm == Visibility.CAUSAL else Visibility.DESIGN
    notebook = written(Notebook(model, visibility=way), case, {**case.values, case.field: value})
    if way is Visibility.DESIGN:
        notebook.mentions(case.field, *case.declared).readable(case.field, by=arm)
    notebook.prefill()
    return notebook


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By way and over all: how often an arm solves a policy, also among those solved causally; right single answers."""
    ways = {way.name: [row for row in rows if row["way"] == way.name] for way in EVERYDAY}
    return {name: _part(found) for name, found in {"all": rows, **ways}.items()}


def _part(rows: list[dict[str, Any]]) -> dict[str, Any]:
    known = [row for row in rows if row[Visibility.CAUSAL]["solved"]]
    part: dict[str, Any] = {"asked": len(rows), "solved_causally": len(known)}
    for arm in ARMS:
        part[arm] = {
            "right": wilson(sum(row[arm]["right"] for row in rows), 2 * len(rows)).model_dump(),
            "solved": wilson(sum(row[arm]["solved"] for row in rows), len(rows)).model_dump(),
            "kept": wilson(sum(row[arm]["solved"] for row in known), len(known)).model_dump(),
            "flips": wilson(sum(row[arm]["flips"] for row in rows), len(rows)).model_dump(),
        }
    return part
