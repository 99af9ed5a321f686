"""What the lines of a block are about: the words by which the text after it speaks of a line."""

from __future__ import annotations

import re

_MARKS = re.compile(r"\s*(?:(?:[-*+•>#|]+|\d+[.)]|\[[ xX✓~-]?\])\s*)*")
"""what a line of a list, a todo list, a quotation or a table begins with"""
_STATE = re.compile(r"\s*(?::\s|=|->|→|\||\t).*|\s*:?\s*$", re.DOTALL)
"""from what separates a line's subject from what is said of it, to its end"""


def subject_of(line: str) -> str:
    """What a line is about: `order` in `- order: shipped`, `call Ann` in `- [x] call Ann`; empty if nothing."""
    begins = _MARKS.match(line)
    assert begins is not None, "the pattern matches the empty text"
    subject = _STATE.sub("", line[begins.end() :], count=1).strip(" \"'`*_")
    return subject if any(character.isalnum() for character in subject) else ""


def changed_subjects(before: str, after: str) -> tuple[str, ...]:
    """The subjects of the lines that stand in one of two blocks only, in order, each once."""
    old, new = before.splitlines(), after.splitlines()
    changed = [line for line in old if line not in new] + [line for line in new if line not in old]
    return tuple(dict.fromkeys(filter(None, map(subject_of, changed))))
