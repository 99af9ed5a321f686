"""Checks of the names of fields, of roles, and of erratum templates. `guard.py` checks values."""

from __future__ import annotations

import re
from typing import Any

from programmable_kv.arguments import require
from programmable_kv.errors import InvalidValueError
from programmable_kv.prompt.characters import folded

_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}\Z")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}\Z")


def check_name(name: str) -> None:
    """
    Raises:
        InvalidValueError: the name is not a plain identifier of at most 64 characters.
    """
    if not _NAME.match(name):
        raise InvalidValueError(
            f"a field name has at most 64 letters, digits, '_', '.' or '-', and starts with a letter or '_'; got {name!r}"
        )


def check_role(role: str) -> None:
    """
    Raises:
        InvalidValueError: the role is not one word of at most 32 letters, digits, `_` and `-`.
    """
    if not _ROLE.match(role):
        raise InvalidValueError(f"a role must be one word such as 'user' or 'tool', got {role!r}")


def check_no_markers(text: str, tokenizer: Any, what: str) -> None:
    """
    Raises:
        InvalidValueError: the text contains a special token of the tokenizer.
    """
    plain = folded(text)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {str(token) for token in tokenizer.all_special_tokens} | {t.content for t in added.values() if t.special}
    for token in special:
        if folded(token) in plain:
            raise InvalidValueError(
                f"{what} contains {token!r}, which marks roles or the end of a text and is not data"
            )


def check_template(template: str) -> None:
    """
    Raises:
        InvalidArgumentError: the template is not text.
        InvalidValueError: the template lacks `{name}` or `{value}`, or contains a line break.
    """
    require(template, str, "an erratum template must be text")
    if "{name}" not in template or "{value}" not in template:
        raise InvalidValueError(
            "an erratum template needs both {name} and {value}, for example '{name} is now {value}.'"
        )
    if any(character in template.replace("{name}", "").replace("{value}", "") for character in "\n\r"):
        raise InvalidValueError("an erratum is one line: its template must not contain a line break")
