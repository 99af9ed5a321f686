"""`docs/cli.md`: every command of `pkv` with its arguments and options, from the typer app."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

HEAD = """# The command line

Generated from the code by `python -m scripts.write_docs`; a test fails when it is out of date.
`pkv COMMAND --help` prints the same.
"""


def cli_page() -> str:
    """Return the page, with one section for each command."""
    sections = [_section(words, command) for words, command in commands()]
    return HEAD + "".join(f"\n{section}" for section in sections)


def commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every command and group of commands with its words after `pkv`. The app itself comes first."""
    import typer

    from programmable_kv.cli import app

    yield from _walk((), typer.main.get_command(app))


def options_of(command: Any) -> list[str]:
    """Return all spellings of a command's options."""
    return [spelling for each in command.params for spelling in (*each.opts, *each.secondary_opts)] + ["--help"]


def _walk(words: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, command
    for name, each in sorted(getattr(command, "commands", {}).items()):
        if not each.hidden:
            yield from _walk((*words, name), each)


def _section(words: tuple[str, ...], command: Any) -> str:
    title = " ".join(("pkv", *words))
    level = "##" if len(words) < 2 else "###"
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option" and not each.hidden]
    subcommands = sorted(name for name, each in getattr(command, "commands", {}).items() if not each.hidden)
    usage = [title, *(_metavar(each) for each in arguments)]
    usage += ["COMMAND"] if subcommands else []
    usage += [f"{each.opts[0]} ..." for each in options if each.required]
    usage += ["[OPTIONS]"] if any(not each.required for each in options) else []
    parts = [f"{level} `{title}`", f"```sh\n{' '.join(usage)}\n```", textwrap.dedent(command.help or "").strip()]
    if subcommands:
        parts.append("Commands: " + ", ".join(f"`{name}`" for name in subcommands) + ".")
    rows = [(f"`{_metavar(each)}`", each) for each in arguments]
    rows += [(", ".join(f"`{name}`" for name in (*each.opts, *each.secondary_opts)), each) for each in options]
    if rows:
        table = ["| argument or option | default | what it is |", "| --- | --- | --- |"]
        table += [f"| {names} | {_default(each)} | {_cell(each.help or '')} |" for names, each in rows]
        parts.append("\n".join(table))
    return "\n\n".join(part for part in parts if part) + "\n"


def _metavar(argument: Any) -> str:
    name = argument.name.upper()
    return name if argument.required else f"[{name}]"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    default = parameter.default
    return "" if default is None or default is False or default == () else f"`{default}`"


def _cell(text: str) -> str:
    """Return text as one line for a table, with Markdown characters escaped."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "\\<")
