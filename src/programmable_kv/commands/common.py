"""What the commands share: consoles, options, the reading of arguments, and progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from programmable_kv.errors import InvalidValueError

out = Console()
err = Console(stderr=True)

ModelOption = Annotated[str, typer.Option("--model", help="'embedded', a Hub id, a folder, or a .gguf file")]
OutOption = Annotated[Path | None, typer.Option("--out", help="the record's file; by default in results/")]


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValueError(f"cannot read {path}: {error}") from error


def pairs(given: list[str], option: str) -> dict[str, str]:
    found = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals:
            raise InvalidValueError(f"{option} takes name=value, got {item!r}")
        found[name] = value
    return found


def record_path(given: Path | None, name: str) -> Path:
    from programmable_kv.records import results_folder

    return given or results_folder() / f"{name}.json"


def command() -> str:
    """The command line that makes a record; where the record goes is no part of it."""
    words = sys.argv[1:]
    after = {index + 1 for index, word in enumerate(words) if word == "--out"}
    kept = [word for i, word in enumerate(words) if i not in after and word.partition("=")[0] != "--out"]
    return " ".join(["pkv", *kept])


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; the block gets `report(done, total)`."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)
