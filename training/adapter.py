"""`python -m training.adapter --out FOLDER`: train the adapter of `embedded-plain`.

Training takes about four and a half hours on two cores. It resumes from the last checkpoint in FOLDER.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from programmable_kv.errors import ProgrammableKVError
from training.options import positive
from training.recipe import TrainingRecipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the adapter, report each step on stderr, and return the exit status."""
    given = _parser().parse_args(arguments)
    recipe = TrainingRecipe()
    if given.seed is not None:
        recipe = replace(recipe, seed=given.seed)
    last = min(recipe.steps, given.stop_after or recipe.steps)

    def report(step: int, decision_loss: float, replay_loss: float) -> None:
        print(f"step {step + 1}/{last}: decisions {decision_loss:.3f}, text {replay_loss:.3f} nats", file=sys.stderr)

    from training.train import train

    try:
        folder = train(
            given.base or _embedded_base(),
            given.out,
            recipe,
            stop_after=given.stop_after,
            change_recipe=given.change_recipe,
            report=report,
        )
    except ProgrammableKVError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    print(f"The adapter is in {folder}: adapter_model.safetensors, adapter_config.json, training.json")
    return 0


def _embedded_base() -> Path:
    from programmable_kv.models.fetch import base_folder

    return base_folder()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.adapter", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoints and the result; a checkpoint in it is resumed"
    )
    parser.add_argument("--base", type=Path, help="a folder with the base model [default: the embedded model's base]")
    parser.add_argument("--stop-after", type=positive, help="stop at this step of the recipe's schedule")
    parser.add_argument("--seed", type=int, help="use this seed instead of the recipe's")
    parser.add_argument(
        "--change-recipe",
        action="store_true",
        help="continue from a checkpoint of another recipe; the change is recorded",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
