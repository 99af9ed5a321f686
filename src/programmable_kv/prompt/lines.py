"""Subjects of the lines of a block: the words by which later text refers to a line."""

from __future__ import annotations

import re

_MARKS = re.compile(r"\s*(?:(?:[-*+•>#|]+|\d+[.)]|\[[ xX✓~-]?\])\s*)*")
"""The markers at the beginning of a line of a list, a todo list, a quotation or a table."""
_STATE = re.compile(r"\s*(?::\s|=|->|→|\||\t).*|\s*:?\s*$", re.DOTALL)
"""Everything after a line's subject: a separator (`:`, `=`, `->`, `|`, a tab) and the rest of the line."""


def subject_of(line: str) -> str:
    """The subject of a line: `order` in `- order: shipped`, `call Ann` in `- [x] call Ann`; empty if it has none."""
    begins = _MARKS.match(line)
    assert begins is not None, "the pattern matches the empty text"
    subject = _STATE.sub("", line[begins.end() :], count=1).strip(" \"'`*_")
    return subject if any(character.isalnum() for character in subject) else ""


def changed_subjects(before: str, after: str) -> tuple[str, ...]:
    """The subjects of the lines that only one of two blocks has, each once: first of removed, then of added lines."""
    old, new = before.splitlines(), after.splitlines()
    changed = [line for line in old if line not in new] + [line for line in new if line not in old]
    return tuple(dict.fromkeys(filter(None, map(subject_of, changed))))
