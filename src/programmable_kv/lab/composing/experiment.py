"""Runs a suite of comparisons on one model, into one record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from programmable_kv.lab.composing import tasks as ask
from programmable_kv.lab.composing.arms import ALL_ARMS, ArmComparison
from programmable_kv.lab.composing.frame import InsertionPoint, frame_at
from programmable_kv.lab.composing.horizon import SEED as HORIZON_SEED
from programmable_kv.lab.composing.horizon import play
from programmable_kv.lab.composing.suites.suite import Group, Suite
from programmable_kv.lab.experiments.summaries import share_true
from programmable_kv.models.load import Model
from programmable_kv.records import (
    Record,
    Recorder,
    bootstrap_mean,
    by_thirds,
    cluster_bootstrap,
    clustered_wilson,
    digest_of,
    record_on,
)

TURNS = 40
"""Turns of each long conversation."""


def run(
    model: Model,
    path: Path,
    suite: Suite,
    *,
    turns: int = TURNS,
    report: Callable[[int, int], None] | None = None,
    command: str = "",
) -> Record:
    """Compare each of a suite's tasks in each of its arms, and play its long conversations.

    A model without a chat template cannot hold a conversation, so it plays none.
    """
    groups = suite.groups()
    horizons = suite.horizons if model.has_chat_template else 0
    recorder = Recorder(
        path,
        name=path.stem,
        version=suite.version,
        title=suite.title,
        command=command,
        model=Path(model.name).name,
        model_fingerprint=model.fingerprint,
        data_digest=digest_of(texts_of(groups)),
        seeds=[ask.SEED, HORIZON_SEED],
        settings={
            **asdict(suite),
            **({"horizons": horizons} if suite.horizons else {}),
            "dtype": str(model.dtype),
            "turns": turns,
        },
    )
    total = len(groups) + horizons
    comparison: tuple[InsertionPoint, ArmComparison] | None = None
    for number, group in enumerate(groups):
        if not all(recorder.done(group=number, task=index) for index in range(len(group.tasks))):
            if comparison is None or comparison[0] != group.point:
                comparison = group.point, ArmComparison(model, frame_at(model, group.point))
            for index, row in enumerate(comparison[1].compare(group.tasks, group.arms)):
                if not recorder.done(group=number, task=index):
                    recorder.add({"group": number, "task": index, "place": str(group.point), **row})
        if report is not None:
            report(number + 1, total)
    for number in range(horizons):
        if not recorder.done(kind="horizon", policy=number):
            recorder.add({"kind": "horizon", "policy": number, "turns": play(model, number, turns)})
        if report is not None:
            report(len(groups) + number + 1, total)
    return recorder.finish(summarise(recorder.rows))


def texts_of(groups: Iterable[Group]) -> Iterator[str]:
    """Every text that the comparisons depend on, for the record's digest."""
    for group in groups:
        for task in group.tasks:
            yield from (
                str(group.point),
                task.shared,
                *map(str, task.prefaces),
                *task.pieces,
                task.request,
                *task.options,
            )


def record_name(suite: Suite, model: Model) -> str:
    """The name of a suite's record on a model."""
    return record_on(suite.stem, model.name)


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By kind and place, how often full prefill is right and how each arm compares; long conversations by thirds."""
    summary: dict[str, Any] = {}
    compared = [row for row in rows if row["kind"] != "horizon"]
    for kind in dict.fromkeys(row["kind"] for row in compared):
        of_kind = [row for row in compared if row["kind"] == kind]
        places = dict.fromkeys(row["place"] for row in of_kind)
        summary[kind] = {place: _arms([row for row in of_kind if row["place"] == place]) for place in places}
    plays = [row["turns"] for row in rows if row["kind"] == "horizon"]
    if plays:
        summary["horizon"] = _horizon(plays)
    return summary


def _arms(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Agreement where full prefill is right; disagreements (`flips`), cosine and KL over all rows.

    The intervals of shares allow for domains. (Requests for tools have one domain, so theirs are Wilson's.)
    """
    right = [row for row in rows if row["right"]]
    part: dict[str, Any] = {"full_right": share_true(rows, [row["right"] for row in rows])}
    for arm in (arm.name for arm in ALL_ARMS if arm.name in rows[0]):
        part[arm] = {
            "flips": share_true(rows, [not row[arm]["agrees"] for row in rows]),
            "cosine": bootstrap_mean([row[arm]["cosine"] for row in rows], statistic="median").model_dump(),
            "kl": bootstrap_mean([row[arm]["kl"] for row in rows], statistic="median").model_dump(),
        }
        # If full prefill is never right, there is no decision to preserve.
        if right:
            part[arm]["agreement"] = share_true(right, [row[arm]["agrees"] for row in right])
    return part


def _horizon(plays: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Figures by thirds of the turns. The intervals allow for conversations, whose turns are not independent."""
    part: dict[str, Any] = {}
    for name, thirds in by_thirds(plays).items():
        part[name] = {
            "full_right": clustered_wilson([[row["right"] for row in third] for third in thirds]).model_dump(),
            "live_right": clustered_wilson([[row["live_right"] for row in third] for third in thirds]).model_dump(),
            "kl": cluster_bootstrap([[row["kl"] for row in third] for third in thirds]).model_dump(),
        }
        # If full prefill is never right, there is no decision to preserve.
        right = [agreed for third in thirds if (agreed := [row["agrees"] for row in third if row["right"]])]
        if right:
            part[name]["agreement"] = clustered_wilson(right).model_dump()
    return part
