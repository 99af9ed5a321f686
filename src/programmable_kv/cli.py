"""`pkv`: the command line.

Help must be instant. So this module and `commands/` import typer and nothing heavy; a command imports what it needs
when it runs.
"""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from programmable_kv import __version__
from programmable_kv.commands import bench, explain, lab, prompts, records, serve, skills, templates, vllm, zoo
from programmable_kv.errors import ProgrammableKVError
from programmable_kv.extras import extra_missing_in

app = typer.Typer(
    name="pkv",
    help="Edit the content of a cached prompt at the price of the tokens touched.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # rich's panels take as long to import as all the rest of the help
)
app.command()(prompts.demo)
app.command()(prompts.edit)
app.command()(explain.explain_miss)
app.command()(serve.serve)
app.command()(serve.serve_key)
app.add_typer(skills.app, name="skills")
app.add_typer(vllm.app, name="vllm")
app.add_typer(bench.app, name="bench")
app.add_typer(lab.app, name="lab")
app.command()(zoo.zoo)
app.command()(templates.template)
app.command()(records.results)
app.command()(records.figures)

_INTERRUPTED = 130
"""the exit status of typer after Ctrl-C"""
_RECORDING = (["bench"], ["lab"], ["zoo"])
"""commands that keep their measured rows when they are interrupted"""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"programmable-kv {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and stop")
    ] = False,
) -> None:
    """Edit the content of a cached prompt at the price of the tokens touched."""


def _fail(kind: str, message: str) -> NoReturn:
    typer.echo(f"{typer.style('error', fg='red', bold=True)} ({kind}): {message}", err=True)
    sys.exit(1)


def main() -> None:
    """Run the command line. A known error prints one line to stderr and exits with status 1, without a traceback."""
    try:
        app(prog_name="pkv")
    except ProgrammableKVError as error:
        _fail(type(error).__name__.removesuffix("Error"), str(error))
    except ModuleNotFoundError as error:
        told = extra_missing_in(error)
        if told is None:
            raise
        _fail("MissingExtra", told)
    except OSError as error:  # a full disk, a folder without write permission
        _fail(
            "OS",
            f"{error}. What was stored before is unchanged: make room or choose another place, and run it again.",
        )
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            kept = (
                ". Run the same command again to continue from the rows already measured"
                if sys.argv[1:2] in _RECORDING
                else ""
            )
            typer.echo(f"interrupted{kept}", err=True)
        raise
