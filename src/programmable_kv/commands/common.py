"""What the commands share: consoles, common options, parsing of arguments, and progress bars.

Every command's help imports this module, so it imports rich only when something is printed.
"""

from __future__ import annotations

import csv
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from programmable_kv.errors import InvalidArgumentError, InvalidValueError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

    from programmable_kv import Model

STDIN = "-"


class Output:
    """A rich console on stdout or stderr, created when it is first used."""

    def __init__(self, *, stderr: bool = False) -> None:
        self._stderr = stderr

    @cached_property
    def console(self) -> Console:
        from programmable_kv.extras import require_extra

        require_extra("cli", "rich")
        from rich.console import Console

        return Console(stderr=self._stderr)

    def print(self, *objects: Any, **options: Any) -> None:
        """As `rich.console.Console.print`."""
        self.console.print(*objects, **options)

    def print_json(self, text: str) -> None:
        """As `rich.console.Console.print_json`."""
        self.console.print_json(text)

    def status(self, text: str) -> Status:
        """As `rich.console.Console.status`: a spinner while a `with` block runs."""
        return self.console.status(text)


out = Output()
err = Output(stderr=True)

ModelOption = Annotated[
    str, typer.Option("--model", help="'embedded', 'embedded-plain', a Hub id, a folder, or a .gguf file")
]
OutOption = Annotated[Path | None, typer.Option("--out", help="the record's file; by default in results/")]


def load(name: str, **options: Any) -> Model:
    """`load_model` for a command, with the garbage collector paused.

    Importing torch and transformers creates millions of objects that all stay. Scanning them again and again takes a
    sixth of the start-up time.
    """
    gc.disable()
    try:
        from programmable_kv import load_model

        return load_model(name, **options)
    finally:
        gc.enable()
        gc.freeze()


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, or of standard input if the path is `-`.

    Raises:
        InvalidValueError: the file cannot be read.
    """
    try:
        return sys.stdin.buffer.read() if str(path) == STDIN else path.read_bytes()
    except OSError as error:
        raise InvalidValueError(f"cannot read {path}: {error.strerror or error}") from error


def decoded(data: bytes, path: Path) -> str:
    """The text of UTF-8 bytes, with plain line breaks and without a byte order mark.

    Raises:
        InvalidValueError: the bytes are not UTF-8.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidValueError(f"{path} is not UTF-8 text: {error}. Convert it first.") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, or of standard input if the path is `-`.

    Raises:
        InvalidValueError: the file cannot be read, or is not UTF-8.
    """
    return decoded(read_bytes(path), path)


def pairs(given: list[str], option: str) -> dict[str, str]:
    """Parse name=value arguments. `@path` is the text of that file without the line breaks at its end; `@@x` is `@x`.

    Raises:
        InvalidValueError: an argument has no `=`, a name is given twice, or a file cannot be read.
    """
    found: dict[str, str] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals:
            raise InvalidValueError(f"{option} takes name=value, got {item!r}")
        if name in found:
            raise InvalidValueError(f"{option} gives {name!r} twice: {found[name]!r} and {value!r}. Give it once.")
        if value.startswith("@@"):
            value = value[1:]
        elif value.startswith("@"):
            value = read_text(Path(value[1:])).rstrip("\n")
        found[name] = value
    return found


def listed(text: str, option: str) -> list[str]:
    """Parse a list of items separated by commas. Double quotes enclose an item that has a comma, as in a CSV file.

    Raises:
        InvalidArgumentError: a quote is not closed, or stands where CSV allows none.
    """
    try:
        [row] = csv.reader([text], skipinitialspace=True, strict=True)
    except (csv.Error, ValueError) as error:
        raise InvalidArgumentError(
            f"{option} takes items separated by commas, an item with a comma in double quotes; cannot read {text!r} ({error})"
        ) from None
    return [item.strip() for item in row if item.strip()]


def record_path(given: Path | None, name: str) -> Path:
    from programmable_kv.records import results_folder

    return given or results_folder() / f"{name}.json"


def command() -> str:
    """The command line that makes a record, without the path of the record."""
    words = sys.argv[1:]
    after = {index + 1 for index, word in enumerate(words) if word == "--out"}
    kept = [word for i, word in enumerate(words) if i not in after and word.partition("=")[0] != "--out"]
    return " ".join(["pkv", *kept])


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr, if that is a terminal. The block gets a function `report(done, total)`."""
    console = err.console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)
