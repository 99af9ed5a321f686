"""What commands that write a record share: load a model, measure with a progress bar, print the record's summary.

An interrupted run keeps its rows, and the same command continues from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from programmable_kv.commands.common import command, out, progress, record_path
from programmable_kv.commands.common import load as load_for_command
from programmable_kv.extras import require_extra

if TYPE_CHECKING:
    from programmable_kv.models.load import Model
    from programmable_kv.records import Record

LengthsOption = Annotated[str, typer.Option(help="lengths in tokens, separated by commas")]
RepeatsOption = Annotated[int, typer.Option(min=1, help="measurements for each way")]
DtypeOption = Annotated[str, typer.Option(help="a torch dtype's name, or 'auto' for the one on disk")]


def load(model: str, *, dtype: str = "float32", device: str | None = None) -> Model:
    """Load the model that a command measures (see `load_model`).

    Raises:
        MissingExtraError: the extra `[lab]` is not installed. The summary's intervals need it, so this is checked
            before hours of measuring, not after.
    """
    require_extra("lab", "scipy", "statsmodels")
    return load_for_command(model, dtype=dtype, device=device)


def measure(
    run: Callable[..., Record], model: Model, out_path: Path | None, name: str, title: str, total: int, **settings: Any
) -> Record:
    """Run `run(model, path=, report=, command=, **settings)` with a progress bar, and print the summary of its record.

    Args:
        out_path: the file for the record; None for `name` in the results folder.
        name: the record's name (see `named`).
        title: the title of the progress bar.
        total: how many steps the progress bar has.
    """
    path = record_path(out_path, name)
    with progress(title, total) as report:
        record = run(model, path=path, report=report, command=command(), **settings)
    print_summary(record)
    return record


def named(stem: str, model: Model) -> str:
    """The name of a record that is usually about the embedded model; for another model, with the model's name."""
    from programmable_kv.models.names import EMBEDDED
    from programmable_kv.records import record_for

    return record_for(stem, model.name, EMBEDDED)


def print_summary(record: Record) -> None:
    """Print a record's summary as JSON."""
    out.print_json(json.dumps(record.model_dump(mode="json")["summary"]))


def print_figures(record: Record) -> None:
    """Print a record's figures as a table, each with its interval."""
    from rich.table import Table

    table = Table("figure", "value", "95% interval", "n", box=None, pad_edge=False)
    for path, figure in _figures(record.model_dump(mode="json")["summary"]):
        if isinstance(figure, dict):
            table.add_row(
                path, f"{figure['value']:.4g}", f"{figure['low']:.4g} to {figure['high']:.4g}", str(figure["n"])
            )
        else:
            table.add_row(path, f"{figure:.4g}" if isinstance(figure, float) else str(figure), "", "")
    out.print(table)


def _figures(summary: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in summary.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and not {"value", "low", "high", "n"} <= set(value):
            yield from _figures(value, f"{path}.")
        else:
            yield path, value


def parse_lengths(lengths: str, option: str = "--lengths") -> list[int]:
    """Parse lengths that are separated by commas.

    Raises:
        typer.BadParameter: the text is not a list of whole numbers above 0.
    """
    try:
        parsed = [int(length) for length in lengths.split(",")]
    except ValueError:
        parsed = []
    if not parsed or min(parsed) < 1:
        raise typer.BadParameter(
            f"{lengths!r} is not a list of whole numbers above 0, separated by commas", param_hint=option
        )
    return parsed
