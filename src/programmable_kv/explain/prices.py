"""Prices of input tokens as data: a table with a date and a source in each row, which the user can replace."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

from programmable_kv.errors import InvalidRequestError

_DATED_NAME = re.compile(r"-(?:20\d{6}|20\d{2}-\d{2}-\d{2}|latest|preview)$")
_FORM = (
    'A price table is {"currency": "USD", "per_tokens": 1000000, "rows": [{"model": "...", "input": 2, "read": 0.1, '
    '"source": "...", "date": "2026-10-07"}]}'
)


@dataclass(frozen=True, slots=True)
class Price:
    """One model's prices, in the table's currency per `per_tokens` tokens."""

    model: str
    """The beginning of the model's name."""
    input: float
    read: float
    source: str
    date: str
    """The day of the source, in ISO 8601."""
    write: float | None = None
    write_1h: float | None = None
    above_tokens: int = 0
    """The row applies to requests with more tokens than this."""
    below_tokens: int | None = None
    """The row applies to requests with at most this many tokens."""
    minimum_tokens: int = 0
    """The length of the shortest prefix that is cached."""
    keeps_minutes: float | None = None
    """How long a prefix is kept unless the request asks for longer."""


@dataclass(frozen=True, slots=True)
class PriceTable:
    """Prices of several models."""

    currency: str
    per_tokens: int
    rows: tuple[Price, ...]
    name: str
    """The table's origin."""

    def price_of(self, model: str, tokens: int) -> Price | None:
        """The row for a model and a number of tokens, or None. If several match, the one with the longest name."""
        wanted = _plain(model)
        fitting = [
            row
            for row in self.rows
            if (wanted == _plain(row.model) or wanted.startswith(_plain(row.model) + "-"))
            and tokens > row.above_tokens
            and (row.below_tokens is None or tokens <= row.below_tokens)
        ]
        return max(fitting, key=lambda row: len(row.model), default=None)

    def lost(self, price: Price, tokens: int, written: int) -> float:
        """The extra cost of computing tokens again instead of reading them from the cache.

        Args:
            written: tokens that the upstream counted as written to its cache in this request; 0 if it does not say. If
                the row has a write price, up to this many of the tokens cost that price, the others the input price.
        """
        again = min(tokens, written) if price.write is not None else 0
        paid = again * (price.write or 0) + (tokens - again) * price.input
        return (paid - tokens * price.read) / self.per_tokens


def read_prices(path: Path | None = None) -> PriceTable:
    """The table in a file, or the table in the package if no file is given.

    Raises:
        InvalidRequestError: the file cannot be read or is not a price table, or a row lacks a model, price, source or
            date.
    """
    name = "the built-in table" if path is None else path.name
    try:
        source = files("programmable_kv.explain").joinpath("prices.json") if path is None else path
        given = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequestError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InvalidRequestError(f"{path} is not JSON: {error}. {_FORM}") from error
    if not isinstance(given, Mapping) or not isinstance(given.get("rows"), list):
        raise InvalidRequestError(f"{name} has no list of rows. {_FORM}")
    per_tokens = given.get("per_tokens", 1_000_000)
    if not isinstance(per_tokens, int) or per_tokens < 1:
        raise InvalidRequestError(f"{name}: per_tokens is {per_tokens!r}; expected a whole number of at least 1")
    rows = tuple(_row(row, f"{name}, row {number}") for number, row in enumerate(given["rows"], start=1))
    return PriceTable(str(given.get("currency", "USD")), per_tokens, rows, name)


def _row(given: Any, where: str) -> Price:
    known = {each.name for each in fields(Price)}
    if not isinstance(given, Mapping) or not set(given) <= known:
        extra = sorted(set(given) - known) if isinstance(given, Mapping) else [type(given).__name__]
        raise InvalidRequestError(f"{where} has {', '.join(map(repr, extra))}; a row takes {', '.join(sorted(known))}")
    for key in ("model", "source", "date"):
        if not isinstance(given.get(key), str) or not given[key]:
            raise InvalidRequestError(f"{where} has no {key}. {_FORM}")
    for key in known - {"model", "source", "date"}:
        value = given.get(key)
        wanted = key in ("input", "read")
        if (value is None and wanted) or (value is not None and not _is_amount(value)):
            raise InvalidRequestError(f"{where}: {key} is {value!r}; expected a number, 0 or more")
    try:
        date.fromisoformat(given["date"])
    except ValueError as error:
        raise InvalidRequestError(f"{where}: date is {given['date']!r}; expected a day such as 2026-10-07") from error
    return Price(**given)


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _plain(model: str) -> str:
    """A model's name without provider and date, in a uniform spelling."""
    name = model.lower().rpartition("/")[2].replace(".", "-").replace("_", "-")
    return _DATED_NAME.sub("", name)
