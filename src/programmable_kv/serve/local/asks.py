"""A request in a form that all protocols share, and checks of its parts. Unsupported parts are never ignored."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from programmable_kv.arguments import require_count
from programmable_kv.errors import InvalidArgumentError
from programmable_kv.serve.checks import refuse

DEFAULT_TOKENS = 512
"""The token limit of an answer if the request sets none."""
_SEEDS = 2**31


@dataclass(frozen=True, slots=True)
class Ask:
    """One request for an answer."""

    model: str
    messages: Sequence[Mapping[str, Any]] = field(repr=False)
    """The messages in the form of Chat Completions."""
    sampling: Mapping[str, Any]
    """Keyword arguments of `Notebook.generate`."""
    stream: bool = False
    tools: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    """The tools in the form of Chat Completions. They are also given if no tool may be called."""
    most_calls: int | None = None
    """The most tool calls in the answer; None sets no limit."""
    likeliest: int | None = None
    """The number of likeliest tokens to report at each place, with log-probabilities; None reports none."""
    raw: str | None = field(default=None, repr=False)
    """The prompt as raw text, instead of messages."""


def check_known(
    body: Mapping[str, Any],
    read: Collection[str],
    neutral: Mapping[str, tuple[Any, ...]],
    without_effect: Collection[str] = (),
) -> None:
    """Check that a request has no parameters that this server does not support.

    Args:
        read: parameters that have an effect.
        neutral: parameters that are accepted only with these values, which request nothing special.
        without_effect: parameters that do not affect the answer.

    Raises:
        RefusedError: the request has another parameter, or a neutral one with another value.
    """
    for name, value in body.items():
        if name in read or name in without_effect or value is None:
            continue
        if name not in neutral or not any(_same(value, each) for each in neutral[name]):
            refuse("unsupported_parameter", f"this server does not support {name!r:.60} with this value: leave it out")


def sampling_of(body: Mapping[str, Any], limit: int, stop: Sequence[str] = ()) -> dict[str, Any]:
    """Return keyword arguments of `Notebook.generate`, from the parameters whose names all protocols share.

    Raises:
        RefusedError: a value is of the wrong type.
    """
    found: dict[str, Any] = {
        "temperature": number(body, "temperature", 1.0),
        "max_new_tokens": limit,
        "seed": count(body, "seed", secrets.randbelow(_SEEDS)),
        "stop": stop,
    }
    if body.get("top_p") is not None:
        found["top_p"] = number(body, "top_p", 1.0)
    return found


def limit_of(body: Mapping[str, Any], *names: str, default: int) -> int:
    """Return the token limit of an answer: the first of these parameters that the request has.

    Raises:
        RefusedError: the value is not a whole number.
        InvalidArgumentError: the value is less than 1.
    """
    name = next((each for each in names if body.get(each) is not None), names[0])
    limit = count(body, name, default)
    require_count(limit, name, least=1)
    return limit


def stops_of(body: Mapping[str, Any], name: str) -> list[str]:
    """Return the strings that end an answer. The request gives one string or a list of strings.

    Raises:
        InvalidArgumentError: the value is neither a string nor a list of strings, or a string is empty.
    """
    value = body.get(name)
    found = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(found, list) or not all(isinstance(each, str) and each for each in found):
        raise InvalidArgumentError(
            f"{name} must be a text or a list of texts of at least one character each; got {value!r:.80}"
        )
    return found


def calls_of(allowed: bool, parallel: bool) -> int | None:
    """Return the most tool calls in an answer; None sets no limit.

    Args:
        allowed: whether the answer may call tools at all.
        parallel: whether there may be more than one call.
    """
    if not allowed:
        return 0
    return None if parallel else 1


def model_of(body: Mapping[str, Any]) -> str:
    """Return the name of the model in the request.

    Raises:
        RefusedError: the request names no model.
    """
    model = body.get("model")
    if not isinstance(model, str):
        refuse("invalid_request", "model must be the name of the model, or notebook:ID")
    return model


def mappings(value: Any, what: str) -> Iterator[Mapping[str, Any]]:
    """Yield the objects of a list.

    Raises:
        RefusedError: the value is not a list, or an item is not an object.
    """
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        refuse("invalid_request", f"{what} must be a list of objects")
    yield from value


def number(body: Mapping[str, Any], name: str, default: float) -> float:
    """
    Raises:
        RefusedError: the value is not a number, or its absolute value is above 2**31.
    """
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > _SEEDS:
        refuse("invalid_request", f"{name} must be a number")
    return float(value)


def count(body: Mapping[str, Any], name: str, default: int) -> int:
    """
    Raises:
        RefusedError: the value is not a whole number.
    """
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        refuse("invalid_request", f"{name} must be a whole number")
    return value


def flag(body: Mapping[str, Any], name: str) -> bool:
    """
    Raises:
        RefusedError: the value is neither true nor false.
    """
    value = body.get(name)
    if value not in (None, True, False):
        refuse("invalid_request", f"{name} must be true or false")
    return bool(value)


def at_most(value: int, name: str, most: int) -> int:
    """
    Raises:
        RefusedError: the value is below 0 or above `most`.
    """
    if not 0 <= value <= most:
        refuse("invalid_request", f"{name} must be from 0 to {most}")
    return value


def _same(value: Any, other: Any) -> bool:
    """Whether two values are equal and of one type: 1 is not the same as true."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)
