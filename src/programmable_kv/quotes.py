"""Quotes of records in documents: `<!--RECORD:PATH:FORMAT-->0.98<!--/-->` marks a number that comes from a record.

The comments are invisible when Markdown is rendered. `pkv figures` writes the numbers; a test fails if a document's
number differs from its record, or if a number looks measured but quotes no record.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from programmable_kv.records import Record, read_record, results_folder

_QUOTE = re.compile(r"<!--(?P<record>[a-z0-9-]+):(?P<path>[A-Za-z0-9_.+]+):(?P<format>[^>]*?)-->(?P<text>.*?)<!--/-->")
_ENDS = "<!--/-->"
_CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
_MEASURED_LOOKING = re.compile(r"\d+(?:\.\d+)?\s?(?:ms\b|%|×|x faster|times faster|tokens/s|nats)|\b0\.\d+")
CITED = "<!--cited-->"
"""Ending of a line that quotes published work, with its source, instead of a record."""


def documents(folder: Path) -> Iterator[Path]:
    """README.md, CONTRIBUTING.md and every Markdown file in the documents' folder."""
    yield from (path for path in (folder.parent / "README.md", folder.parent / "CONTRIBUTING.md") if path.exists())
    yield from sorted(folder.rglob("*.md"))


def formatted(record: Record, path: str, spec: str) -> str:
    """A figure as a document shows it; a `%` at the start of the format multiplies by 100 and appends a `%`."""
    value = record.figure(path)
    text = format(100 * value, spec[1:]) + "%" if spec.startswith("%") else format(value, spec)
    # A negative value that rounds to zero is shown without its sign.
    return text.removeprefix("-") if not text.strip("-0.%") else text


def refreshed(text: str, results: Path | None = None) -> str:
    """The document with every quoted number replaced by the number in its record."""
    folder = results or results_folder()

    def write(match: re.Match[str]) -> str:
        record = read_record(folder / f"{match['record']}.json")
        number = formatted(record, match["path"], match["format"])
        return f"<!--{match['record']}:{match['path']}:{match['format']}-->{number}<!--/-->"

    return _QUOTE.sub(write, text)


def wrong_quotes(text: str, results: Path | None = None) -> list[str]:
    """The errors in a document's numbers, one sentence each."""
    folder = results or results_folder()
    wrong = []
    for match in _QUOTE.finditer(text):
        expected = formatted(read_record(folder / f"{match['record']}.json"), match["path"], match["format"])
        if match["text"] != expected:
            wrong.append(
                f"{match['record']}:{match['path']} is {expected} in its record, but {match['text']} in the document"
            )
    unquoted = _QUOTE.sub("", _CODE.sub("", text))
    for line in unquoted.splitlines():
        if _ENDS in line:
            wrong.append(f"a quote cannot be read, and nothing would check its number: {line.strip()[:90]}")
        found = _MEASURED_LOOKING.search(line)
        if found and not line.rstrip().endswith(CITED):
            wrong.append(f"{found.group()!r} looks measured but quotes no record: {line.strip()[:90]}")
    return wrong
