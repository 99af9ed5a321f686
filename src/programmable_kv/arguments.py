"""Checks of arguments: a wrong type, a bad number or an unknown field raises before anything is done."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from enum import StrEnum
from typing import Any, TypeVar

from programmable_kv.errors import InvalidArgumentError, UnknownFieldError

Choice = TypeVar("Choice", bound=StrEnum)


def require(value: object, kinds: type | tuple[type, ...], what: str) -> None:
    """Check that a value has one of the given types.

    Args:
        what: the beginning of the message, such as "a prompt is text, or None".

    Raises:
        InvalidArgumentError: the value has none of these types.
    """
    if not isinstance(value, kinds):
        raise InvalidArgumentError(f"{what}; got {type(value).__name__}: {_shown(value)}")


def require_count(value: Any, what: str, *, least: int = 0) -> None:
    """
    Raises:
        InvalidArgumentError: the value is not a whole number, or is less than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidArgumentError(f"{what} must be a whole number, at least {least}; got {_shown(value)}")


def require_number(
    value: Any, what: str, *, least: float | None = None, above: float | None = None, most: float | None = None
) -> None:
    """
    Raises:
        InvalidArgumentError: the value is not a finite number, or is out of these bounds.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    within = (
        number
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
    )
    if not within:
        bounds = [("at least", least), ("above", above), ("at most", most)]
        expected = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
        raise InvalidArgumentError(f"{what} must be a finite number{expected and ' '}{expected}; got {_shown(value)}")


def choice_of(kind: type[Choice], given: str, what: str) -> Choice:
    """The enum member that was given, as a member or as its value.

    Args:
        what: the beginning of the message, such as "turns is".

    Raises:
        InvalidArgumentError: `given` is not a member of the enum; the message lists the members.
    """
    try:
        return kind(given)
    except ValueError:
        raise InvalidArgumentError(f"{what} one of {', '.join(kind)}; got {given!r}") from None


def require_fields(names: Iterable[str], known: Collection[str]) -> None:
    """
    Raises:
        UnknownFieldError: a name is not among the `known` fields; the message lists them.
    """
    for name in names:
        if name not in known:
            raise UnknownFieldError(f"unknown field {name!r}; the context's fields are: {', '.join(known) or 'none'}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
