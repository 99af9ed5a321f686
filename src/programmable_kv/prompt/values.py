"""A value from outside is data: it must not be able to speak as the system, as a role, or as an erratum.

Values are refused, never rewritten: a silently changed value is a wrong value.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from programmable_kv.errors import InvalidValueError

_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}\Z")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}\Z")
_REFUSED_CATEGORIES = frozenset({"Cc", "Cf", "Co", "Cs", "Zl", "Zp"})
"""control, format (zero width, direction), private use, surrogate, line and paragraph separators"""
_ROLE_MARKERS = (
    "<|", "|>", "[inst]", "[/inst]", "<<sys>>", "<</sys>>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>",
    "<think>", "</think>", "<tool_call>", "</tool_call>", "###",
)  # fmt: skip
_ROLE_LINE = re.compile(r"(^|\W)(system|assistant|user|developer|tool|human)\s*:|^\W*(model|ai)\s*:", re.IGNORECASE)
_BLANKS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
"""characters that show as nothing, though Unicode calls them letters, marks or symbols"""
_ASSERTS = r"\s*(?:(?:is|are|was|now|has|becomes?|changed|changes|set|to|went|stands)\b|=|:|->)"
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


def check_value(name: str, value: str, tokenizer: Any, template: str, names: Iterable[str] = ()) -> None:
    """Refuse a value that could be read as anything but a value. `names` are those of the context's fields.

    Raises:
        InvalidValueError: it is empty, spans lines, has invisible characters, a special token or role marker of this or
            another chat format, words of the erratum template, or says something about a field.
    """
    if not isinstance(value, str):
        raise InvalidValueError(f"the value of {name} must be a string, got {type(value).__name__}. Convert it first.")
    if not value.strip():
        raise InvalidValueError(f"the value of {name} is empty. Write what it should say, for example 'none'.")
    if value != value.strip():
        raise InvalidValueError(f"the value of {name} starts or ends with white space: {value!r}. Strip it first.")
    for character in value:
        category = unicodedata.category(character)
        if category in _REFUSED_CATEGORIES or character in _BLANKS:
            what = "a line break or control character" if category in ("Cc", "Zl", "Zp") else "an invisible character"
            raise InvalidValueError(
                f"the value of {name} contains {what} (U+{ord(character):04X}). A value is one line of visible text."
            )
    check_no_markers(value, tokenizer, f"the value of {name}")
    _check_no_foreign_markers(value, tokenizer, name)
    plain = _plain(value)
    if _ROLE_LINE.search(unicodedata.normalize("NFKC", value)):
        raise InvalidValueError(f"the value of {name} contains a role marker ('system:' or kin): {value!r}")
    for fragment in re.split(r"\{name\}|\{value\}", template):
        for clause in re.split(r"[.:;,\[\]]", fragment):
            telling = _plain(clause)
            letters = telling.replace(" ", "")
            spaced = len(letters) >= _SHORTEST_TELLING_FRAGMENT and f" {telling} " in f" {plain} "
            if spaced or (len(letters) >= 2 * _SHORTEST_TELLING_FRAGMENT and letters in plain.replace(" ", "")):
                raise InvalidValueError(
                    f"the value of {name} contains words of the erratum template ('{clause.strip()}'), so it could pass "
                    "for an update of another field. Rephrase it."
                )

    for other in names:
        words = _plain(other)
        several = " " in words and f" {words} " in f" {plain} "
        if several or re.search(rf"\b{re.escape(other)}\b{_ASSERTS}", value, re.IGNORECASE):
            raise InvalidValueError(
                f"the value of {name} speaks of the field {other}, so it could pass for an update of it: {value!r}. Rephrase "
                "it, or give that field a name that values do not mention."
            )


def check_role(role: str) -> None:
    """
    Raises:
        InvalidValueError: a role is one word, as chat templates know it.
    """
    if not _ROLE.match(role):
        raise InvalidValueError(f"a role is one word such as 'user' or 'tool', got {role!r}")


def _check_no_foreign_markers(value: str, tokenizer: Any, name: str) -> None:
    """Markers of any chat format, and whatever this tokenizer reads as one token of its added vocabulary."""
    folded = unicodedata.normalize("NFKC", value).casefold()
    for marker in _ROLE_MARKERS:
        if marker in folded:
            raise InvalidValueError(f"the value of {name} contains {marker!r}, which marks roles or special tokens")
    added = getattr(tokenizer, "added_tokens_decoder", {})
    for token in set(tokenizer.encode(value, add_special_tokens=False)) & set(added):
        content = added[token].content
        if content.strip() and content in value:  # a byte that the vocabulary spells '<0x3A>' is no such token
            raise InvalidValueError(
                f"the value of {name} contains {content!r}, which this tokenizer reads as one control token"
            )


def check_no_markers(text: str, tokenizer: Any, what: str) -> None:
    """
    Raises:
        InvalidValueError: the text contains one of the tokenizer's own special tokens.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {str(token) for token in tokenizer.all_special_tokens} | {t.content for t in added.values() if t.special}
    for token in special:
        if token.casefold() in folded:
            raise InvalidValueError(f"{what} contains {token!r}, which marks roles or the end of a text, not data")


def check_template(template: str) -> None:
    """
    Raises:
        InvalidValueError: an erratum template must name both the field and its value.
    """
    if "{name}" not in template or "{value}" not in template:
        raise InvalidValueError(
            "an erratum template needs both {name} and {value}, for example '{name} is now {value}.'"
        )
    if any(character in template.replace("{name}", "").replace("{value}", "") for character in "\n\r"):
        raise InvalidValueError("an erratum is one line: its template must not contain a line break")


def _plain(text: str) -> str:
    """Letters and digits in lower case, with single spaces between words, whatever stood between them."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in folded).split())
