"""The sentences that this package says to a model. Every token of an erratum is paid for at every edit: keep it short."""

from __future__ import annotations

DEFAULT_TEMPLATE = "[STATE UPDATE] {name} is now: {value}."
"""the erratum: one late, salient line that overrides a field's earlier value and what was concluded from it. A stock
model may want another wording (`docs/which-edit.md`)."""

THINK_INSTRUCTION = "First restate the field, then decide."
"""asks for one line of reasoning before the answer"""


def statement(template: str, name: str, value: str) -> str:
    """The erratum's line. Braces of the template's own stay as they are."""
    return template.replace("{name}", name).replace("{value}", value)
