"""Splits a system message into runs of plain text, values of fields, and readers of fields.

A line after a field's value that mentions the field is a reader, including its line break. So is the rest of the line
that contains the value; the label before the value is plain text. A line mentions a field by the field's name or by one
of its declared words. Both are found in the same way as in the library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from programmable_kv.prompt.readers import mention_pattern

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_LINE = re.compile(r"[^\n]*\n|[^\n]+")


@dataclass(frozen=True, slots=True)
class Run:
    """A run of text of one part: a value (of `field`), a reader (of `fields`), or plain text."""

    text: str
    field: str = ""
    fields: frozenset[str] = frozenset()


def runs(prompt: str, values: Mapping[str, str], words: Mapping[str, Sequence[str]]) -> list[Run]:
    """Split a prompt with `{field}` placeholders into runs. `words` has the declared words for each field."""
    patterns = {name: [mention_pattern(word) for word in (name, *words.get(name, ()))] for name in values}
    found: list[Run] = []
    placed: set[str] = set()
    for line in _LINE.findall(prompt):
        shown = line.format_map(values)
        mentioned = {name for name in placed if any(pattern.search(shown) for pattern in patterns[name])}
        pieces = _PLACEHOLDER.split(line)
        if len(pieces) == 1:
            found.append(Run(line, fields=frozenset(mentioned)))
            continue
        found.append(Run(pieces[0]))
        for name, behind in zip(pieces[1::2], pieces[2::2], strict=True):
            placed.add(name)
            mentioned.add(name)
            found += [Run(values[name], field=name), Run(behind, fields=frozenset(mentioned))]
    return _joined([run for run in found if run.text])


def _joined(found: list[Run]) -> list[Run]:
    """Join adjacent plain runs. Each reader stays one line."""
    joined: list[Run] = []
    for run in found:
        if joined and not (run.field or run.fields or joined[-1].field or joined[-1].fields):
            joined[-1] = Run(joined[-1].text + run.text)
        else:
            joined.append(run)
    return joined
