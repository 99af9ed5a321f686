"""`pkv`: the command line."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer

from programmable_kv.commands import bench, lab, prompts, records, skills, zoo
from programmable_kv.commands.common import err
from programmable_kv.errors import ProgrammableKVError

app = typer.Typer(
    name="pkv",
    help="Edit the content of a cached prompt at the price of the tokens touched.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(prompts.demo)
app.command()(prompts.edit)
app.add_typer(skills.app, name="skills")
app.add_typer(bench.app, name="bench")
app.add_typer(lab.app, name="lab")
app.command()(zoo.zoo)
app.command()(records.results)
app.command()(records.figures)

_INTERRUPTED = 130
"""typer's exit status after Ctrl-C"""


def _fail(kind: str, message: str) -> NoReturn:
    err.print(f"[bold red]error[/] ({kind}):", end=" ")
    err.print(message, markup=False, highlight=False)
    sys.exit(1)


def main() -> None:
    """Run the command line; an error we know is one line on stderr and exit status 1, not a traceback."""
    try:
        app()
    except ProgrammableKVError as error:
        _fail(type(error).__name__.removesuffix("Error"), str(error))
    except OSError as error:  # a full disk, a folder that may not be written
        _fail(
            "OS", f"{error}. What was stored before is as it was: make room or choose another place, and run it again."
        )
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            err.print("interrupted. A record keeps the rows that were measured: the same command goes on from there")
        raise
