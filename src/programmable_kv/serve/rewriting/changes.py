"""Finds what changed between two versions of one text, if only values changed."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

from programmable_kv.explain.difference import common_length
from programmable_kv.explain.volatile import volatile_at
from programmable_kv.serve.rewriting.moments import differ_as_moments, is_plain
from programmable_kv.serve.rewriting.prompt import Unit
from programmable_kv.serve.rewriting.rules import Rules, Sharing

_NAME = r"\s*(?:[-*] )?[\w\"'][\w \"'./()-]{0,59}(?:\s*:\s+|\s*=\s*)"
_NAMED = re.compile(f"^({_NAME})(\\S.{{0,199}}|)$")
_MOST_VALUES = 8
"""The most values that are followed in one line."""
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Change:
    """One value that changed."""

    name: str
    """What to call the value: its name, or how its line begins."""
    value: str = field(repr=False)
    named: bool
    """True if `name` is the value's own name. False if it is the beginning of a line whose whole text is the value."""
    kind: str
    tell: bool = True
    trusted: bool = True
    """Whether the value stands in the system prompt."""
    share: bool | None = None
    """What was declared about sharing the value between conversations; also False if nothing may be shared."""
    learned: bool = False
    """True if the value was learned, not declared."""

    @property
    def harmless(self) -> bool:
        """Whether the value reveals nothing about one conversation to the reader of another."""
        return self.kind == "clock" and self.share is not False

    @property
    def shareable(self) -> bool:
        """Whether the earlier value may stay readable in the system prompt of the same tenant's other conversations."""
        if self.share is not None:
            return self.share
        return self.harmless and is_plain(self.value)


@dataclass(frozen=True, slots=True)
class Compared:
    """The result of comparing two versions of one text."""

    changes: tuple[Change, ...] = ()
    templates: tuple[str, ...] = field(default=(), repr=False)
    """Templates of the lines that changed in an undeclared value: the parts of each line that stay, as JSON."""
    explained: bool = True
    """Whether only declared and learned values changed."""


def compare(unit: Unit, place: str, before: str, after: str, rules: Rules, learned: Collection[str]) -> Compared:
    """Compare two versions of a text.

    Args:
        unit: the unit that the later version belongs to.
        learned: templates of lines that were seen to change repeatedly.
    """
    if before == after:
        return Compared()
    one, other = rules.mask(unit, place, before), rules.mask(unit, place, after)
    if [each.rule.name for each in one.values] != [each.rule.name for each in other.values]:
        return Compared(explained=False)
    apart = rules.sharing is Sharing.NONE
    changes = [
        Change(
            new.rule.name, new.value, True, kind_of(old.value, new.value), new.rule.tell, unit.head,
            False if apart else new.rule.share,
        )
        for old, new in zip(one.values, other.values, strict=True)
        if old.value != new.value
    ]  # fmt: skip
    if one.text == other.text:
        return Compared(tuple(changes))
    lines, lines_after = one.text.split("\n"), other.text.split("\n")
    if len(lines) != len(lines_after) or not unit.head or not rules.learn:
        return Compared(explained=False)
    templates: list[str] = []
    explained = True
    for line, line_after in zip(lines, lines_after, strict=True):
        if line == line_after:
            continue
        found = _line_change(line, line_after)
        if found is None:
            return Compared(explained=False)
        template, change = found
        templates.append(template)
        changes.append(replace(change, share=False) if apart else change)
        explained = explained and template in learned
    return Compared(tuple(changes), tuple(templates), explained)


def kind_of(before: str, after: str) -> str:
    """`clock`, `counter` or `id` if two values differ in nothing else; otherwise `value`, also for Unix timestamps."""
    template = _template(before, after)
    return template[1] if template is not None else "value"


def may_hold(text: str, templates: Collection[str]) -> bool:
    """Whether a line of a text fits one of the templates: their parts in order, with something between each two."""
    forms = [_parts_of(each) for each in templates]
    return any(_has_form(line, form) for line in text.split("\n") for form in forms)


@lru_cache(maxsize=1024)
def _parts_of(template: str) -> tuple[str, ...]:
    return tuple(json.loads(template))


def _has_form(line: str, parts: tuple[str, ...]) -> bool:
    """Whether a line fits the parts of a template.

    Each part is taken at its first place behind the previous part: if a later place fits, so does the first. A regular
    expression would try every place of every part."""
    first, *inner, last = parts
    if not line.startswith(first) or not line.endswith(last):
        return False
    at = len(first)
    for part in inner:
        found = line.find(part, at + 1)
        if found < 0:
            return False
        at = found + len(part)
    return at + 1 <= len(line) - len(last)


def _line_change(before: str, after: str) -> tuple[str, Change] | None:
    """The template of a line in which only values changed, and the change; None if more than values changed."""
    if "\x00" in before or "\x00" in after:
        return None  # a line contains a declared value
    one, other = _NAMED.match(before), _NAMED.match(after)
    if one is not None and other is not None and one[1] == other[1] and other[2]:
        name = one[1].strip().lstrip("-* ").rstrip(" :=").strip("\"'")
        return json.dumps([one[1], ""]), Change(name, other[2], True, kind_of(one[2], other[2]), learned=True)
    found = _template(before, after)
    if found is None or not found[0][0].strip():
        return None  # no text stays that could name the line
    head = found[0][0].strip()
    return json.dumps(found[0]), Change(head[:_SHOWN].rstrip(), after.strip(), False, found[1], learned=True)


def _template(before: str, after: str) -> tuple[list[str], str] | None:
    """The equal parts of two texts that differ only in clocks, ids and counters, and the gravest kind; or None."""
    whole = before, after
    parts: list[str] = []
    kinds: list[str] = []
    for start, stop, one, other, kind in _values(before, after):
        if kind == "":
            return None
        parts.append(after[start:stop])
        kinds.append(kind)
        before, after = one, other
    if not kinds:
        return None
    gravest = next((kind for kind in ("value", "id", "counter", "clock") if kind in kinds), "value")
    if gravest == "clock" and not differ_as_moments(*whole):
        gravest = "value"  # what looks like a time zone behind a clock may be a name
    return [*parts, after], gravest


def _values(before: str, after: str) -> Iterator[tuple[int, int, str, str, str]]:
    """The values in which two texts differ: for each, the range of equal text before it, the rest of both texts behind
    it, and its kind. An empty kind means that the texts differ in something else."""
    for _ in range(_MOST_VALUES):
        if before == after:
            return
        value = volatile_at(before, after, common_length(before, after))
        if value is None:
            yield 0, 0, "", "", ""
            return
        yield 0, value.start, before[value.stop_before :], after[value.stop_after :], value.name
        before, after = before[value.stop_before :], after[value.stop_after :]
    yield 0, 0, "", "", ""
