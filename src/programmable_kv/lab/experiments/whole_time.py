"""How long all experiments together take: the record `lab-time`, which `pkv lab every` writes."""

from __future__ import annotations

from collections.abc import Sequence

from programmable_kv.lab.experiments.every import Every, Outcome
from programmable_kv.lab.experiments.registry import EXPERIMENTS, experiment
from programmable_kv.lab.experiments.runs import Stopwatch
from programmable_kv.models.names import EMBEDDED_PLAIN
from programmable_kv.records import Record, Recorder, digest_of, read_record, record_for


def untouched(asked: Every) -> bool:
    """Whether no experiment has a record to keep or an interrupted run to continue, so that the time is of all."""
    paths = {each: asked.path(each).with_suffix(".partial") for each in EXPERIMENTS.values()}
    return not any(partial.exists() or asked.there(each) for each, partial in paths.items())


def record_time(asked: Every, outcomes: Sequence[Outcome], workers: int, seconds: float, *, command: str) -> Record:
    """Write how long a run of all experiments took.

    Args:
        seconds: from the start of the run to its end.
    """
    name = record_for("lab-time", asked.model, EMBEDDED_PLAIN)
    outcomes = sorted(outcomes, key=lambda each: list(EXPERIMENTS).index(each.name))  # they came as they ended
    chosen = [experiment(each.name) for each in outcomes]
    fingerprint = read_record(outcomes[0].path).model_fingerprint
    watch = Stopwatch()
    recorder = Recorder(
        asked.folder / f"{name}.json",
        name=name,
        version=1,
        title="How long all experiments of the lab take together",
        command=command,
        model=asked.model,
        model_fingerprint=fingerprint,
        data_digest=digest_of(each.digest(asked.count(each), everyday=asked.everyday) for each in chosen),
        seeds=[],
        settings={"scenarios": asked.scenarios or "default", "everyday": asked.everyday, "workers": workers},
        clock=watch,
    )
    watch.add(seconds)
    for each in outcomes:
        recorder.add({"name": each.name, "counted": each.counted, "seconds": round(each.seconds, 1)})
    cases = sum(map(asked.cases, chosen))
    return recorder.finish({"experiments": len(outcomes), "cases": cases, "minutes": seconds / 60})
