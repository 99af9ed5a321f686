"""Makes a record of a training run's held-out scores, so that documents can quote them."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from programmable_kv.records import Machine, Record, digest_of, record_slug, wilson

NAME = "design-training"


def record_of(
    folder: Path, *, fingerprint: str, command: str, commit: str, started: datetime, machine: Machine, notes: list[str]
) -> Record:
    """Return the record of the runs that led to an adapter, from the `training.json` in its folder.

    A row has an arm's scores before the first run, between the runs, and after the last one.

    Args:
        fingerprint: fingerprint of the model with this adapter.
        command, commit, started, machine, notes: how and where the run was made, which `training.json` does not
            contain.
    """
    last: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    runs = [*last["earlier"], last]
    scored = {"before": runs[0]["held_out"]["before"]}
    scored |= {f"between_{number}": run["held_out"]["before"] for number, run in enumerate(runs[1:], start=1)}
    scored["after"] = last["held_out"]["after"]
    rows = [
        {"arm": arm, **{when: found["answers"][arm] for when, found in scored.items()}}
        for arm in scored["before"]["answers"]
    ]
    summary: dict[str, Any] = {
        record_slug(row["arm"]).replace("-", "_"): {
            when: wilson(row[when]["right"], row[when]["n"]).model_dump() for when in scored
        }
        for row in rows
    }
    summary["perplexity_ratio"] = {when: found["perplexity_ratio"] for when, found in scored.items()}
    for number, run in enumerate(runs, start=1):
        sequences = run["step"] * run["recipe"]["sequences_per_step"]
        summary[f"run_{number}"] = {"steps": run["step"], "seconds": run["seconds"], "sequences": sequences}
    return Record(
        name=NAME, version=2, title="Held-out answers before and after training under visibility by design",
        command=command, commit=commit, started=started, wall_seconds=last["seconds"], model="embedded",
        model_fingerprint=fingerprint, data_digest=digest_of(row["arm"] for row in rows),
        seeds=[run["recipe"]["seed"] for run in runs], machine=machine, rows=rows, summary=summary, complete=True,
        settings={f"run_{number}": run["recipe"] for number, run in enumerate(runs, start=1)},
        notes=notes,
    )  # fmt: skip
