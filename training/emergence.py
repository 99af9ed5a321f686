"""`python -m training.emergence --out FOLDER --record FILE`: when do notes appear in the adapter's training?

Repeats the first steps of the adapter's recipe, from the same base and the same data, and probes held-out policies in
between. These have two rules and nothing else, as in the recipe's first stage. It takes some minutes on one core. The
same command resumes it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from programmable_kv.errors import ProgrammableKVError
from programmable_kv.lab.along_adapter import looked_at, summed, with_adapter
from programmable_kv.lab.experiments.cases import SEED, Case, cases
from programmable_kv.models.load import load_model
from programmable_kv.records import Record, Recorder, digest_of
from training.options import positive
from training.recipe import TrainingRecipe

STEPS = (0, 10, 20, 30, 40, 60, 80, 120)
COUNT = 32
"""number of policies drawn; about two thirds can be probed"""
WINDOW = 10
"""number of steps over which a loss is averaged"""
COMPETENT = 0.8
"""smallest share of policies, right under both values, at which the model counts as competent"""


def drawn(count: int) -> list[Case]:
    """Draw policies of two rules and no other lines."""
    return cases(count, values=2, fillers=0)


def run(
    base: Path,
    folder: Path,
    path: Path,
    recipe: TrainingRecipe,
    *,
    steps: Sequence[int] = STEPS,
    count: int = COUNT,
    report: Callable[[int, int], None] | None = None,
    command: str = "",
) -> Record:
    """Train up to each of `steps` and probe the model there. Checkpoints go to `folder`, the record to `path`.

    Raises:
        TrainingError: the folder contains a checkpoint of another recipe.
    """
    policies = drawn(count)
    own = load_model(base)
    recorder = Recorder(
        path,
        name="along-training",
        version=1,
        title="The first steps of the adapter's training: decisions and notes",
        command=command,
        model="embedded base",
        model_fingerprint=own.fingerprint,
        data_digest=digest_of(case.text() for case in policies),
        seeds=[SEED, recipe.seed],
        settings={"scenarios": count, "steps": list(steps)},
    )

    def row(step: int) -> dict[str, Any]:
        if step == 0:
            return {"step": 0, **looked_at(own, policies)}
        return {"step": step, "loss": _trained(base, folder, recipe, step)} | looked_at(
            with_adapter(base, folder), policies
        )

    recorder.collect(list(steps), lambda step: {"step": step}, row, report)
    return recorder.finish(summarise(recorder.rows))


def _trained(base: Path, folder: Path, recipe: TrainingRecipe, step: int) -> float:
    """Train up to a step if needed. Return the mean decision loss of the last `WINDOW` steps, in nats per token."""
    from training.train import train

    exported = folder / "training.json"
    if not exported.exists() or json.loads(exported.read_text(encoding="utf-8"))["step"] < step:
        train(base, folder, recipe, stop_after=step)
    curve = json.loads(exported.read_text(encoding="utf-8"))["curve"]
    return round(fmean(loss for number, loss, _ in curve if step - WINDOW <= number < step), 4)


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the results of each step, and the first step at which the model is competent."""
    summary: dict[str, Any] = {f"at_{row['step']}": summed(row) for row in rows}
    for row in rows:
        if "loss" in row:
            summary[f"at_{row['step']}"]["loss"] = row["loss"]
    able = [row["step"] for row in rows if summary[f"at_{row['step']}"]["right"]["value"] >= COMPETENT]
    return summary | ({"competent_from": able[0]} if able else {})


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and probe, report each probe on stderr, and return the exit status."""
    from programmable_kv.models.fetch import base_folder

    given = _parser().parse_args(arguments)

    def report(done: int, total: int) -> None:
        print(f"probed {done} of {total} times", file=sys.stderr)

    try:
        run(
            given.base or base_folder(),
            given.out,
            given.record,
            TrainingRecipe(),
            count=given.scenarios,
            report=report,
            command=shlex.join(["python", "-m", "training.emergence", "--scenarios", str(given.scenarios)]),
        )
    except ProgrammableKVError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Record: {given.record}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.emergence", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints; a checkpoint in it is resumed")
    parser.add_argument("--record", type=Path, default=Path("results/along-training.json"), help="file for the record")
    parser.add_argument("--base", type=Path, help="a folder with the base model [default: the embedded model's base]")
    parser.add_argument("--scenarios", type=positive, default=COUNT, help="number of held-out policies to draw")
    return parser


if __name__ == "__main__":
    sys.exit(main())
