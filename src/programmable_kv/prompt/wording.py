"""The sentences that this package says to a model. Every token of an erratum is paid for at every edit: keep it short."""

from __future__ import annotations

from difflib import unified_diff

from programmable_kv.prompt.written import escaped, in_json_string

DEFAULT_TEMPLATE = "[STATE UPDATE] {name} is now: {value}."
"""the erratum: one late, salient line that overrides a field's earlier value and what was concluded from it. A stock
model may want another wording (`docs/which-edit.md`)."""

THINK_INSTRUCTION = "First restate the field, then decide."
"""asks for one line of reasoning before the answer"""


def statement(template: str, name: str, value: str) -> str:
    """The erratum's line. Braces of the template's own stay as they are.

    Where the template is JSON and the value stands in one of its strings, the value is escaped.
    """
    if in_json_string(*template.partition("{value}")[::2]):
        value = escaped(value)
    return template.replace("{name}", name).replace("{value}", value)


def block_statement(template: str, name: str, block: str, before: str | None = None) -> str:
    """The erratum of a block: what the template says before its value, and the block on lines of its own.

    Args:
        before: the block that all readers know, if there is one. Where the lines that differ from it, told as a difference,
            take at most half as many characters, only they are told.
    """
    head, _, rest = template.partition("{value}")
    if "{name}" not in head or any(character.isalnum() for character in rest) or in_json_string(head, rest):
        return statement(template, name, f"\n{block}\n" if not in_json_string(head, rest) else block)
    head = head.replace("{name}", name).rstrip()
    if not block.strip():
        return f"{head} {_EMPTY}"
    difference = None if before is None else changed_lines(before, block)
    if difference is not None and 2 * len(difference) <= len(block):
        return f"{head} {_DIFFERENCE}\n{difference}"
    return f"{head}\n{block}"


def changed_lines(before: str, after: str) -> str:
    """The lines that differ, each change with the line before and after it; `-` was removed, `+` was added."""
    lines = list(unified_diff(before.splitlines(), after.splitlines(), n=1, lineterm=""))
    return "\n".join(line for line in lines[2:] if not line.startswith("@@"))  # the first two name the files


_EMPTY = "(empty)"
_DIFFERENCE = "as above, but for these lines (- removed, + added)"
