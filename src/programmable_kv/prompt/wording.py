"""Sentences that this package writes for a model. Every edit computes the tokens of its erratum, so keep it short."""

from __future__ import annotations

from difflib import unified_diff

from programmable_kv.prompt.written import escaped, in_json_string

DEFAULT_TEMPLATE = "[STATE UPDATE] {name} is now: {value}."
"""The erratum: one late, salient line that overrides a field's earlier value and what was concluded from it. A stock
model may need another wording (`docs/which-edit.md`)."""

THINK_INSTRUCTION = "First restate the field, then decide."
"""Asks for one line of reasoning before the answer."""


def statement(template: str, name: str, value: str) -> str:
    """The erratum's line. Other braces in the template stay unchanged.

    If the template is JSON and the value stands in one of its strings, the value is escaped.
    """
    if in_json_string(*template.partition("{value}")[::2]):
        value = escaped(value)
    return template.replace("{name}", name).replace("{value}", value)


def block_statement(template: str, name: str, block: str, before: str | None = None) -> str:
    """The erratum for a block: the template's text before the value, then the block on lines of its own.

    Args:
        before: the block that all readers have read, if there is one. If the difference from it takes at most half as
            many characters as the block, the erratum gives only the difference.
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
    """The lines that differ, with one unchanged line around each change; `-` marks removed, `+` added lines."""
    lines = list(unified_diff(before.splitlines(), after.splitlines(), n=1, lineterm=""))
    return "\n".join(line for line in lines[2:] if not line.startswith("@@"))  # the first two name the files


_EMPTY = "(empty)"
_DIFFERENCE = "as above, but for these lines (- removed, + added)"
