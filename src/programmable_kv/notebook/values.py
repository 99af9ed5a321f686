"""A value from outside is data: it must not be able to speak as the system, as a role, or as an erratum.

Values are refused, never rewritten: a silently changed value is a wrong value.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from programmable_kv.errors import InvalidValueError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}\Z")
_REFUSED_CATEGORIES = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})
"""control, format (zero width, direction), private use, surrogate, line and paragraph separators"""
_ROLE_MARKERS = (
    "<|", "|>", "[inst]", "[/inst]", "<<sys>>", "<</sys>>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>",
    "<think>", "</think>", "<tool_call>", "</tool_call>", "###",
)  # fmt: skip
_ROLE_LINE = re.compile(r"(^|[\s.;!?\]])(system|assistant|user|developer|tool)\s*:", re.IGNORECASE)
_SHORTEST_TELLING_FRAGMENT = 5
"""letters; 'is now' has five"""


def check_name(name: str) -> None:
    """
    Raises:
        InvalidValueError: the name is not a plain identifier of at most 64 characters.
    """
    if not _NAME.match(name):
        raise InvalidValueError(
            f"a field name must be letters, digits, '_', '.' or '-', starting with a letter, at most 64 long; got {name!r}"
        )


def check_value(name: str, value: str, tokenizer: Any, template: str) -> None:
    """Refuse a value that could be read as anything but a value.

    Raises:
        InvalidValueError: it is empty, spans lines, has invisible characters, a special token or role marker of this or
            another chat format, or words of the erratum template.
    """
    if not isinstance(value, str):
        raise InvalidValueError(f"the value of {name} must be a string, got {type(value).__name__}. Convert it first.")
    if not value.strip():
        raise InvalidValueError(f"the value of {name} is empty. Write what it should say, for example 'none'.")
    if value != value.strip():
        raise InvalidValueError(f"the value of {name} starts or ends with white space: {value!r}. Strip it first.")
    for character in value:
        category = unicodedata.category(character)
        if category in _REFUSED_CATEGORIES:
            what = "a line break or control character" if category in ("Cc", "Zl", "Zp") else "an invisible character"
            raise InvalidValueError(
                f"the value of {name} contains {what} (U+{ord(character):04X}). A value is one line of visible text."
            )
    check_no_markers(value, tokenizer, f"the value of {name}")
    plain = _plain(value)
    if _ROLE_LINE.search(unicodedata.normalize("NFKC", value)):
        raise InvalidValueError(f"the value of {name} contains a role marker ('system:' or kin): {value!r}")
    for fragment in re.split(r"\{name\}|\{value\}", template):
        for clause in re.split(r"[.:;,\[\]]", fragment):
            telling = _plain(clause)
            if len(telling.replace(" ", "")) >= _SHORTEST_TELLING_FRAGMENT and f" {telling} " in f" {plain} ":
                raise InvalidValueError(
                    f"the value of {name} contains words of the erratum template ('{clause.strip()}'), so it could pass "
                    "for an update of another field. Rephrase it."
                )


def check_no_markers(text: str, tokenizer: Any, what: str) -> None:
    """
    Raises:
        InvalidValueError: the text contains a special token of the tokenizer or a role marker of a known chat format.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    for marker in (*_ROLE_MARKERS, *(str(token).casefold() for token in tokenizer.all_special_tokens)):
        if marker in folded:
            raise InvalidValueError(f"{what} contains {marker!r}, which marks roles or special tokens, not data")
    added = getattr(tokenizer, "added_tokens_decoder", {})
    for token in added.values():
        if token.special and token.content.casefold() in folded:
            raise InvalidValueError(f"{what} contains the special token {token.content!r}")


def check_template(template: str) -> None:
    """
    Raises:
        InvalidValueError: an erratum template must name both the field and its value.
    """
    if "{name}" not in template or "{value}" not in template:
        raise InvalidValueError(
            "an erratum template needs both {name} and {value}, for example '{name} is now {value}.'"
        )
    if "\n" in template:
        raise InvalidValueError("an erratum is one line: its template must not contain a line break")


def _plain(text: str) -> str:
    """Letters and digits in lower case, with single spaces between words, whatever stood between them."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in folded).split())
