"""`python -m training.design --out FOLDER`: train the adapter for `design` visibility.

Training takes minutes on one data-centre GPU (`--seconds 420 --workers 14`), and hours on two CPU cores. It resumes
from the last checkpoint in FOLDER.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from programmable_kv.errors import ProgrammableKVError
from training.design.recipe import DesignRecipe, mixture_of
from training.options import positive


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, report on stdout, and return the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked

    import torch

    from programmable_kv.models.fetch import adapter_folder, base_folder
    from programmable_kv.models.names import EMBEDDED_PLAIN
    from training.design.loop import Settings, run
    from training.design.model import new_adapter

    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = torch.device(device).type == "cuda"
    if given.rank is not None and given.adapter is not None:
        parser.error("--rank begins a new adapter and --adapter continues one: give only one of them")
    recipe = DesignRecipe(seconds=given.seconds)
    chosen = {name: getattr(given, name) for name in _RECIPE if getattr(given, name) is not None}
    recipe = replace(recipe, **chosen)
    score_count = (512 if on_gpu else 24) if given.score_count is None else given.score_count
    try:
        if given.family:
            recipe = replace(recipe, mixture=mixture_of(given.family))
        base = given.base or base_folder()
        adapter = given.adapter or adapter_folder(EMBEDDED_PLAIN)
        if given.rank is not None:
            adapter = new_adapter(base, given.rank, given.out / "start", recipe.seed)
        settings = Settings(
            base=base,
            adapter=adapter,
            out=given.out,
            device=device,
            workers=given.workers,
            tokens_per_pass=given.tokens_per_pass or (32768 if on_gpu else 2048),
            score_count=score_count,
            checkpoint_seconds=given.checkpoint_seconds,
            light=given.light_checkpoints,
            stop_after=given.stop_after,
        )
        folder = run(settings, recipe, lambda line: print(line, flush=True))
    except ProgrammableKVError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    print(f"The adapter is in {folder}: adapter_model.safetensors, adapter_config.json, training.json")
    return 0


_RECIPE = ("steps", "seed", "sequences_per_step", "learning_rate", "replay_windows", "replay_every", "longest")
"""names of the options that set a field of the recipe"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.design", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoints and the result; a checkpoint in it is resumed"
    )
    parser.add_argument("--base", type=Path, help="a folder with the base model [default: the embedded model's base]")
    parser.add_argument("--adapter", type=Path, help="a folder with the adapter to continue [default: the shipped one]")
    parser.add_argument(
        "--rank", type=positive, help="begin a new adapter of this rank, for a --base other than the embedded models'"
    )
    parser.add_argument("--device", help="device to train on [default: cuda if available, otherwise cpu]")
    parser.add_argument(
        "--seconds", type=float, help="training time in seconds; the cosine follows the elapsed share of it"
    )
    parser.add_argument("--steps", type=positive, help="number of training steps, if --seconds is not given")
    parser.add_argument("--stop-after", type=positive, help="stop at this step of the schedule")
    parser.add_argument("--workers", type=int, default=0, help="processes that make the data; 0: this process makes it")
    parser.add_argument("--tokens-per-pass", type=positive, help="padded tokens in one forward and backward pass")
    parser.add_argument("--score-count", type=int, help="held-out cases in each arm; 0: do not compute scores")
    parser.add_argument("--checkpoint-seconds", type=float, default=60.0, help="seconds between two checkpoints")
    parser.add_argument(
        "--light-checkpoints",
        action="store_true",
        help="write only the adapter as a checkpoint; it cannot be resumed",
    )
    parser.add_argument("--sequences-per-step", type=positive)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--replay-windows", type=int)
    parser.add_argument("--replay-every", type=positive)
    parser.add_argument("--longest", type=positive, help="most tokens in a sequence; longer ones are drawn again")
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--family",
        action="append",
        metavar="NAME=SHARE",
        help="a family of sequences and its share, as in 'facts alone=0.1'; the families given replace the recipe's mixture",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
