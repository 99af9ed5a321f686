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
    """Return the record of the run that wrote an adapter and its `training.json` to a folder.

    Args:
        fingerprint: fingerprint of the model with this adapter.
        command, commit, started, machine, notes: how and where the run was made, which `training.json` does not
            contain.
    """
    run: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    before, after = run["held_out"]["before"], run["held_out"]["after"]
    rows = [{"arm": arm, "before": count, "after": after["answers"][arm]} for arm, count in before["answers"].items()]
    summary: dict[str, Any] = {
        record_slug(row["arm"]).replace("-", "_"): {
            when: wilson(row[when]["right"], row[when]["n"]).model_dump() for when in ("before", "after")
        }
        for row in rows
    }
    summary["perplexity_ratio"] = {"before": before["perplexity_ratio"], "after": after["perplexity_ratio"]}
    summary |= {"steps": run["step"], "seconds": run["seconds"]}
    return Record(
        name=NAME, version=1, title="Held-out answers before and after training under visibility by design",
        command=command, commit=commit, started=started, wall_seconds=run["seconds"], model="embedded-design",
        model_fingerprint=fingerprint, data_digest=digest_of(row["arm"] for row in rows),
        seeds=[run["recipe"]["seed"]], machine=machine, settings=run["recipe"], rows=rows, summary=summary, complete=True,
        notes=notes,
    )  # fmt: skip
