"""Checks that a line's value is right for each place with the same name: two orders may each have a status."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from programmable_kv.serve.rewriting.changes import Change
from programmable_kv.serve.rewriting.prompt import Prompt
from programmable_kv.serve.rewriting.rules import Rules


def declared_values(prompt: Prompt, rules: Rules) -> Mapping[str, Collection[str]]:
    """The declared values in a request, by name. A name that stands at several places may have more than one value."""
    found: dict[str, set[str]] = {}
    for unit in prompt.units:
        for place, text in unit.texts.items():
            for value in rules.mask(unit, place, text).values:
                found.setdefault(value.rule.name, set()).add(value.value)
    return found


def are_clear(changes: Collection[Change], prompt: Prompt, rules: Rules) -> bool:
    """Whether each change may be stated by its name: no other place of the request has the same name and another value.

    A value of an old message is stated behind the newest one, so the present values of all messages count.
    """
    declared = declared_values(prompt, rules)
    for change in changes:
        if change.named and any(value != change.value for value in declared.get(change.name, ())):
            return False
        if change.learned and any(value != change.value for value in _read_as(change, prompt)):
            return False
    return True


def _read_as(change: Change, prompt: Prompt) -> Iterator[str]:
    """The texts in a request behind the name of a learned change, or the lines with the same beginning."""
    name = re.escape(change.name)
    form = re.compile(
        rf"^[ \t]*(?:[-*] )?[\"']?{name}[\"' ]*[:=][ \t]*(.*)$" if change.named else rf"^[ \t]*({name}.*)$",
        re.MULTILINE,
    )
    for unit in prompt.units:
        for text in unit.texts.values():
            if change.name in text:
                for match in form.finditer(text):
                    yield match[1] if change.named else match[1].rstrip()
